"""int8 × int8 with one weight scale per group of adjacent columns: an int32 accumulator per group, added up in fp32.

A group is one step of the depth loop, so that its scale multiplies a whole tile at a time. The zero point is taken off
each group's sum with the sum of the group's weights, which the tile at hand gives: no second table to read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.ops.linear import linear_w8a8_groups
from lowering.triton.choice import count
from lowering.triton.launch import FLOATS, as_rows, empty, expected_rows, per_row, traceable, wrap_triton, writes
from lowering.triton.linear import GROUP_M, add_outliers, store_tile, tile_position, weight_rows


@writes("out")
@triton.jit
def _linear_w8a8_groups_kernel(
    codes, codes_stride, scale, scale_stride, zero_point, zero_point_stride,
    weight, weight_stride, weight_scale, bias,
    outliers, outlier_stride, outlier_weight, outlier_weight_stride, out, M, N,
    K: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    first_m = (tile_m * BLOCK_M).to(tl.int64)
    first_n = (tile_n * BLOCK_N).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    has_row = rows < M - tile_m * BLOCK_M
    has_col = cols < N - tile_n * BLOCK_N
    depth = tl.arange(0, BLOCK_K)
    a_pointers = codes + first_m * codes_stride + (rows[:, None] * codes_stride + depth[None, :])
    w_pointers = weight + first_n * weight_stride + (cols[:, None] * weight_stride + depth[None, :])
    y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    zero = tl.zeros([BLOCK_M], dtype=tl.int32)
    if zero_point is not None:
        zero = tl.load(zero_point + first_m * zero_point_stride + rows * zero_point_stride, mask=has_row, other=0)
    for index in range(GROUPS):
        inside = (depth < SIZE) & (depth < K - index * SIZE)
        a = tl.load(a_pointers, mask=has_row[:, None] & inside[None, :], other=0)
        w = tl.load(w_pointers, mask=has_col[:, None] & inside[None, :], other=0)
        acc = tl.dot(a, w.T, out_dtype=tl.int32)
        if zero_point is not None:
            acc -= zero[:, None] * tl.sum(w.to(tl.int32), 1)[None, :]
        channel = tl.load(weight_scale + (first_n + cols) * GROUPS + index, mask=has_col, other=0.0)
        y += acc.to(tl.float32) * channel[None, :]
        a_pointers += SIZE
        w_pointers += SIZE
    token = tl.load(scale + first_m * scale_stride + rows * scale_stride, mask=has_row, other=0.0)
    y *= token[:, None]
    if R > 0:
        o_pointers = outliers + first_m * outlier_stride + rows[:, None] * outlier_stride
        ow_pointers = outlier_weight + first_n * outlier_weight_stride + cols[:, None] * outlier_weight_stride
        y = add_outliers(y, o_pointers, ow_pointers, None, has_row, has_col, R, BLOCK_R)
    if bias is not None:
        y += tl.load(bias + first_n + cols, mask=has_col, other=0.0).to(tl.float32)[None, :]
    store_tile(out, y, first_m, first_n, rows, cols, has_row, has_col, N)


def _fits(codes: Tensor, outliers: Tensor | None, dtype: torch.dtype) -> bool | str:
    if dtype not in FLOATS or (outliers is not None and outliers.dtype not in FLOATS):
        return "the Triton kernels take float32, bfloat16 and float16"
    k = codes.shape[-1]
    return (isinstance(k, int) and k > 0) or "the Triton kernels need a last dimension of fixed size, at least 1"


@linear_w8a8_groups.impl("triton", when=_fits)
@traceable
def linear_w8a8_groups_tiles(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    group: int,
    bias: Tensor | None,
    outliers: Tensor | None,
    outlier_weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """One launch; the depth of a tile is the group's size, rounded up to what the tensor cores take."""
    rows = as_rows(codes)
    m, k, n = rows.count, rows.width, weight.shape[0]
    out = torch.empty((*codes.shape[:-1], n), dtype=dtype, device=codes.device)
    if empty(m) or empty(n):
        return out
    weight, scales = weight_rows(weight), per_row(scale, codes)
    zeros = None if zero_point is None else per_row(zero_point, codes)
    r, left = 0, None
    if outliers is not None and outliers.shape[-1] > 0:
        assert outlier_weight is not None
        left, outlier_weight, r = as_rows(outliers), weight_rows(outlier_weight), outliers.shape[-1]
    block_m, block_n = (16, 32) if expected_rows(m) <= 16 else (64, 64)
    wrap_triton(_linear_w8a8_groups_kernel)[(count(m, block_m) * count(n, block_n),)](
        rows.data, rows.stride, scales, scales.stride(0), zeros, 0 if zeros is None else zeros.stride(0),
        weight, weight.stride(0), weight_scale.contiguous(), None if bias is None else bias.contiguous(),
        None if left is None else left.data, 0 if left is None else left.stride,
        outlier_weight if r else None, outlier_weight.stride(0) if r and outlier_weight is not None else 0, out, m, n,
        K=k, R=r, SIZE=group, GROUPS=weight_scale.shape[1], BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=max(32, triton.next_power_of_2(group)), BLOCK_R=16 if r <= 16 else 32, GROUP=GROUP_M,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
