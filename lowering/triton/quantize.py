"""Quantization per token, plain and with outlier columns split off: one program per row, the row read once.

A row loop (`for start in range(0, K, BLOCK)`) has one trip for rows of up to `MAX_BLOCK` elements; the compiler then
drops the loop and merges the equal loads of its passes, so the row stays in registers. Longer rows are read again.

Outlier columns reach a row kernel as slots: for every channel 0, or which place among the outliers it takes. So a row
that is in registers leaves them out and writes them elsewhere without reading anything twice.

Maxima are taken on the bits of the floats: non-negative floats are ordered like their bits, and NaN is above all of
them, so that NaN wins as in the reference (a floating-point maximum on the GPU drops it).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

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
from lowering.registry import Prepack
from lowering.triton.launch import (
    MAX_BLOCK,
    Rows,
    as_rows,
    empty,
    expected_rows,
    rounded,
    row_block,
    takes_rows,
    traceable,
    wrap_triton,
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
def inliers(y, slot):
    """`y` with 0 in the channels that are outliers.

    A slot is 0 for a channel that stays, s + 1 for outlier s, -(s + 1) for one that stays and leaves place s empty.
    """
    return tl.where(slot > 0, 0.0, y)


@triton.jit
def scatter_outliers(outliers, y, slot):
    """Write the outliers of one row from its channels, given a pointer to its `[R]`; empty places become 0."""
    value = rounded(tl.where(slot > 0, y, 0.0), outliers.dtype.element_ty)
    tl.store(outliers + tl.abs(slot) - 1, value, mask=slot != 0)


@triton.jit
def outlier_columns(slots, K: tl.constexpr, R: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_R: tl.constexpr):
    """Columns of the places of `[K + R]` slots, and which places are taken."""
    r = tl.arange(0, BLOCK_R)
    column = tl.load(slots + K + r, mask=r < R, other=0).to(tl.int32)
    taken = r < R
    if THRESHOLD:
        taken = taken & (tl.load(slots + column, mask=taken, other=0) > 0)
    return column, taken


@triton.jit
def store_gathered(outliers, value, taken, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Write the outliers of one row, computed again for these few columns: cheaper than to move them between threads
    through shared memory, as long as the choice of columns is in memory."""
    r = tl.arange(0, BLOCK_R)
    tl.store(outliers + r, rounded(tl.where(taken, value, 0.0), outliers.dtype.element_ty), mask=r < R)


@triton.jit
def choose_slots(bits, threshold, R: tl.constexpr, LOW: tl.constexpr, THRESHOLD: tl.constexpr):
    """Slots of the `R` channels of largest absmax, given its bits (-1: no channel). Equal ones: the first come first.

    The R-th largest value is found two bits at a time, down to bit `LOW`, below which the bits of a narrower float are
    0. How many channels reach each of three candidates is counted in one sum: no count needs more than 16 bits.
    Also returned: how many channels exceed the threshold and found no place.
    """
    least = 0
    for step in tl.static_range(0, 31 - LOW, 2):
        shift = 29 - step
        if shift < LOW:  # an odd number of bits: one is asked twice, and the largest candidate reached is right
            shift = LOW
        first, second, third = least | (1 << shift), least | (2 << shift), least | (3 << shift)
        reached = (bits >= first).to(tl.int64) + ((bits >= second).to(tl.int64) << 16)
        reached = tl.sum(reached + ((bits >= third).to(tl.int64) << 32), 0)
        least = tl.maximum(least, tl.where((reached & 0xFFFF) >= R, first, 0))
        least = tl.maximum(least, tl.where(((reached >> 16) & 0xFFFF) >= R, second, 0))
        least = tl.maximum(least, tl.where((reached >> 32) >= R, third, 0))
    above = (bits > least).to(tl.int32)
    equal = (bits == least).to(tl.int32)
    places = R - tl.sum(above, 0)
    # Both running counts in one scan: neither reaches 2^16.
    counts = tl.cumsum(above | (equal << 16), 0)
    selected = (above > 0) | ((equal > 0) & ((counts >> 16) <= places))
    slot = tl.where(selected, (counts & 0xFFFF) + tl.minimum(counts >> 16, places), 0)
    overflow = 0
    if THRESHOLD:
        # NaN is no outlier: it stays, and makes the scale NaN.
        large = (bits >= 0) & (bits.to(tl.float32, bitcast=True) > threshold)
        overflow = tl.sum((large & (slot == 0)).to(tl.int32), 0)
        slot = tl.where(large, slot, -slot)
    return slot, overflow


@triton.jit
def store_choice(slot, overflow_count, columns, overflow, cols):
    """Columns of the slots (0 for an empty one, which has no outliers) and the count of those without a place."""
    tl.store(columns + tl.abs(slot) - 1, tl.where(slot > 0, cols, 0).to(tl.int64), mask=slot != 0)
    tl.store(overflow, overflow_count)


