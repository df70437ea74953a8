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
from lowering.triton.launch import Rows, as_rows, empty, row_block, takes_rows, traceable, wrap_triton

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
    return tl.max(tl.maximum(bits, 0), 0), tl.max(tl.maximum(bits ^ SIGN_BIT, 0), 0)


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


@triton.jit
def drop_columns(y, removed, cols, mask):
    """`y` with 0 in the columns that `removed` marks."""
    if removed is not None:
        y = tl.where(tl.load(removed + cols, mask=mask, other=0) != 0, 0.0, y)
    return y


@triton.jit
def _quantize_rows_kernel(
    x, x_stride, removed, columns, taken, codes, scale, zero_point, outliers,
    K: tl.constexpr, R: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * K
    high = 0
    low = 0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        above, below = row_extent(drop_columns(y, removed, cols, cols < K), SYMMETRIC)
        high = tl.maximum(high, above)
        low = tl.maximum(low, below)
    s, inverse, zero = row_scale(high, low, SYMMETRIC)
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        y = drop_columns(y, removed, cols, cols < K)
        tl.store(codes + cols, encode(y, inverse, zero, SYMMETRIC), mask=cols < K)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)
    if R > 0:
        r = tl.arange(0, BLOCK_R)
        column = tl.load(columns + r, mask=r < R, other=0)
        value = tl.load(x + column, mask=r < R, other=0.0)
        if taken is not None:
            value = tl.where(tl.load(taken + r, mask=r < R, other=0) != 0, value, 0.0)
        tl.store(outliers + row * R + r, value, mask=r < R)


@triton.jit
def _column_absmax_kernel(
    x, x_stride, absmax, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Bits of |x|'s maximum per column, joined across programs by an integer atomic: exact in any order."""
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(0).to(tl.int64) * ROWS
    best = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.int32)
    for start in range(0, tl.minimum(M - first, ROWS), BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        y = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        best = tl.maximum(best, y.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.atomic_max(absmax + cols, tl.max(best, 0), mask=cols < K, sem="relaxed")


def removed_columns(width: int, columns: Tensor, taken: Tensor | None = None) -> Tensor:
    """int8 `[width]`, 1 where a column is split off: what the row kernels test instead of searching `columns`."""
    value = torch.ones_like(columns, dtype=torch.int8) if taken is None else taken.to(torch.int8)
    return torch.zeros(width, dtype=torch.int8, device=columns.device).scatter(0, columns, value)


def row_outputs(like: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point for rows of `like[..., K]`. Symmetric zero points are a fill, dropped if unused."""
    lead = like.shape[:-1]
    codes = torch.empty(like.shape, dtype=torch.int8, device=like.device)
    scale = torch.empty((*lead, 1), dtype=torch.float32, device=like.device)
    make = torch.zeros if symmetric else torch.empty
    return codes, scale, make((*lead, 1), dtype=torch.int32, device=like.device)


def _quantize(
    x: Tensor, rows: Rows, removed: Tensor | None, columns: Tensor | None, taken: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = rows.width
    r = 0 if columns is None else columns.shape[0]
    codes, scale, zero_point = row_outputs(x, symmetric)
    outliers = torch.empty((*x.shape[:-1], r), dtype=x.dtype, device=x.device)
    if not empty(rows.count):
        block, warps = row_block(k)
        wrap_triton(_quantize_rows_kernel)[(rows.count,)](
            rows.data, rows.stride, removed, columns, taken, codes, scale,
            None if symmetric else zero_point, outliers if r else None,
            K=k, R=r, SYMMETRIC=symmetric, BLOCK=block, BLOCK_R=triton.next_power_of_2(max(r, 1)), num_warps=warps,
        )  # fmt: skip
    return codes, scale, zero_point, outliers


def _split_columns(columns: Tensor) -> Tensor | None:
    return columns.contiguous() if columns.shape[0] else None


@quantize_per_token.impl("triton", when=lambda x, symmetric: takes_rows(x))
@traceable
def quantize_rows(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: scale and codes of each row."""
    return _quantize(x, as_rows(x), None, None, None, symmetric)[:3]


@split_quantize.impl("triton", when=lambda x, columns, symmetric: takes_rows(x))
@traceable
def split_quantize_rows(x: Tensor, columns: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_rows` that leaves `columns` out of codes and scale and gathers them in the same launch."""
    taken = _split_columns(columns)
    removed = None if taken is None else removed_columns(x.shape[-1], taken)
    return _quantize(x, as_rows(x), removed, taken, None, symmetric)


@split_quantize_dynamic.impl("triton", when=lambda x, capacity, threshold, symmetric: takes_rows(x))
@traceable
def split_quantize_rows_dynamic(
    x: Tensor, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Column absmax in one launch, `torch.topk` on the device, then `split_quantize_rows`: no host synchronisation."""
    rows = as_rows(x)
    m, k = rows.count, rows.width
    bits = torch.zeros(k, dtype=torch.int32, device=x.device)
    if not empty(m):
        block_k, group = 128, 256
        grid = ((m + group - 1) // group, triton.cdiv(k, block_k))
        wrap_triton(_column_absmax_kernel)[grid](
            rows.data, rows.stride, bits, m, k, BLOCK_M=16, BLOCK_K=block_k, ROWS=group, num_warps=4
        )
    # In the dtype of `x` (exact): equal values are frequent there, and `topk` orders them by an algorithm per dtype.
    absmax = bits.view(torch.float32).to(x.dtype)
    values, columns = torch.topk(absmax, min(capacity, k))
    taken = values > threshold if threshold > 0.0 else torch.ones_like(columns, dtype=torch.bool)
    overflow = ((absmax > threshold).sum() - taken.sum()).to(torch.int32)
    if threshold <= 0.0:
        overflow = torch.zeros_like(overflow)
    removed = removed_columns(k, columns, taken)
    return (*_quantize(x, rows, removed, columns, taken.to(torch.int8), symmetric), columns, overflow)


# Left over from the portable form when nothing fused them: plain tensor code, which Inductor compiles to Triton itself.
for _op in (dequantize, dequantize_weight, outlier_split, outlier_split_dynamic):
    _op.impl("triton")(_op.reference)
