"""Linear layers of int8 rows and int8 weights (W8A8), on tensor cores.

They accumulate in int32 and finish each tile in fp32: zero point, row and channel scale, outlier columns, bias, one
rounding. Tiles of 64 rows and more use Hopper's warpgroup instruction, fewer rows the 16-row one of every chip since
Turing. Rows beyond the last are masked, not clamped to it: programs that all read one row again queue at its place in
the L2 (a clamped decode step took 1.4 times as long).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering import numerics
from lowering.ops.linear import linear_w8a8
from lowering.triton.choice import (
    W8A8_FP32_OUTLIER_TILES,
    W8A8_TILES,
    choose_tile,
    count,
    fits_w8a8,
    measured,
    on_wgmma,
    shared_memory,
)
from lowering.triton.launch import (
    INTERPRETED,
    as_rows,
    empty,
    expected_rows,
    per_row,
    rounded,
    traceable,
    wrap_triton,
    writes,
)
from lowering.triton.tuning import Tile

GROUP_M = 8
# Up to so many rows a program gathers the outlier columns of its weight tile itself, from the L2 it has just filled.
# With more, several programs would gather the same ones: they are gathered once, beforehand.
GATHER_ROWS = 128


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile coordinates of this program: groups of `GROUP` tile rows go through the columns together, for the L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    in_group = GROUP * tiles_n
    first = (program // in_group) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (program % in_group) % size, (program % in_group) // size


@triton.jit
def load_tile(pointers, has_row, inside, EVEN_ROWS: tl.constexpr, EVEN_DEPTH: tl.constexpr):
    """A tile of a row-major operand with zeros where it ends; no mask in a dimension known to be whole."""
    if EVEN_ROWS and EVEN_DEPTH:
        tile = tl.load(pointers)
    elif EVEN_DEPTH:
        tile = tl.load(pointers, mask=has_row[:, None], other=0)
    elif EVEN_ROWS:
        tile = tl.load(pointers, mask=inside[None, :], other=0)
    else:
        tile = tl.load(pointers, mask=has_row[:, None] & inside[None, :], other=0)
    return tile


@triton.jit
def add_product(y, o, w):
    """`y + o @ wᵀ` in fp32."""
    if INTERPRETED or (w.dtype != o.dtype and w.dtype != tl.int8):
        y = tl.dot(o.to(tl.float32), w.to(tl.float32).T, y, input_precision="ieee")
    else:
        y = tl.dot(o, w.to(o.dtype).T, y, input_precision="ieee")
    return y


@triton.jit
def add_outliers(
    y, outliers, right, columns, has_row, has_col, R: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """`y + outliers @ rightᵀ` in fp32, given pointers to rows; of `right` the first R columns, or those listed.

    int8 weights are exact in any float. Of listed columns, which are scattered reads, those are left out that no row of
    the tile has a value in: most places of LLM.int8() are empty in most calls.
    """
    if columns is None:
        for start in range(0, R, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            o = tl.load(outliers + r[None, :], mask=has_row[:, None] & (r < R)[None, :], other=0.0)
            w = tl.load(right + r[None, :], mask=has_col[:, None] & (r < R)[None, :], other=0)
            y = add_product(y, o, w)
    else:
        for start in tl.static_range(0, R, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            o = tl.load(outliers + r[None, :], mask=has_row[:, None] & (r < R)[None, :], other=0.0)
            if tl.max(tl.max((o != 0.0).to(tl.int32), 1), 0) > 0:
                at = tl.load(columns + r, mask=r < R, other=0).to(tl.int32)
                w = tl.load(right + at[None, :], mask=has_col[:, None] & (r < R)[None, :], other=0)
                y = add_product(y, o, w)
    return y


@triton.jit
def either(a, b):
    """Bits of either."""
    return a | b


@triton.jit
def add_high(
    acc, high, weight, weight_stride, used, rows, cols, has_row, has_col,
    K: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`acc + 256 · high @ weightᵀ` over the blocks of `WIDTH` columns that some row uses (`lowering.ops.hilo`).

    One loop over the blocks in use, without a branch in it, so that loads of several blocks are under way together.
    """
    left = tl.reduce(used, 0, either)
    blocks = tl.sum((left >> tl.arange(0, 32)) & 1, 0)
    if blocks != 0:
        STEP: tl.constexpr = min(BLOCK_K, WIDTH)
        STEPS: tl.constexpr = WIDTH // STEP
        depth = tl.arange(0, STEP)
        a_pointers = high + (rows[:, None] * K + depth[None, :])
        w_pointers = weight + (cols[:, None] * weight_stride + depth[None, :])
        total = tl.zeros_like(acc)
        for step in range(blocks * STEPS):
            lowest = left & -left
            # Which bit it is, says the exponent of its float (of bit 31, which is negative, too).
            block = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
            start = block * WIDTH + step % STEPS * STEP
            inside = depth < K - start
            a = load_tile(a_pointers + start, has_row, inside, False, K % WIDTH == 0)
            w = load_tile(w_pointers + start, has_col, inside, False, K % WIDTH == 0)
            total = tl.dot(a, w.T, total, out_dtype=tl.int32)
            left = tl.where(step % STEPS == STEPS - 1, left ^ lowest, left)
        acc += total << 8
    return acc


