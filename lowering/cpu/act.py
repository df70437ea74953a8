"""Gate products on the CPU: Inductor's loop for the product, our kernel for the quantization."""

from __future__ import annotations

from torch import Tensor

from lowering.cpu import native
from lowering.cpu.quantize import native_rows
from lowering.ops.act import (
    ACTIVATIONS,
    act_mul_quantize,
    act_mul_quantize_dynamic,
    gated_linear_quantize,
    gated_linear_quantize_dynamic,
)
from lowering.ops.quantize import split_quantize_dynamic

# The gated linears are for GPUs: the pass does not fuse that far on the CPU.
for _op in (act_mul_quantize, gated_linear_quantize, gated_linear_quantize_dynamic):
    _op.impl("cpu")(_op.reference)


@act_mul_quantize.impl("cpu", when=lambda gate, *rest: native.takes(gate))
def native_act_mul_quantize(
    gate: Tensor, up: Tensor, act: str, columns: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The product as in the reference, then one pass over each row."""
    return native_rows(ACTIVATIONS[act](gate) * up, columns, symmetric)


@act_mul_quantize_dynamic.impl("cpu")
def act_mul_then_split_quantize(
    gate: Tensor, up: Tensor, act: str, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The product, then the split of whichever kernel takes it."""
    args = (ACTIVATIONS[act](gate) * up, capacity, threshold, symmetric)
    return split_quantize_dynamic.choose("cpu", args).function(*args)
