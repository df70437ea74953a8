"""Outlier columns of a call: the absmax of every channel, and the choice of the largest, without asking the host.

Both happen in one launch. Every program joins the maxima of its rows by integer atomics; the one that finishes last
sees all of them and chooses. Channels that cannot be outliers (at most the threshold of LLM.int8()) take no atomic at
all, and where no more exceed it than there are places, nothing is searched.

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
from lowering.triton.launch import MAX_BLOCK, expected_rows, rounded

NAN_ABOVE = tl.constexpr(0x7F800000)  # bits of infinity: those of |NaN| are larger


@triton.jit
def bits_of(y):
    """Bits of |y|: ordered like the values, NaN above all (a floating-point maximum on the GPU drops it)."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def raise_absmax(bits, best, cols, K, floor):
    """Join the maxima of this program, exact in any order; no atomic where one would change nothing."""
    now = tl.load(bits + cols, mask=cols < K, other=0, cache_modifier=".cg")
    tl.atomic_max(bits + cols, best, mask=(cols < K) & (best > tl.maximum(now, floor)), sem="relaxed")


@triton.jit
def _largest(value, R: tl.constexpr, LOW: tl.constexpr):
    """The R-th largest of int32 values ≥ -1, found bit by bit; bits below `LOW` are 0."""
    least = 0
    for step in tl.static_range(0, 31 - LOW):
        candidate = least | (1 << (30 - step))
        reached = tl.sum((value >= candidate).to(tl.int32), 0)
        least = tl.where(reached >= R, candidate, least)
    return least


