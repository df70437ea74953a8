"""Linears that add the residual before their one rounding: in the epilogue of the kernel for many rows on Hopper.

The norm that follows then reads one row where it read two and wrote one. Elsewhere there is nothing to gain: few rows
are added in less time than it takes to start a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.ops.hilo import linear_w8a8_hilo, linear_w8a8_hilo_add
from lowering.ops.linear import linear_w8a8, linear_w8a8_add
from lowering.triton.linear import Hilo, fits_w8a8, on_wgmma, wgmma_product


def _fits(codes: Tensor, *rest: object) -> bool | str:
    outliers, dtype = rest[6], rest[9]
    assert isinstance(dtype, torch.dtype)
    return fits_w8a8(codes, outliers, dtype)


def _hilo_fits(codes: Tensor, *rest: object) -> bool | str:
    dtype = rest[8]
    assert isinstance(dtype, torch.dtype)
    return fits_w8a8(codes, None, dtype)


@linear_w8a8_add.impl("triton", when=_fits, composed=True)
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


@linear_w8a8_hilo_add.impl("triton", when=_hilo_fits, composed=True)
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


def _in_epilogue(codes: Tensor, *rest: object) -> bool | str:
    weight, outliers, outlier_weight, columns, dtype, residual = rest[2], *rest[6:]
    assert isinstance(residual, Tensor)
    if residual.dtype != dtype:
        return "takes a residual of the output's dtype"
    return on_wgmma(codes, weight, outliers, columns, outlier_weight, dtype)  # type: ignore[arg-type]


def _hilo_in_epilogue(codes: Tensor, *rest: object) -> bool | str:
    weight, dtype, residual = rest[4], rest[8], rest[9]
    assert isinstance(residual, Tensor)
    if residual.dtype != dtype:
        return "takes a residual of the output's dtype"
    return on_wgmma(codes, weight, None, None, None, dtype)  # type: ignore[arg-type]


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
    """On Hopper, from 17 rows on: `lowering.triton.wgmma`."""
    linear = (codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns)
    return wgmma_product(*linear, dtype, residual=residual)


@linear_w8a8_hilo_add.impl("triton", when=_hilo_in_epilogue)
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
    """On Hopper, from 17 rows on: `lowering.triton.wgmma`."""
    linear = (codes, scale, zero_point, weight, weight_scale, weight_sum, bias, None, None, None, dtype)
    return wgmma_product(*linear, hilo=Hilo(high, blocks), residual=residual)