@triton.jit
def _choose_columns_kernel(
    bits, slots, columns, overflow, threshold,
    K: tl.constexpr, R: tl.constexpr, LOW: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    slot, count = choose_slots(tl.load(bits + cols, mask=cols < K, other=-1), threshold, R, LOW, THRESHOLD)
    tl.store(slots + cols, slot.to(slots.dtype.element_ty), mask=cols < K)
    tl.store(slots + K + tl.abs(slot) - 1, cols.to(slots.dtype.element_ty), mask=slot != 0)
    store_choice(slot, count, columns, overflow, cols)


@triton.jit
def first_slots(
    bits, columns, overflow, threshold, K: tl.constexpr, R: tl.constexpr, LOW: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Slots of the first block, chosen from `bits` by every program on its own (few rows: that saves a launch), the
    first one storing the choice; without `bits` all 0."""
    cols = tl.arange(0, BLOCK)
    if bits is None:
        slot = tl.zeros([BLOCK], tl.int32)
    else:
        slot, count = choose_slots(tl.load(bits + cols, mask=cols < K, other=-1), threshold, R, LOW, THRESHOLD)
        if tl.program_id(0) == 0:
            store_choice(slot, count, columns, overflow, cols)
    return slot


@triton.jit
def slots_at(slots, first, cols, mask):
    """Slots of the channels `cols`: stored ones, else those of the first and only block."""
    if slots is None:
        slot = first
    else:
        slot = tl.load(slots + cols, mask=mask, other=0).to(tl.int32)
    return slot


@triton.jit
def _quantize_rows_kernel(
    x, x_stride, slots, bits, columns, overflow, threshold, codes, scale, zero_point, outliers,
    K: tl.constexpr, R: tl.constexpr, SYMMETRIC: tl.constexpr, LOW: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * K
    first = first_slots(bits, columns, overflow, threshold, K, R, LOW, THRESHOLD, BLOCK)
    if slots is not None:  # early: loads that wait for one another
        column, taken = outlier_columns(slots, K, R, THRESHOLD, BLOCK_R)
        value = tl.load(x + column, mask=taken, other=0.0).to(tl.float32)
        store_gathered(outliers + row * R, value, taken, R, BLOCK_R)
    high = 0
    low = 0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        above, below = row_extent(inliers(y, slots_at(slots, first, cols, cols < K)), SYMMETRIC)
        high = tl.maximum(high, above)
        low = tl.maximum(low, below)
    s, inverse, zero = row_scale(high, low, SYMMETRIC)
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        slot = slots_at(slots, first, cols, cols < K)
        tl.store(codes + cols, encode(inliers(y, slot), inverse, zero, SYMMETRIC), mask=cols < K)
        if bits is not None:
            scatter_outliers(outliers + row * R, y, slot)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)


@triton.jit
def bits_of(y):
    """Bits of |y|: ordered like the values, NaN above all."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def raise_absmax(absmax, best, mask):
    """Join the maxima of this program, exact in any order; no atomic where another program was as high before."""
    now = tl.load(absmax, mask=mask, other=0, cache_modifier=".cg")
    tl.atomic_max(absmax, best, mask=mask & (best > now), sem="relaxed")


@triton.jit
def _column_absmax_kernel(
    x, x_stride, absmax, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Bits of |x|'s maximum per column, joined across programs by an integer atomic: exact in any order."""
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(0).to(tl.int64) * ROWS
    best = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.int32)
    for start in range(0, ROWS, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        y = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        best = tl.maximum(best, bits_of(y))
    raise_absmax(absmax + cols, tl.max(best, 0), cols < K)


# Rows and columns of one step of a column search. A program takes as many steps as leave about four programs to each
# of 132 multiprocessors.
SEARCH_ROWS, SEARCH_COLUMNS, SEARCH_PROGRAMS = 8, 512, 528
# With whole rows to a program, two: every program has as many atomics as columns.
ROW_PROGRAMS = 264
# Up to so many rows, of up to so many channels, every program of a row kernel chooses the columns itself.
FEW_ROWS, FEW_COLUMNS = 64, 8192


def search_rows(m: Any, column_blocks: int, step: int, programs: int = SEARCH_PROGRAMS) -> int:
    """Rows that one program of a column search reads, a multiple of `step`."""
    steps = -(-expected_rows(m) * column_blocks // (programs * step))
    return step * triton.next_power_of_2(max(1, steps))


@dataclass(frozen=True)
class Split:
    """How outliers leave the rows: `slots` stored beforehand, or `bits` of the absmax to choose them from."""

    count: int = 0
    slots: Tensor | None = None
    bits: Tensor | None = None
    columns: Tensor | None = None
    overflow: Tensor | None = None
    threshold: float = 0.0
    low: int = 0

    def arguments(self) -> tuple[Any, ...]:
        """The leading run-time arguments of the row kernels."""
        return self.slots, self.bits, self.columns, self.overflow, self.threshold

    def constants(self) -> dict[str, Any]:
        """Their constants."""
        block = triton.next_power_of_2(max(1, self.count))
        return {"R": self.count, "LOW": self.low, "THRESHOLD": self.threshold > 0.0, "BLOCK_R": block}


def column_slots(columns: Tensor, width: int) -> Tensor:
    """Outlier columns `[R]` → `[K + R]` int16 (int32 for wide inputs): the slot of every channel, then the columns."""
    dtype = torch.int16 if width + columns.shape[0] < 2**15 else torch.int32
    places = torch.arange(1, columns.shape[0] + 1, dtype=dtype, device=columns.device)
    slots = torch.zeros(width, dtype=dtype, device=columns.device).scatter(0, columns, places)
    return torch.cat([slots, columns.to(dtype)])


# The lowered graph reads slots made once, instead of making them in every call.
PREPACKED_COLUMNS = Prepack("columns", column_slots, lambda *args: (args[0].shape[-1],))


def static_split(columns: Tensor | None, width: int) -> Split:
    """For given columns, as they are or prepacked."""
    if columns is None or columns.shape[0] == 0:
        return Split()
    slots = column_slots(columns, width) if columns.dtype == torch.int64 else columns
    return Split(slots.shape[0] - width, slots)


def dynamic_split(bits: Tensor, m: Any, capacity: int, threshold: float, dtype: torch.dtype) -> Split:
    """For the columns of largest absmax, given its bits `[K]`; `dtype` is that of the values."""
    k = bits.shape[0]
    r = min(capacity, k)
    columns = torch.empty(r, dtype=torch.int64, device=bits.device)
    overflow = torch.empty(1, dtype=torch.int32, device=bits.device)  # of no dimension, Inductor would fill it
    low = {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)
    if k > MAX_BLOCK:
        return _split_by_topk(bits, r, threshold)
    if isinstance(m, int) and 0 < m <= FEW_ROWS and k <= FEW_COLUMNS:
        return Split(r, None, bits, columns, overflow, threshold, low)
    slots = torch.empty(k + r, dtype=torch.int16, device=bits.device)
    wrap_triton(_choose_columns_kernel)[(1,)](
        bits, slots, columns, overflow, threshold,
        K=k, R=r, LOW=low, THRESHOLD=threshold > 0.0, BLOCK=triton.next_power_of_2(k),
        num_warps=max(1, min(32, triton.next_power_of_2(k) // 256)),
    )  # fmt: skip
    return Split(r, slots, None, columns, overflow, threshold, low)


def _split_by_topk(bits: Tensor, r: int, threshold: float) -> Split:
    """Rows too long for one block: PyTorch's search."""
    absmax = bits.view(torch.float32)
    values, columns = torch.topk(absmax, r)
    taken = values > threshold if threshold > 0.0 else torch.ones_like(columns, dtype=torch.bool)
    places = torch.arange(1, r + 1, dtype=torch.int32, device=bits.device)
    slots = torch.zeros_like(bits).scatter(0, columns, torch.where(taken, places, -places))
    slots = torch.cat([slots, columns.to(torch.int32)])
    overflow = ((absmax > threshold).sum() - taken.sum()).to(torch.int32).view(1) * int(threshold > 0.0)
    return Split(r, slots, None, torch.where(taken, columns, 0), overflow, threshold)


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
            rows.data, rows.stride, *split.arguments(), codes, scale,
            None if symmetric else zero_point, outliers if split.count else None,
            K=k, SYMMETRIC=symmetric, BLOCK=block, num_warps=warps, **split.constants(),
        )  # fmt: skip
    return codes, scale, zero_point, outliers


@quantize_per_token.impl("triton", when=lambda x, symmetric: takes_rows(x))
@traceable
def quantize_rows(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: scale and codes of each row."""
    return _quantize(x, as_rows(x), Split(), symmetric)[:3]


@split_quantize.impl("triton", when=lambda x, columns, symmetric: takes_rows(x), prepack=PREPACKED_COLUMNS)
@traceable
def split_quantize_rows(x: Tensor, columns: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_rows` that leaves `columns` out of codes and scale and stores them apart in the same launch."""
    return _quantize(x, as_rows(x), static_split(columns, x.shape[-1]), symmetric)


@split_quantize_dynamic.impl("triton", when=lambda x, capacity, threshold, symmetric: takes_rows(x))
@traceable
def split_quantize_rows_dynamic(
    x: Tensor, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Column absmax, choice (a launch of its own for many rows), quantization: no host synchronisation."""
    rows = as_rows(x)
    m, k = rows.count, rows.width
    bits = torch.zeros(k, dtype=torch.int32, device=x.device)
    if not empty(m):
        blocks = triton.cdiv(k, SEARCH_COLUMNS)
        group = search_rows(m, blocks, SEARCH_ROWS)
        wrap_triton(_column_absmax_kernel)[((m + group - 1) // group, blocks)](
            rows.data, rows.stride, bits, m, k,
            BLOCK_M=SEARCH_ROWS, BLOCK_K=SEARCH_COLUMNS, ROWS=group, num_warps=4,
        )  # fmt: skip
    split = dynamic_split(bits, m, capacity, threshold, x.dtype)
    assert split.columns is not None
    assert split.overflow is not None
    return (*_quantize(x, rows, split, symmetric), split.columns, split.overflow.view(()))


# Left over from the portable form when nothing fused them: plain tensor code, which Inductor compiles to Triton itself.
for _op in (dequantize, dequantize_weight, outlier_split, outlier_split_dynamic):
    _op.impl("triton")(_op.reference)
