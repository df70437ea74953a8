"""Quantization per token, plain and with outlier columns split off: one program per row, the row read once.

A row loop (`for start in range(0, K, BLOCK)`) has one trip for rows of up to `MAX_BLOCK` elements; the compiler then
drops the loop and merges the equal loads of its passes, so the row stays in registers. Longer rows are read again.

Maxima are taken on the bits of the floats: non-negative floats are ordered like their bits, and NaN is above all of
them, so that NaN wins as in the reference (a floating-point maximum on the GPU drops it).
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering import numerics
from lowering.ops.quantize import (
    dequantize,
    dequantize_weight,
    outlier_split,
    outlier_split_dynamic,
    quantize_per_token,
    split_quantize,
    split_quantize_dynamic,
)
from lowering.triton.columns import (
    PREPACKED_COLUMNS,
    SEARCH_COLUMNS,
    SEARCH_ROWS,
    Split,
    bits_of,
    inliers,
    outlier_columns,
    programs,
    raise_absmax,
    search,
    search_rows,
    static_split,
    store_gathered,
)
from lowering.triton.launch import (
    Rows,
    as_rows,
    empty,
    follow,
    linked,
    row_block,
    takes_rows,
    traceable,
    wrap_triton,
    writes,
)

# Adding 1.5 * 2^23 leaves the rounded (half to even) value in the low mantissa bits, for |v| < 2^22.
ROUND_MAGIC = tl.constexpr(12582912.0)
ROUND_MAGIC_BITS = tl.constexpr(0x4B400000)
SIGN_BIT = tl.constexpr(-0x80000000)
SMALLEST_ABSMAX = tl.constexpr(numerics.SMALLEST_ABSMAX)
SMALLEST_BITS = tl.constexpr(struct.unpack("<i", struct.pack("<f", numerics.SMALLEST_ABSMAX))[0])


@triton.jit
def round_to_int(v):
    """fp32 to the nearest int32, ties to even, for |v| < 2^22, without a conversion instruction."""
    return (v + ROUND_MAGIC).to(tl.int32, bitcast=True) - ROUND_MAGIC_BITS


@triton.jit
def row_extent(y, SYMMETRIC: tl.constexpr):
    """Bits of (absmax, 0), or of (max(y, 0), -min(y, 0)), over a block of one row."""
    bits = y.to(tl.int32, bitcast=True)
    if SYMMETRIC:
        return tl.max(bits & 0x7FFFFFFF, 0), 0
    # Signed comparison: the bits of a negative float are a negative int.
    return tl.maximum(tl.max(bits, 0), 0), tl.maximum(tl.max(bits ^ SIGN_BIT, 0), 0)


@triton.jit
def row_scale(high, low, SYMMETRIC: tl.constexpr):
    """`row_extent` of a whole row → scale, its inverse, zero point."""
    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(high, SMALLEST_BITS).to(tl.float32, bitcast=True), 127.0)
        return scale, tl.div_rn(1.0, scale), 0
    below = low.to(tl.float32, bitcast=True)
    extent = high.to(tl.float32, bitcast=True) + below
    extent = tl.maximum(extent.to(tl.int32, bitcast=True) & 0x7FFFFFFF, SMALLEST_BITS).to(tl.float32, bitcast=True)
    scale = tl.div_rn(extent, 255.0)
    inverse = tl.div_rn(1.0, scale)
    return scale, inverse, round_to_int(below * inverse - 128.0)


@triton.jit
def encode(y, inverse, zero_point, SYMMETRIC: tl.constexpr):
    """fp32 to int8 codes. |y · inverse| ≤ 127 needs no clamp in the symmetric form."""
    codes = round_to_int(y * inverse)
    if not SYMMETRIC:
        codes = tl.minimum(tl.maximum(codes + zero_point, -128), 127)
    return codes.to(tl.int8)


@writes("codes", "scale", "zero_point", "outliers")
@triton.jit
def _quantize_rows_kernel(
    x, x_stride, marks, codes, scale, zero_point, outliers,
    K: tl.constexpr, R: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    LINKED: tl.constexpr,
):  # fmt: skip
    follow(LINKED)
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * K
    if marks is not None:  # early: loads that wait for one another
        column, taken = outlier_columns(marks, K, R, BLOCK_R)
        value = tl.load(x + column, mask=taken, other=0.0).to(tl.float32)
    high = 0
    low = 0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        above, below = row_extent(inliers(y, marks, cols, cols < K), SYMMETRIC)
        high = tl.maximum(high, above)
        low = tl.maximum(low, below)
    s, inverse, zero = row_scale(high, low, SYMMETRIC)
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        y = inliers(y, marks, cols, cols < K)
        tl.store(codes + cols, encode(y, inverse, zero, SYMMETRIC), mask=cols < K)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)
    if marks is not None:
        store_gathered(outliers + row * R, value, taken, R, BLOCK_R)


@writes("bits")
@triton.jit
def _column_absmax_kernel(
    x, x_stride, bits, floor, M,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Column absmax (see `lowering.triton.columns`), a block of columns and `ROWS` rows to a program."""
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(0).to(tl.int64) * ROWS
    best = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.int32)
    for start in range(0, ROWS, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        y = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        best = tl.maximum(best, bits_of(y))
    raise_absmax(bits, tl.max(best, 0), cols, floor, K)


def row_outputs(like: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point for rows of `like[..., K]`. Symmetric zero points are a fill, dropped if unused."""
    lead = like.shape[:-1]
    codes = torch.empty(like.shape, dtype=torch.int8, device=like.device)
    scale = torch.empty((*lead, 1), dtype=torch.float32, device=like.device)
    make = torch.zeros if symmetric else torch.empty
    return codes, scale, make((*lead, 1), dtype=torch.int32, device=like.device)


def outlier_output(like: Tensor, split: Split, dtype: torch.dtype) -> Tensor:
    """Memory for the outliers `[..., R]`."""
    return torch.empty((*like.shape[:-1], split.count), dtype=dtype, device=like.device)


def _quantize(x: Tensor, rows: Rows, split: Split, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = rows.width
    codes, scale, zero_point = row_outputs(x, symmetric)
    outliers = outlier_output(x, split, x.dtype)
    if not empty(rows.count):
        block, warps = row_block(k)
        wrap_triton(_quantize_rows_kernel)[(rows.count,)](
            rows.data, rows.stride, split.marks, codes, scale,
            None if symmetric else zero_point, outliers if split.count else None,
            K=k, SYMMETRIC=symmetric, BLOCK=block, LINKED=linked(x.device, rows.count), num_warps=warps,
            **split.constants(),
        )  # fmt: skip
    return codes, scale, zero_point, outliers


@quantize_per_token.impl("triton", when=lambda x: takes_rows(x))
@traceable
def quantize_rows(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: scale and codes of each row."""
    return _quantize(x, as_rows(x), Split(), symmetric)[:3]


@split_quantize.impl("triton", when=lambda x: takes_rows(x), prepack=PREPACKED_COLUMNS)
@traceable
def split_quantize_rows(x: Tensor, columns: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_rows` that leaves `columns` out of codes and scale and stores them apart in the same launch."""
    return _quantize(x, as_rows(x), static_split(columns, x.shape[-1]), symmetric)


@split_quantize_dynamic.impl("triton", when=lambda x: takes_rows(x))
@traceable
def split_quantize_rows_dynamic(
    x: Tensor, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Column absmax, choice, quantization in three launches: no host synchronisation."""
    rows = as_rows(x)
    m, k = rows.count, rows.width
    found = search(k, capacity, threshold, x.dtype, x.device)
    blocks = triton.cdiv(k, SEARCH_COLUMNS)
    group = search_rows(m, blocks, SEARCH_ROWS)
    wrap_triton(_column_absmax_kernel)[(programs(m, group), blocks)](
        rows.data, rows.stride, *found.arguments(), m,
        BLOCK_M=SEARCH_ROWS, BLOCK_K=SEARCH_COLUMNS, ROWS=group, num_warps=4, **found.constants(),
    )  # fmt: skip
    split, columns, overflow = found.result()
    return (*_quantize(x, rows, split, symmetric), columns, overflow)


# Left over from the portable form when nothing fused them: plain tensor code, which Inductor compiles to Triton itself.
for _op in (dequantize, dequantize_weight, outlier_split, outlier_split_dynamic):
    _op.impl("triton")(_op.reference)
