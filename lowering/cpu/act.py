"""Gate products on the CPU: in the linear's own kernel, else in Inductor's loop; our kernel for the quantization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowering.cpu import native
from lowering.cpu.linear import native_arguments, native_linear_w8a8
from lowering.cpu.quantize import quantize_rows, split_rows
from lowering.ops.act import (
    ACTIVATIONS,
    act_mul_quantize,
    act_mul_quantize_dynamic,
    gated_linear_quantize,
    gated_linear_quantize_dynamic,
)
from lowering.ops.linear import linear_w8a8

act_mul_quantize.impl("cpu")(act_mul_quantize.reference)


@act_mul_quantize.impl("cpu", when=lambda gate: native.takes(gate))
def native_act_mul_quantize(
    gate: Tensor, up: Tensor, act: str, columns: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The product as in the reference, then one pass over each row."""
    return quantize_rows(ACTIVATIONS[act](gate) * up, columns, symmetric)


@act_mul_quantize_dynamic.impl("cpu")
def act_mul_then_split_quantize(
    gate: Tensor, up: Tensor, act: str, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The product, then the split of whichever kernel takes it."""
    return split_rows(ACTIVATIONS[act](gate) * up, capacity, threshold, symmetric)


def _gated_linear(*args: Any) -> Tensor:
    """`act(gate) * up` of a linear: in its kernel where that takes it, else from the linear of whichever takes it."""
    *linear, act = args
    chosen = linear_w8a8.choose("cpu", tuple(linear)).function
    if chosen is native_linear_w8a8:
        return native.gated_linear(*native_arguments(*linear), act)
    gate, up = chosen(*linear).chunk(2, -1)
    return ACTIVATIONS[act](gate) * up


@gated_linear_quantize.impl("cpu")
def gated_linear_then_quantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    outliers: Tensor | None,
    outlier_weight: Tensor | None,
    columns: Tensor | None,
    dtype: torch.dtype,
    act: str,
    split_columns: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The product, then one pass over each row."""
    product = _gated_linear(
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype, act
    )
    return quantize_rows(product, split_columns, symmetric)


@gated_linear_quantize_dynamic.impl("cpu")
def gated_linear_then_split_quantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    outliers: Tensor | None,
    outlier_weight: Tensor | None,
    columns: Tensor | None,
    dtype: torch.dtype,
    act: str,
    capacity: int,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The product, then the split of whichever kernel takes it."""
    product = _gated_linear(
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype, act
    )
    return split_rows(product, capacity, threshold, symmetric)
