"""Match: find the sites.

A *site* is a tensor (the output of a norm, an activation product, any tensor) and all linears that read it: they share
one quantized input, one set of outlier columns, one smoothing vector.

Requires: a normalized program. Ensures: every linear of the graph is a reader of one site or has a `Refusal` with a
reason, the node and the line of the model's source. Does not change the graph.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from int8pass.capture import Program, mutated_values, written_between
from int8pass.graph.constants import Constant
from int8pass.graph.pattern import op_name
from int8pass.recipe import Recipe

Producer = Literal["norm", "gate product", "activation", "tensor"]

VIEWS = {
    "view", "reshape", "_unsafe_view", "transpose", "permute", "t", "unsqueeze", "squeeze", "slice", "select", "expand",
    "alias", "contiguous", "clone", "flatten", "unflatten", "chunk", "split", "getitem", "numpy_T", "index_select",
}  # fmt: skip
_CASTS = {"to", "_to_copy", "type_as"}
ACTIVATIONS = {"silu", "gelu", "relu", "sigmoid", "tanh", "leaky_relu", "elu", "hardswish", "mish", "softplus"}
_POINTWISE_EXIT = ACTIVATIONS | {
    "mul",
    "div",
    "add",
    "sub",
    "neg",
    "softmax",
    "log_softmax",
    "_softmax",
    "_log_softmax",
}
_STACKED = {"bmm", "baddbmm", "_grouped_mm", "matmul", "mm", "addmm", "einsum", "_scaled_grouped_mm"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_HEAD = "the output head stays in its dtype (options={'quantize_head': True} takes it too)"


@dataclass(frozen=True)
class Reader:
    """One linear of a site: `node` is the `aten.linear` call, `path` its module in the user's model."""

    node: fx.Node
    path: str
    weight: Constant
    shape: tuple[int, int]
    """(N, K)"""

    @property
    def bias(self) -> fx.Node | None:
        """The bias argument, if any."""
        return self.node.args[2] if len(self.node.args) > 2 else None  # type: ignore[return-value]


@dataclass(frozen=True)
class Site:
    """A tensor and the linears that read it; `name` is stable across graphs of the same model."""

    name: str
    source: fx.Node
    producer: Producer
    readers: tuple[Reader, ...]

    @property
    def width(self) -> int:
        """K, the channels of the source."""
        return self.readers[0].shape[1]


@dataclass(frozen=True)
class Refusal:
    """A linear that stays as it is, and why."""

    linear: str
    reason: str
    node: fx.Node
    asked: bool = False
    """The settings ask for it: the output head, a site to keep."""

    @property
    def source(self) -> str:
        """File, line and code of the model, as `file.py:12: return self.fc(x)`; "" when unknown."""
        return source_line(self.node)