@triton.jit
def _choose(
    bits, marks, columns, overflow, floor,
    K: tl.constexpr, R: tl.constexpr, LOW: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Store marks and columns of the `R` channels of largest absmax above `floor`; of equal ones the first.

    Also stored: how many channels exceed the threshold and found no place.
    """
    cols = tl.arange(0, BLOCK)
    value = tl.load(bits + cols, mask=cols < K, other=-1, cache_modifier=".cg")
    found = tl.sum((value > floor).to(tl.int32), 0)
    least = floor
    if found > R:
        least = _largest(value, R, LOW)
    above = (value > least).to(tl.int32)
    equal = ((value == least) & (found > R)).to(tl.int32)
    places = R - tl.sum(above, 0)
    # Both running counts in one scan: neither reaches 2^16.
    counts = tl.cumsum(above | (equal << 16), 0)
    selected = (above > 0) | ((equal > 0) & ((counts >> 16) <= places))
    place = (counts & 0xFFFF) + tl.minimum(counts >> 16, places) - 1
    taken = selected
    missed = 0
    if THRESHOLD:
        # NaN is no outlier: it stays, and makes the scale NaN.
        taken = selected & (value <= NAN_ABOVE)
        missed = tl.sum(((value > floor) & (value <= NAN_ABOVE) & (taken == 0)).to(tl.int32), 0)
    tl.store(marks + cols, taken.to(tl.int8), mask=cols < K)
    chosen = tl.where(taken, cols, -1)
    tl.store(columns + place, tl.where(taken, cols, 0).to(tl.int64), mask=selected)
    r = tl.arange(0, BLOCK_R)
    unused = (r >= tl.sum(selected.to(tl.int32), 0)) & (r < R)
    tl.store(columns + r, tl.zeros([BLOCK_R], tl.int64), mask=unused)
    for byte in tl.static_range(3):
        tl.store(marks + K + byte * R + place, (chosen >> (8 * byte)).to(tl.int8), mask=selected)
        tl.store(marks + K + byte * R + r, tl.full([BLOCK_R], -1, tl.int8), mask=unused)
    tl.store(overflow, missed)


@triton.jit
def choose_last(
    bits, marks, columns, overflow, floor,
    K: tl.constexpr, R: tl.constexpr, LOW: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """At the end of every program of a search: the last one to come here chooses. `bits[K]` counts them."""
    if marks is not None:
        tl.debug_barrier()  # every thread's atomics come before the count
        done = tl.atomic_add(bits + K, 1, sem="acq_rel")
        if done == tl.num_programs(0) * tl.num_programs(1) - 1:
            _choose(bits, marks, columns, overflow, floor, K, R, LOW, THRESHOLD, BLOCK, BLOCK_R)


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
# With whole rows to a program, two, where every program has as many atomics as columns; else as many as hide latency.
ROW_PROGRAMS, ROW_PROGRAMS_THRESHOLD = 264, 1056


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
PREPACKED_COLUMNS = Prepack("columns", column_marks, lambda *args: (args[0].shape[-1],))


def static_split(columns: Tensor | None, width: int) -> Split:
    """For given columns, as they are or prepacked."""
    if columns is None or columns.shape[0] == 0:
        return Split()
    marks = column_marks(columns, width) if columns.dtype == torch.int64 else columns
    return Split((marks.shape[0] - width) // 3, marks)


@dataclass(frozen=True)
class Search:
    """What a search kernel writes: `bits` of the absmax `[K]` and a count behind them, then the choice."""

    bits: Tensor
    marks: Tensor | None
    columns: Tensor
    overflow: Tensor
    width: int
    capacity: int
    threshold: float
    low: int

    def arguments(self) -> tuple[Any, ...]:
        """Its run-time arguments. The threshold goes as the bits of the float it is."""
        floor = struct.unpack("<i", struct.pack("<f", max(0.0, self.threshold)))[0]
        if self.marks is None:
            return self.bits, None, None, None, floor
        return self.bits, self.marks, self.columns, self.overflow, floor

    def constants(self) -> dict[str, Any]:
        """Its constants, and the warps that hold all channels at the end."""
        block = triton.next_power_of_2(self.width)
        return {
            "R": self.capacity, "LOW": self.low, "THRESHOLD": self.threshold > 0.0,
            "BLOCK_R": triton.next_power_of_2(max(1, self.capacity)),
            "num_warps": max(4, min(16, block // 512)),
        }  # fmt: skip

    def result(self) -> tuple[Split, Tensor, Tensor]:
        """The split, its columns `[R]` (0 where a place is unused), and the overflow `[]`."""
        if self.marks is not None:
            return Split(self.capacity, self.marks), self.columns, self.overflow.view(())
        return _by_topk(self.bits[: self.width].view(torch.float32), self.capacity, self.threshold)


def search(width: int, capacity: int, threshold: float, dtype: torch.dtype, device: torch.device) -> Search:
    """Memory for a search among `width` channels of `dtype` values; too many for one program are left to PyTorch."""
    r = min(capacity, width)
    low = {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)
    marks = torch.empty(width + 3 * r, dtype=torch.int8, device=device) if width <= MAX_BLOCK else None
    return Search(
        torch.zeros(width + 1, dtype=torch.int32, device=device), marks,
        torch.empty(r, dtype=torch.int64, device=device),
        torch.empty(1, dtype=torch.int32, device=device),  # of no dimension, Inductor would fill it
        width, r, threshold, low,
    )  # fmt: skip


def _by_topk(absmax: Tensor, r: int, threshold: float) -> tuple[Split, Tensor, Tensor]:
    """Rows too long for one block: PyTorch's search."""
    values, columns = torch.topk(absmax, r)
    taken = values > threshold if threshold > 0.0 else torch.ones_like(columns, dtype=torch.bool)
    marks = torch.zeros_like(absmax, dtype=torch.int8).scatter(0, columns, taken.to(torch.int8))
    places = torch.where(taken, columns, -1)
    parts = [((places >> shift) & 0xFF).to(torch.uint8).view(torch.int8) for shift in (0, 8, 16)]
    overflow = ((absmax > threshold).sum() - taken.sum()).to(torch.int32) * int(threshold > 0.0)
    return Split(r, torch.cat([marks, *parts])), torch.where(taken, columns, 0), overflow