@triton.jit
def store_tile(out, y, first_m, first_n, rows, cols, has_row, has_col, N):
    """Round a tile once and write the part of it that exists."""
    pointers = out + first_m * N + first_n + (rows[:, None] * N + cols[None, :])
    tl.store(pointers, rounded(y, out.dtype.element_ty), mask=has_row[:, None] & has_col[None, :])


@writes("out")
@triton.jit
def _linear_w8a8_kernel(
    codes, codes_stride, scale, scale_stride, zero_point, zero_point_stride,
    weight, weight_stride, weight_scale, weight_sum, bias,
    outliers, outlier_stride, outlier_weight, outlier_weight_stride, columns, high, blocks, out, M, N,
    K: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, HIGH_WIDTH: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    # int64 for the tile's corner only (large tensors exceed 2^31 elements); offsets inside a tile fit int32.
    first_m = (tile_m * BLOCK_M).to(tl.int64)
    first_n = (tile_n * BLOCK_N).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    has_row = rows < M - tile_m * BLOCK_M
    has_col = cols < N - tile_n * BLOCK_N
    depth = tl.arange(0, BLOCK_K)
    a_pointers = codes + first_m * codes_stride + (rows[:, None] * codes_stride + depth[None, :])
    w_pointers = weight + first_n * weight_stride + (cols[:, None] * weight_stride + depth[None, :])
    used = 0
    if high is not None:  # early: it takes as long as the first weights
        used = tl.load(blocks + first_m + rows, mask=has_row, other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        a = load_tile(a_pointers, has_row, depth < K - start, False, K % BLOCK_K == 0)
        w = load_tile(w_pointers, has_col, depth < K - start, EVEN_N, K % BLOCK_K == 0)
        acc = tl.dot(a, w.T, acc, out_dtype=tl.int32)
        a_pointers += BLOCK_K
        w_pointers += BLOCK_K
    if high is not None:
        acc = add_high(
            acc, high + first_m * K, weight + first_n * weight_stride, weight_stride, used, rows, cols, has_row,
            has_col, K, BLOCK_K, HIGH_WIDTH,
        )  # fmt: skip
    if zero_point is not None:
        zero = tl.load(zero_point + first_m * zero_point_stride + rows * zero_point_stride, mask=has_row, other=0)
        acc -= zero[:, None] * tl.load(weight_sum + first_n + cols, mask=has_col, other=0)[None, :]
    channel = tl.load(weight_scale + first_n + cols, mask=has_col, other=0.0)[None, :]
    token = tl.load(scale + first_m * scale_stride + rows * scale_stride, mask=has_row, other=0.0)
    y = acc.to(tl.float32) * token[:, None]
    if R == 0:
        y *= channel
    else:
        o_pointers = outliers + first_m * outlier_stride + rows[:, None] * outlier_stride
        right = outlier_weight + first_n * outlier_weight_stride + cols[:, None] * outlier_weight_stride
        if outlier_weight.dtype.element_ty == tl.int8:
            # Both parts share the channel's scale.
            y = add_outliers(y, o_pointers, right, columns, has_row, has_col, R, BLOCK_R) * channel
        else:
            y = add_outliers(y * channel, o_pointers, right, columns, has_row, has_col, R, BLOCK_R)
    if bias is not None:
        y += tl.load(bias + first_n + cols, mask=has_col, other=0.0).to(tl.float32)[None, :]
    store_tile(out, y, first_m, first_n, rows, cols, has_row, has_col, N)


def weight_rows(weight: Tensor) -> Tensor:
    return weight if weight.stride(-1) == 1 else weight.contiguous()


class Hilo(NamedTuple):
    """What `lowering.ops.hilo` adds to int8 codes: their high halves `[..., K]`, and which blocks have some."""

    high: Tensor
    blocks: Tensor


@linear_w8a8.impl("triton", when=fits_w8a8)
@traceable
def linear_w8a8_tiles(
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
) -> Tensor:
    """One launch: int32 product and everything after it."""
    return tiles_product(
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype
    )


def tiles_product(
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
    hilo: Hilo | None = None,
) -> Tensor:
    """The linear in Triton's tiles, of codes with outlier columns or with high halves."""
    rows = as_rows(codes)
    m, k, n = rows.count, rows.width, weight.shape[0]
    out = torch.empty((*codes.shape[:-1], n), dtype=dtype, device=codes.device)
    if empty(m) or empty(n):
        return out
    weight, scales = weight_rows(weight), per_row(scale, codes)
    zeros = sums = None
    if zero_point is not None:
        assert weight_sum is not None
        zeros, sums = per_row(zero_point, codes), weight_sum.contiguous()
    r, tiles, left = 0, W8A8_TILES, None
    if outliers is not None and outliers.shape[-1] > 0:
        if columns is not None and expected_rows(m) > GATHER_ROWS:
            outlier_weight, columns = weight.index_select(1, columns), None
        elif columns is not None:
            outlier_weight = weight
        assert outlier_weight is not None
        left, outlier_weight, r = as_rows(outliers), weight_rows(outlier_weight), outliers.shape[-1]
        if torch.float32 in (outliers.dtype, outlier_weight.dtype):
            tiles = W8A8_FP32_OUTLIER_TILES
    found = measured(codes.device, expected_rows(m), n, k) if tiles is W8A8_TILES else None
    if not isinstance(found, Tile):
        found = choose_tile(tiles, expected_rows(m), n, k, (1, 1), shared_memory(codes.device))
    tile = found
    if hilo is not None and tile.m * tile.n > 64 * 128:
        tile = replace(tile, warps=8)  # its two sums are too much for the registers of four
    wrap_triton(_linear_w8a8_kernel)[(count(m, tile.m) * count(n, tile.n),)](
        rows.data, rows.stride, scales, scales.stride(0), zeros, 0 if zeros is None else zeros.stride(0),
        weight, weight.stride(0), weight_scale.contiguous(), sums, None if bias is None else bias.contiguous(),
        None if left is None else left.data, 0 if left is None else left.stride,
        outlier_weight if r else None, outlier_weight.stride(0) if r and outlier_weight is not None else 0,
        columns if r else None,
        None if hilo is None else hilo.high.contiguous(),
        None if hilo is None else per_row(hilo.blocks, codes).contiguous(), out, m, n,
        K=k, R=r, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, BLOCK_R=16 if r <= 16 else 32, GROUP=GROUP_M,
        EVEN_N=n % tile.n == 0, HIGH_WIDTH=numerics.block_width(k), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def wgmma_product(
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
    act: int = -1,
    hilo: Hilo | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The linear by asynchronous `wgmma`, plus a residual; with `act` the gated product of its halves."""
    from lowering.triton.wgmma import linear_wgmma

    right = outlier_weight if columns is None else weight.index_select(1, columns).to(dtype)
    result: Tensor = linear_wgmma(
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers,
        None if outliers is None else right, columns is not None, None if hilo is None else hilo.high,
        None if hilo is None else hilo.blocks, residual, dtype, act,
    )  # fmt: skip
    return result


@linear_w8a8.impl("triton", when=on_wgmma)
def linear_w8a8_wgmma(
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
) -> Tensor:
    """On Hopper: `lowering.triton.wgmma`."""
    return wgmma_product(
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype
    )