@dataclass(frozen=True)
class Matches:
    """The result of the stage."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]


def match(program: Program, recipe: Recipe) -> Matches:
    """All sites of the program under a recipe, and all refusals."""
    mutated = mutated_values(program.graph)
    readers: dict[fx.Node, list[Reader]] = {}
    refusals: list[Refusal] = []
    for node in program.graph.nodes:
        name = op_name(node)
        if (name in _STACKED or "grouped_mm" in name) and _has_constant_operand(node, program):
            reason = "stacked expert weights: one weight of several matrices, chosen per token; not supported yet"
            refusals.append(Refusal(module_path(node), reason, node))
        if name != "linear":
            continue
        refused = _refuse(node, program, recipe, mutated)
        weight = program.constants.get(node.args[1])
        path = _path(node, weight)
        if refused or weight is None:
            reason = refused or "its weight is computed in the graph"
            refusals.append(Refusal(module_path(node) or path, reason, node, asked=refused == _HEAD))
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        readers.setdefault(source, []).append(Reader(node, path, weight, _shape(node)))
    sites = []
    for source, found in readers.items():
        site = Site(found[0].path, source, producer_of(source), tuple(found))
        if recipe.at(site.name).keep:
            refusals += [Refusal(r.path, "kept in its dtype by the recipe", r.node, asked=True) for r in found]
        else:
            sites.append(site)
    return Matches(tuple(sites), tuple(refusals))


def _shape(linear: fx.Node) -> tuple[int, int]:
    n, k = linear.args[1].meta["val"].shape  # type: ignore[union-attr]
    return int(n), int(k)


def _refuse(node: fx.Node, program: Program, recipe: Recipe, mutated: set[fx.Node]) -> str | None:
    """Why this linear cannot or should not be quantized; None when it can."""
    x, weight = node.args[0], node.args[1]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if program.constants.get(weight) is None:
        return f"its weight is no parameter but computed in the graph (by {op_name(weight) or weight.op})"
    value, dtype = weight.meta["val"], node.meta["val"].dtype
    if value.dim() != 2:
        return f"its weight has {value.dim()} dimensions"
    if value.dtype not in _FLOATS or dtype not in _FLOATS:
        return f"its dtype is {value.dtype}; quantized are float32, float16 and bfloat16"
    if x in mutated or (mutated and written_between(x, x.graph.output_node(), of=x)):
        return "its input is written in place in the graph"
    if program.constants.get(x) is not None:
        return "its input is a constant"
    if _feeds(node, "topk"):
        return "a router: its result chooses experts (topk), and a small error changes the choice"
    if not recipe.quantize_head and is_head(node):
        return _HEAD
    return None


def _has_constant_operand(node: fx.Node, program: Program) -> bool:
    """True when an operand of at least two dimensions is a parameter seen through views."""
    for argument in node.args:
        while isinstance(argument, fx.Node) and op_name(argument) in VIEWS | _CASTS | {"index"}:
            argument = argument.args[0]
        if program.constants.get(argument) is not None and argument.meta["val"].dim() >= 2:  # type: ignore[union-attr]
            return True
    return False


def _feeds(node: fx.Node, target: str) -> bool:
    """True when the result reaches `target` through views and pointwise ops."""
    through = VIEWS | _CASTS | _POINTWISE_EXIT
    todo, seen = list(node.users), set()
    while todo:
        user = todo.pop()
        if op_name(user) == target:
            return True
        if user not in seen and (op_name(user) in through or "getitem" in str(user.target)):
            seen.add(user)
            todo.extend(user.users)
    return False


def is_head(node: fx.Node) -> bool:
    """An output head: leaves the graph through views and unary ops only, after other linears, in a width of its own.

    A block's last linear leaves the graph too, but in a width that other linears of the graph read; where the graph
    has an embedding, the width of its vocabulary is a head's all the same.
    """
    linears = [n for n in node.graph.nodes if op_name(n) == "linear"]
    tables = [n.args[0].meta["val"].shape[0] for n in node.graph.nodes if op_name(n) == "embedding"]
    width = node.meta["val"].shape[-1]
    read_elsewhere = any(n.args[1].meta["val"].shape[-1] == width for n in linears)
    if linears[0] is node or (read_elsewhere and width not in tables):
        return False
    todo: list[fx.Node] = [node]
    while todo:
        current = todo.pop()
        for user in current.users:
            if user.op == "output":
                continue
            unary = sum(isinstance(a, fx.Node) and a.op != "get_attr" for a in user.args) == 1
            if not unary or op_name(user) not in VIEWS | _CASTS | _POINTWISE_EXIT:
                return False
            todo.append(user)
    return True


def producer_of(source: fx.Node) -> Producer:
    """What made a tensor, seen through views and casts."""
    while op_name(source) in VIEWS | _CASTS and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    name = op_name(source)
    if name in {"rms_norm", "layer_norm"}:
        return "norm"
    if name in ACTIVATIONS:
        return "activation"
    if name == "mul" and any(op_name(a) in ACTIVATIONS for a in source.args):
        return "gate product"
    return "tensor"


def _path(node: fx.Node, weight: Constant | None) -> str:
    """The path of a linear: its weight's, so that linears of one module differ. An output head's is its module's: the
    name of a weight that it shares with an embedding depends on who captured the model."""
    module = module_path(node)
    if weight is None:
        return module
    path = weight.label.removesuffix(".T").removesuffix(".weight")
    return module if path != module and node.meta.get("nn_module_stack") and is_head(node) else path


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module a node comes from; the node's name when unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return node.name
    return dotted_path(str(list(stack.values())[-1][0])) or node.name


@functools.lru_cache(maxsize=4096)
def dotted_path(expression: str) -> str:
    """`L['self'].model.layers.0.mlp` and `L['self']._modules['model']…` → `model.layers.0.mlp`."""
    if re.fullmatch(r"[\w.]+", expression) and not expression.startswith("L__self"):
        return expression  # torch.export's, which is the path itself
    keys = re.findall(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]", expression)
    return ".".join(key for key in map("".join, keys) if key not in {"_modules", "self", "fn"})


def source_line(node: fx.Node) -> str:
    """The innermost frame of the model's source that made a node."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', node.meta.get("stack_trace") or "")
    own = [f for f in frames if "/torch/" not in f[0]] or frames
    if not own:
        return ""
    file, line, code = own[-1]
    return f"{file}:{line}: {code.strip()}"
