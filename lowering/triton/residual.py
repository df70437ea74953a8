"""Linears that add the residual before their one rounding: by the Gluon kernels, on Hopper.

The norm that follows then reads one row where it read two and wrote one. With Triton's tiles the norm keeps the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.ops.hilo import linear_w8a8_hilo, linear_w8a8_hilo_add
from lowering.ops.linear import linear_w8a8, linear_w8a8_add
from lowering.triton.choice import fits_w8a8, on_wgmma
from lowering.triton.linear import Hilo, wgmma_product


@linear_w8a8_add.impl("triton", when=fits_w8a8, composed=True)
def linear_w8a8_then_add(
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
    residual: Tensor,
) -> Tensor:
    """The linear in fp32, then the sum."""
    linear = (
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns,
        torch.float32,
    )  # fmt: skip
    y: Tensor = linear_w8a8.choose("triton", linear).function(*linear)
    return (y + residual.float()).to(dtype)


@linear_w8a8_hilo_add.impl("triton", when=fits_w8a8, composed=True)
def linear_w8a8_hilo_then_add(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    high: Tensor,
    blocks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor,
) -> Tensor:
    """The linear in fp32, then the sum."""
    linear = (codes, scale, zero_point, high, blocks, weight, weight_scale, weight_sum, bias, torch.float32)
    y: Tensor = linear_w8a8_hilo.choose("triton", linear).function(*linear)
    return (y + residual.float()).to(dtype)


def _in_epilogue(
    codes: Tensor, weight: Tensor, dtype: torch.dtype, residual: Tensor, outliers: Tensor | None = None,
    columns: Tensor | None = None, outlier_weight: Tensor | None = None,
) -> bool | str:  # fmt: skip
    if residual.dtype != dtype or residual.shape != (*codes.shape[:-1], weight.shape[0]):
        return "takes a residual of the output's dtype and shape"
    return on_wgmma(codes, weight, dtype, outliers, columns, outlier_weight)


@linear_w8a8_add.impl("triton", when=_in_epilogue)
def linear_w8a8_add_wgmma(
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
    residual: Tensor,
) -> Tensor:
    """On Hopper: `lowering.triton.wgmma`."""
    linear = (codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns)
    return wgmma_product(*linear, dtype, residual=residual)


@linear_w8a8_hilo_add.impl("triton", when=_in_epilogue)
def linear_w8a8_hilo_add_wgmma(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    high: Tensor,
    blocks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor,
) -> Tensor:
    """On Hopper: `lowering.triton.wgmma`."""
    linear = (codes, scale, zero_point, weight, weight_scale, weight_sum, bias, None, None, None, dtype)
    return wgmma_product(*linear, hilo=Hilo(high, blocks), residual=residual)
