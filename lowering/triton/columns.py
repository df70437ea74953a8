"""Outlier columns of a call: the absmax of every channel, and the choice of the largest, without asking the host.

The programs of a search join the maxima of their rows by integer atomics. Under a threshold (LLM.int8()) channels that
cannot be outliers take no atomic at all. Where there is a place for all above it, which is the usual case, a small
kernel lists them, and else finds the largest.

The choice reaches the row kernels as marks, one byte per channel, so that a row in registers leaves outliers out
without reading anything twice; and as a list of columns, which are gathered.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.registry import Prepack
from lowering.triton.launch import MAX_BLOCK, expected_rows, rounded, wrap_triton

NAN_ABOVE = tl.constexpr(0x7F800000)  # bits of infinity: those of |NaN| are larger


@triton.jit
def bits_of(y):
    """Bits of |y|: ordered like the values, NaN above all (a floating-point maximum on the GPU drops it)."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def raise_absmax(bits, best, cols, floor, K: tl.constexpr):
    """Join the maxima of this program, exact in any order; no atomic where one would change nothing."""
    high = (cols < K) & (best > floor)
    high &= best > tl.load(bits + cols, mask=high, other=0, cache_modifier=".cg")
    tl.atomic_max(bits + cols, best, mask=high, sem="relaxed")


@triton.jit
def _largest(value, R: tl.constexpr, LOW: tl.constexpr):
    """The R-th largest of int32 values ≥ -1, found bit by bit; bits below `LOW` are 0. And how many are larger."""
    least = 0
    for step in tl.static_range(0, 31 - LOW):
        candidate = least | (1 << (30 - step))
        reached = tl.sum((value >= candidate).to(tl.int32), 0)
        least = tl.where(reached >= R, candidate, least)
    return least, tl.sum((value > least).to(tl.int32), 0)


