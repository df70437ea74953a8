"""Norms on the CPU: Inductor's loop for the norm and the residual add, our kernel for the quantization."""

from __future__ import annotations

from torch import Tensor

from lowering.cpu import native
from lowering.cpu.quantize import quantize_rows, split_rows
from lowering.ops import norm

for _op in (norm.rms_norm, norm.norm_quantize, norm.add_norm_quantize):
    _op.impl("cpu")(_op.reference)


@norm.norm_quantize.impl("cpu", when=lambda x: native.takes(x))
def native_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    columns: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm as in the reference, then one pass over each row."""
    return quantize_rows(norm.normalize(x, weight, bias, eps, offset, mode), columns, symmetric)


@norm.add_norm_quantize.impl("cpu", when=lambda x: native.takes(x))
def native_add_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    columns: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum and the norm as in the reference, then one pass over each row."""
    h = x + residual
    return (h, *native_norm_quantize(h, weight, bias, eps, offset, mode, columns, symmetric))


@norm.norm_quantize_dynamic.impl("cpu")
def norm_then_split_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    capacity: int,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The norm, then the split of whichever kernel takes it."""
    return split_rows(norm.normalize(x, weight, bias, eps, offset, mode), capacity, threshold, symmetric)


@norm.add_norm_quantize_dynamic.impl("cpu")
def add_norm_then_split_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    capacity: int,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum and the norm, then the split."""
    h = x + residual
    return (h, *norm_then_split_quantize(h, weight, bias, eps, offset, mode, capacity, threshold, symmetric))
