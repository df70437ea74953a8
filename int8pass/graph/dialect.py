"""Contracts: what a program must look like after each stage, checked after each stage.

A broken contract is a bug of the pass, never of the model: it raises `StageError` with stage, node and rule.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, fx

from int8pass.capture import Program
from int8pass.errors import StageError
from int8pass.graph.pattern import op_name

Stage = Literal["captured", "normalized", "portable", "fused"]

PORTABLE_OPS = {
    "quantize_per_token", "quantize_per_tensor", "dequantize", "dequantize_weight", "dequantize_weight_groups",
    "outlier_split", "outlier_split_dynamic",
}  # fmt: skip
FUSED_OPS = {
    "linear_w8a8", "linear_w8a8_groups", "linear_w8a16", "split_quantize", "split_quantize_dynamic", "norm_quantize",
    "add_norm_quantize", "act_mul_quantize", "norm_quantize_dynamic", "add_norm_quantize_dynamic",
    "act_mul_quantize_dynamic", "gated_linear_quantize", "gated_linear_quantize_dynamic", "quantize_hilo",
    "norm_quantize_hilo", "add_norm_quantize_hilo", "act_mul_quantize_hilo", "linear_w8a8_hilo",
    "gated_linear_quantize_hilo", "linear_w8a8_add", "linear_w8a8_hilo_add",
    "linear_w8a16_add",
}  # fmt: skip


def check(program: Program, stage: Stage) -> None:
    """Raise `StageError` when `program` breaks the contract of `stage`."""
    program.graph.lint()
    for node in program.graph.nodes:
        for problem in _problems(node, program, stage):
            raise StageError(f"after {stage}: node {node.name} ({node.target}): {problem}")


def _problems(node: fx.Node, program: Program, stage: Stage) -> Iterator[str]:
    name = op_name(node)
    if node.op in {"call_method", "call_module"} and stage == "captured":
        yield "a method or module call; capture gives ATen calls only"
    if node.op == "get_attr" and program.constants.get(node) is None and not _is_subgraph(node, program):
        yield "reads an attribute that is no constant"
    if node.op == "call_function" and "val" not in node.meta and node.users and node.target is not operator.getitem:
        yield "has no fake value"
    if stage in {"captured", "normalized"} and name in PORTABLE_OPS | FUSED_OPS:
        yield "is quantized too early"
    if stage == "normalized" and name in {"addmm", "mm"} and program.constants.get(node.args[-1]) is not None:
        yield "is a product with a constant weight that is no aten.linear"
    if stage == "portable" and name in FUSED_OPS:
        yield "is a fused op; the portable form has none"
    if stage == "fused" and name in {"dequantize", "dequantize_weight"}:
        yield "is left of the portable form"
    weights = {"dequantize_weight", "dequantize_weight_groups"}
    if name in weights and program.constants.get(node.args[0]) is None:
        yield "reads a weight that is no constant"
    if name in weights:
        codes = node.args[0].meta["val"]  # type: ignore[union-attr]
        if not isinstance(codes, Tensor) or codes.dtype != torch.int8 or not codes.is_contiguous():
            yield "reads codes that are not contiguous int8"


def _is_subgraph(node: fx.Node, program: Program) -> bool:
    return isinstance(getattr(program.gm, str(node.target), None), fx.GraphModule)
