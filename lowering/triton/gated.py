"""The first half of a gated MLP: gate and up projection, activation, product, quantization for the down projection.

With many rows on Hopper the product of the halves is made in the linear's epilogue, and their 2N values per row never
reach memory. Elsewhere the linear and the row kernel of `lowering.triton.act` follow each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.ops.act import gated_linear_quantize, gated_linear_quantize_dynamic
from lowering.ops.linear import linear_w8a8
from lowering.registry import Prepack
from lowering.triton.act import CODE, act_mul_quantize_rows, act_mul_quantize_rows_dynamic
from lowering.triton.choice import fills_hopper, fits_w8a8
from lowering.triton.columns import PREPACKED_COLUMNS
from lowering.triton.linear import wgmma_product
from lowering.triton.quantize import quantize_rows, split_quantize_rows, split_quantize_rows_dynamic

# Activations that the epilogue knows: it has no error function.
IN_EPILOGUE = ("silu", "gelu_tanh", "relu", "sigmoid")
PREPACKED = Prepack("split_columns", PREPACKED_COLUMNS.compute, lambda weight: (weight.shape[0] // 2,))


def fits_gated(
    codes: Tensor, weight: Tensor, dtype: torch.dtype, act: str, outliers: Tensor | None = None
) -> bool | str:
    """Whether the linear and then the row kernel take these operands."""
    if act not in CODE:
        return f"activation {act!r} is none of {', '.join(CODE)}"
    if weight.shape[0] < 2:
        return "takes at least one channel of each half"
    return fits_w8a8(codes, dtype, outliers)


def gated_on_wgmma(
    codes: Tensor, weight: Tensor, dtype: torch.dtype, act: str, outliers: Tensor | None = None,
    columns: Tensor | None = None, outlier_weight: Tensor | None = None,
) -> bool | str:  # fmt: skip
    """Whether the linear makes the product in its epilogue."""
    if act not in IN_EPILOGUE:
        return f"takes {', '.join(IN_EPILOGUE)}"
    if weight.shape[0] % 32:
        return "takes halves in multiples of 16 channels"
    return fills_hopper(codes, weight, dtype, outliers, columns, outlier_weight)


@gated_linear_quantize.impl("triton", when=fits_gated, prepack=PREPACKED)
def gated_linear_then_rows(
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
    """The linear, then the row kernel."""
    linear = (
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype
    )  # fmt: skip
    gate, up = linear_w8a8.choose("triton", linear).function(*linear).chunk(2, -1)
    return act_mul_quantize_rows(gate, up, act, split_columns, symmetric)


@gated_linear_quantize_dynamic.impl("triton", when=fits_gated)
def gated_linear_then_rows_dynamic(
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
    """The linear, then the row kernels."""
    linear = (
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype
    )  # fmt: skip
    gate, up = linear_w8a8.choose("triton", linear).function(*linear).chunk(2, -1)
    return act_mul_quantize_rows_dynamic(gate, up, act, capacity, threshold, symmetric)


@gated_linear_quantize.impl("triton", when=gated_on_wgmma, prepack=PREPACKED)
def gated_linear_wgmma(
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
    """The product comes out of the linear."""
    linear = (
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype
    )  # fmt: skip
    product = wgmma_product(*linear, CODE[act])
    if split_columns is None:
        return (*quantize_rows(product, symmetric), product.new_empty((*product.shape[:-1], 0)))
    return split_quantize_rows(product, split_columns, symmetric)


@gated_linear_quantize_dynamic.impl("triton", when=gated_on_wgmma)
def gated_linear_wgmma_dynamic(
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
    """The product comes out of the linear."""
    linear = (
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype
    )  # fmt: skip
    return split_quantize_rows_dynamic(wgmma_product(*linear, CODE[act]), capacity, threshold, symmetric)