@triton.jit
def _list_largest(
    bits, marks, columns, K: tl.constexpr, R: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Mark and list the `R` channels of largest absmax, of equal ones the first."""
    WIDTH: tl.constexpr = 128 if BLOCK > 128 else BLOCK
    flat = tl.arange(0, BLOCK)
    least, larger = _largest(tl.load(bits + flat, mask=flat < K, other=-1), R, LOW)
    # Sums are cheapest along a vector, which threads first add up for themselves; running counts along the rows of a
    # matrix, which stay within a warp.
    cols = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    value = tl.load(bits + cols, mask=cols < K, other=-1)
    above = (value > least).to(tl.int32)
    equal = (value == least).to(tl.int32)
    both = above | (equal << 16)  # neither count reaches 2^16
    rows = tl.sum(both, 1)
    counts = tl.cumsum(both, 1) + (tl.cumsum(rows, 0) - rows)[:, None]
    places = R - larger
    selected = (above > 0) | ((equal > 0) & ((counts >> 16) <= places))
    place = (counts & 0xFFFF) + tl.minimum(counts >> 16, places) - 1
    tl.store(columns + place, cols.to(tl.int64), mask=selected)
    tl.store(marks + cols, selected.to(tl.int8), mask=cols < K)


@triton.jit
def _choose_columns_kernel(
    bits, marks, columns, overflow, floor,
    K: tl.constexpr, R: tl.constexpr, LOW: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Marks, columns in ascending order, and the number of channels above the threshold that found no place.

    A place that is not used has column 0, and no column in the marks. NaN is no outlier under a threshold: it
    stays, and makes the scale NaN.
    """
    found = K
    missed = 0
    if THRESHOLD:
        # One block: its loads are in flight together, and a single program has nothing else to hide their latency
        # with. The second pass finds them in the cache, and would spill if it kept so many values.
        flat = tl.arange(0, BLOCK)
        every = tl.load(bits + flat, mask=flat < K, other=-1)
        # Neither count reaches 2^16.
        both = tl.sum((every > floor).to(tl.int32) | ((every > NAN_ABOVE).to(tl.int32) << 16), 0)
        nans = both >> 16
        found = both & 0xFFFF
        # NaN is above all and takes places first, though it is no outlier.
        missed = tl.maximum(found - R, 0) - tl.maximum(nans - R, 0)
    if found <= R:
        STEP: tl.constexpr = 4096 if BLOCK > 4096 else BLOCK
        for start in range(0, K, STEP):
            cols = start + tl.arange(0, STEP)
            value = tl.load(bits + cols, mask=cols < K, other=-1)
            large = value >= 0
            if THRESHOLD:
                large = value > floor
                place = tl.atomic_add(bits + K + tl.zeros_like(cols), 1, mask=large, sem="relaxed")
                tl.store(columns + place, cols.to(tl.int64), mask=large)
            tl.store(marks + cols, large.to(tl.int8), mask=cols < K)
        if not THRESHOLD:  # every channel has a place
            r = tl.arange(0, BLOCK_R)
            tl.store(columns + r, r.to(tl.int64), mask=r < R)
    else:
        _list_largest(bits, marks, columns, K, R, LOW, BLOCK)
    tl.store(overflow, missed)
    tl.debug_barrier()
    used = tl.minimum(found, R)
    r = tl.arange(0, BLOCK_R)
    listed = tl.load(columns + r, mask=r < used, other=K).to(tl.int32)
    others = tl.load(columns + r[:, None], mask=(r < used)[:, None], other=K).to(tl.int32)
    place = tl.sum((others < listed[None, :]).to(tl.int32), 0)
    place = tl.where(r < used, place, r)
    taken = r < used
    if THRESHOLD:
        nan = taken & (tl.load(bits + listed, mask=taken, other=0) > NAN_ABOVE)
        tl.store(marks + listed, tl.zeros_like(listed).to(tl.int8), mask=nan)
        taken = taken & (nan == 0)
    tl.debug_barrier()
    tl.store(columns + place, tl.where(taken, listed, 0).to(tl.int64), mask=r < R)
    chosen = tl.where(taken, listed, -1)
    for byte in tl.static_range(3):
        tl.store(marks + K + byte * R + place, (chosen >> (8 * byte)).to(tl.int8), mask=r < R)


@triton.jit
def inliers(y, marks, cols, mask):
    """`y` with 0 in the channels that are outliers."""
    if marks is not None:
        y = tl.where(tl.load(marks + cols, mask=mask, other=0) != 0, 0.0, y)
    return y


@triton.jit
def outlier_columns(marks, K: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Columns of the places, and which places are taken."""
    r = tl.arange(0, BLOCK_R)
    column = tl.load(marks + K + r, mask=r < R, other=-1).to(tl.int32) & 0xFF
    column |= (tl.load(marks + K + R + r, mask=r < R, other=-1).to(tl.int32) & 0xFF) << 8
    column |= (tl.load(marks + K + 2 * R + r, mask=r < R, other=-1).to(tl.int32) & 0xFF) << 16
    return column, column < K


@triton.jit
def store_gathered(outliers, value, taken, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Write the outliers of one row, computed again for these few columns: cheaper than to move them between threads
    through shared memory."""
    r = tl.arange(0, BLOCK_R)
    tl.store(outliers + r, rounded(tl.where(taken, value, 0.0), outliers.dtype.element_ty), mask=r < R)


# ---------------------------------------------------------------------------------------------------------------------
# Host side

# Rows and columns of one step of a search over column blocks. A program takes as many steps as leave about four
# programs to each of 132 multiprocessors.
SEARCH_ROWS, SEARCH_COLUMNS, SEARCH_PROGRAMS = 8, 512, 528
# Programs of a search that takes whole rows: one a multiprocessor where each has an atomic for every column, eight
# under a threshold, where few columns have any.
ROW_PROGRAMS, ROW_PROGRAMS_THRESHOLD = 132, 1056


def search_rows(m: Any, column_blocks: int, step: int, programs: int = SEARCH_PROGRAMS) -> int:
    """Rows that one program of a column search reads, a multiple of `step`."""
    steps = -(-expected_rows(m) * column_blocks // (programs * step))
    return step * triton.next_power_of_2(max(1, steps))


def programs(m: Any, group: int) -> Any:
    """Programs for `m` rows, `group` to each; never none, for the choice is made even of no rows."""
    return max(1, -(-m // group)) if isinstance(m, int) else m // group + 1


@dataclass(frozen=True)
class Split:
    """How outliers leave the rows: their number, `[K + 3 R]` marks and bytes of their columns, or neither."""

    count: int = 0
    marks: Tensor | None = None

    def constants(self) -> dict[str, Any]:
        """Constants of the row kernels."""
        return {"R": self.count, "BLOCK_R": triton.next_power_of_2(max(1, self.count))}


def column_marks(columns: Tensor, width: int) -> Tensor:
    """Outlier columns `[R]` → int8 `[K + 3 R]`: 1 for every channel that is one, then their low, middle, high bytes."""
    marks = torch.zeros(width, dtype=torch.int8, device=columns.device).scatter(0, columns, 1)
    places = [((columns >> shift) & 0xFF).to(torch.uint8).view(torch.int8) for shift in (0, 8, 16)]
    return torch.cat([marks, *places])


# The lowered graph reads marks made once, instead of making them in every call.
PREPACKED_COLUMNS = Prepack("columns", column_marks, lambda x: (x.shape[-1],))


def static_split(columns: Tensor | None, width: int) -> Split:
    """For given columns, as they are or prepacked."""
    if columns is None or columns.shape[0] == 0:
        return Split()
    marks = column_marks(columns, width) if columns.dtype == torch.int64 else columns
    return Split((marks.shape[0] - width) // 3, marks)


@dataclass(frozen=True)
class Search:
    """What a search kernel writes: `bits` of the absmax `[K]` (0 where not above a threshold), and behind them a count
    for the choice."""

    bits: Tensor
    width: int
    capacity: int
    threshold: float
    low: int

    def arguments(self) -> tuple[Any, ...]:
        """Run-time arguments of a search kernel."""
        return self.bits, floor_of(self.threshold)

    def constants(self) -> dict[str, Any]:
        """Its constants."""
        return {"K": self.width}

    def result(self) -> tuple[Split, Tensor, Tensor]:
        """The split, its columns `[R]` (0 where a place is unused), and the overflow `[]`."""
        if self.width > MAX_BLOCK:
            return _by_topk(self.bits[: self.width].view(torch.float32), self.capacity, self.threshold)
        k, r = self.width, self.capacity
        marks = torch.empty(k + 3 * r, dtype=torch.int8, device=self.bits.device)
        columns = torch.empty(r, dtype=torch.int64, device=marks.device)
        overflow = torch.empty(1, dtype=torch.int32, device=marks.device)  # of no dimension, Inductor would fill it
        block = triton.next_power_of_2(k)
        wrap_triton(_choose_columns_kernel)[(1,)](
            self.bits, marks, columns, overflow, floor_of(self.threshold),
            K=k, R=r, LOW=self.low, THRESHOLD=self.threshold > 0.0, BLOCK=block,
            BLOCK_R=triton.next_power_of_2(r), num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
        return Split(r, marks), columns, overflow.view(())


def floor_of(threshold: float) -> int:
    """A threshold as the bits of the float it is."""
    return int(struct.unpack("<i", struct.pack("<f", max(0.0, threshold)))[0])


def search(
    width: int,
    capacity: int,
    threshold: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Search:
    """Memory for a search among `width` channels of `dtype` values."""
    low = {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)
    bits = torch.zeros(width + 1, dtype=torch.int32, device=device)
    return Search(bits, width, min(capacity, width), threshold, low)


def _by_topk(absmax: Tensor, r: int, threshold: float) -> tuple[Split, Tensor, Tensor]:
    """Rows too long for one block: PyTorch's search."""
    values, columns = torch.topk(absmax, r)
    taken = values > threshold if threshold > 0.0 else torch.ones_like(columns, dtype=torch.bool)
    marks = torch.zeros_like(absmax, dtype=torch.int8).scatter(0, columns, taken.to(torch.int8))
    places = torch.where(taken, columns, -1)
    parts = [((places >> shift) & 0xFF).to(torch.uint8).view(torch.int8) for shift in (0, 8, 16)]
    overflow = ((absmax > threshold).sum() - taken.sum()).to(torch.int32) * int(threshold > 0.0)
    return Split(r, torch.cat([marks, *parts])), torch.where(taken, columns, 0), overflow
