"""Graphs as facts: every node of a program after a stage, with its module, shape, source line and code."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from int8pass.capture import Program
from int8pass.graph.pattern import op_name
from int8pass.graph.rewrite import LINEAR
from int8pass.inspect.facts import Node, Stage
from int8pass.match import dotted_path, source_line

NAMES = {
    "captured": "captured", "normalized": "normalized", "smoothed": "smoothed", "portable": "quantized",
    "fused": "fused",
}  # fmt: skip
"""The pipeline's stages that are shown, and what they are called."""

_DTYPES = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64", torch.int8: "i8",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "bool",
}  # fmt: skip


class Sources:
    """Source lines, each stored once."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self._seen: dict[str, int] = {}

    def index(self, node: fx.Node) -> int:
        """Where the source line of a node is in `lines`; −1 when unknown."""
        trace = node.meta.get("stack_trace") or ""
        if trace not in self._seen:
            line = source_line(node)
            self._seen[trace] = self.lines.setdefault(line, len(self.lines)) if line else -1
        return self._seen[trace]


def stage(name: str, graph: int, program: Program, sources: Sources, sites: Mapping[str, str]) -> Stage:
    """The facts of a program. `sites` gives the site of a linear by the linear's captured name."""
    nodes = []
    for node in program.graph.nodes:
        nodes.append(
            Node(
                node.name,
                kind_of(node),
                tuple(n.name for n in node.all_input_nodes),
                shape_of(node.meta.get("val")),
                module_of(node),
                sources.index(node),
                code_of(node, program),
                sites.get(node.meta.get(LINEAR) or "", ""),
            )
        )
    return Stage(NAMES[name], graph, tuple(nodes))


def kind_of(node: fx.Node) -> str:
    """The op of a call, else what the node is."""
    if node.op == "call_function":
        return op_name(node) or getattr(node.target, "__name__", str(node.target))
    return {"placeholder": "input", "get_attr": "constant"}.get(node.op, node.op)


def shape_of(value: Any) -> str:
    """`f32[1, 64, 576]`, several with commas between; symbolic sizes by their names."""
    leaves = [v for v in pytree.tree_leaves(value) if v is not None]
    shown = [
        f"{_DTYPES.get(v.dtype, str(v.dtype).removeprefix('torch.'))}[{', '.join(map(str, v.shape))}]"
        if isinstance(v, Tensor) else str(v)
        for v in leaves
    ]  # fmt: skip
    return ", ".join(shown)


def module_of(node: fx.Node) -> str:
    """Dotted path of the innermost module a node comes from; of a parameter, the module that holds it."""
    stack = node.meta.get("nn_module_stack") or {}
    return dotted_path(str(list(stack.values())[-1][0])) if stack else ""


def code_of(node: fx.Node, program: Program) -> str:
    """The node as a line of code, with constants by the names they have in the model."""
    if node.op == "placeholder":
        return f"{node.name} = input"
    if node.op == "get_attr":
        constant = program.constants.get(node)
        return f"{node.name} = {constant.label if constant else node.target}"
    arguments = fx.node.map_arg(node.args, lambda n: _Name(_label(n, program)))
    text = ", ".join([*map(repr, arguments), *(f"{k}={v!r}" for k, v in node.kwargs.items())])
    if node.op == "output":
        return f"return {text}"
    if node.target is operator.getitem:
        return f"{node.name} = {arguments[0]!r}[{arguments[1]!r}]"
    return f"{node.name} = {kind_of(node)}({text})"


def _label(node: fx.Node, program: Program) -> str:
    constant = program.constants.get(node)
    return constant.label if constant else node.name


class _Name(str):
    """Shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


__all__ = ["NAMES", "Sources", "code_of", "kind_of", "module_of", "shape_of", "stage"]
