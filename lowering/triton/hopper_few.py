"""W8A8 for up to 64 rows on Hopper (sm_90): a share of the channels for every multiprocessor, written in Gluon.

Few rows take as long as reading the weights, and about 4 µs more for the start and the end of a kernel. Weights are
there before the input is: this kernel is launched while the one before it still runs (programmatic dependent launch,
CUDA C++ Programming Guide, section 6.2.7), fills its ring of shared-memory buffers with weights, and only then waits
for the rows they are multiplied with. One program takes most of a multiprocessor's shared memory, so that no two of
them share one while another has none.

A program's channels are powers of two side by side, up to three (`pieces`), since a tensor's sizes are powers of two
here: 28672 channels are 128 programs of 128 + 64 + 32. One warp loads by TMA, four multiply by `wgmma`.

The ring's last steps bring what is multiplied or added once: outlier columns, as many bytes as 128 of int8, and the
residual. High halves of codes (`lowering.ops.hilo`) come first, through a small ring of their own, since which blocks
of columns have some is not known before the input is there.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lowering import numerics
from lowering.triton.hopper import (
    BLOCK_K,
    OUTLIERS,
    Launch,
    count_bits,
    descriptor,
    finished,
    of_channels,
    synchronize,
    used_blocks,
)
from lowering.triton.launch import overlaps

ROWS = 64  # of one wgmma
ROW_PIECES = (16, 0), (32, 0), (32, 16), (ROWS, 0)
LEAST, MOST = 16, 224  # channels of a program; all multiples of 16 between are sums of three powers of two
SHARED = 206 * 1024  # of a ring: more than half of a multiprocessor's, and room beside it for kernels over rows
EARLY = 84 * 1024  # of weights that are asked for before the rows: behind more of them the rows would come late
PAIRS = 96  # channels up to which a step of the ring takes two blocks of columns
HIGH_BUFFERS = 2
REGISTERS = 128  # of a thread when it starts: half a multiprocessor's, the rest is for kernels over rows
LOADER_REGISTERS = 40
WARPS = 4


@gluon.jit
def _wait_for_input():
    """Until the kernel before this one has ended and what it wrote can be read."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _let_next_start():
    """Once all programs have said so, the next kernel may start; it waits for this one where it has to."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _load_pieces(
    w0, w1, w2, ring0, ring1, ring2, bar, slot, n, k, P0: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr
):
    """One block of columns of this program's channels."""
    tma.async_copy_global_to_shared(w0, [n, k], bar, ring0.index(slot))
    if P1 > 0:
        tma.async_copy_global_to_shared(w1, [n + P0, k], bar, ring1.index(slot))
    if P2 > 0:
        tma.async_copy_global_to_shared(w2, [n + P0 + P1, k], bar, ring2.index(slot))


@gluon.jit
def _load_weights(
    w0, w1, w2, ring0, ring1, ring2, full, slot, n, k, Q: gl.constexpr, P0: gl.constexpr, P1: gl.constexpr,
    P2: gl.constexpr, ASKED: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The weights of one step, of whose bytes its barrier is told: these and the rows that come with them."""
    bar = full.index(slot)
    mbarrier.expect(bar, (ASKED + P0 + P1 + P2) * BLOCK_K * Q)
    for j in gl.static_range(Q):
        _load_pieces(
            w0, w1, w2, ring0, ring1, ring2, bar, slot * Q + j, n, (k * Q + j) * BLOCK_K, P0, P1, P2
        )  # fmt: skip


@gluon.jit
def _as(ring, at, descriptor, rows: gl.constexpr, width: gl.constexpr):
    """A buffer as what a descriptor brings: as many bytes, another type."""
    kind: gl.constexpr = descriptor.dtype
    form: gl.constexpr = descriptor.layout
    return ring.index(at)._reinterpret(kind, [rows, width], form)


@gluon.jit
def _copy_rows(first, second, column, bar, ring, at, ROWS: gl.constexpr):
    """Some columns of all rows, in one piece or two, into the first of a buffer; what its others hold is in no
    result."""
    MANY: gl.constexpr = first.block_type.shape[0]
    width: gl.constexpr = first.block_type.shape[1]
    tma.async_copy_global_to_shared(first, [0, column], bar, _as(ring, at, first, MANY, width))
    if second is not None:
        MORE: gl.constexpr = second.block_type.shape[0]
        tma.async_copy_global_to_shared(
            second, [MANY, column], bar, _as(ring, at, first, ROWS, width).slice(MANY, MORE)
        )


@gluon.jit
def _load_rows(a0, a1, a_ring, full, slot, k, Q: gl.constexpr, ROWS: gl.constexpr, BLOCK_K: gl.constexpr):
    """The rows of one step."""
    for j in gl.static_range(Q):
        _copy_rows(a0, a1, (k * Q + j) * BLOCK_K, full.index(slot), a_ring, slot * Q + j, ROWS)


@gluon.jit
def _load(
    a0, a1, w0, w1, w2, o0, o1, ow0, ow1, ow2, x0, x1, x2, ah0, ah1, blocks, a_ring, ring0, ring1, ring2, full, free,
    ah_ring, high0, high1, high2, high_full, high_free, n, M,
    STEPS: gl.constexpr, R: gl.constexpr, PER: gl.constexpr, Q: gl.constexpr, BUFFERS: gl.constexpr,
    HIGH_BUFFERS: gl.constexpr, P0: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr, ROWS: gl.constexpr,
    ASKED: gl.constexpr, BLOCK_K: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One warp: the first weights, once they are there the rows, then both as far ahead as the ring has room.

    Every program begins at another depth, so that not all of them read the same rows' same columns at once.
    """
    FIRST: gl.constexpr = BUFFERS if BUFFERS < STEPS else STEPS
    turn = gl.program_id(0) * STEPS // gl.num_programs(0)
    for k in range(EARLY):
        _load_weights(w0, w1, w2, ring0, ring1, ring2, full, k, n, (k + turn) % STEPS, Q, P0, P1, P2, ASKED, BLOCK_K)
    _wait_for_input()
    for k in range(EARLY):
        _load_rows(a0, a1, a_ring, full, k, (k + turn) % STEPS, Q, ROWS, BLOCK_K)
    if PER > 0:
        used = used_blocks(blocks, 0, M, ROWS)
        step = 0
        for k in range((STEPS * Q + PER - 1) // PER * PER):
            if ((used >> (k // PER)) & 1) != 0:
                slot = step % HIGH_BUFFERS
                mbarrier.wait(high_free.index(slot), ((step // HIGH_BUFFERS) & 1) ^ 1)
                _load_weights(w0, w1, w2, high0, high1, high2, high_full, slot, n, k, 1, P0, P1, P2, ASKED, BLOCK_K)
                _load_rows(ah0, ah1, ah_ring, high_full, slot, k, 1, ROWS, BLOCK_K)
                step += 1
    for k in range(EARLY, FIRST):
        _load_weights(w0, w1, w2, ring0, ring1, ring2, full, k, n, (k + turn) % STEPS, Q, P0, P1, P2, ASKED, BLOCK_K)
        _load_rows(a0, a1, a_ring, full, k, (k + turn) % STEPS, Q, ROWS, BLOCK_K)
    for k in range(FIRST, STEPS):
        slot = k % BUFFERS
        mbarrier.wait(free.index(slot), ((k // BUFFERS) & 1) ^ 1)
        at = (k + turn) % STEPS
        _load_weights(w0, w1, w2, ring0, ring1, ring2, full, slot, n, at, Q, P0, P1, P2, ASKED, BLOCK_K)
        _load_rows(a0, a1, a_ring, full, slot, at, Q, ROWS, BLOCK_K)
    if R > 0:
        depth: gl.constexpr = o0.block_type.shape[1]
        OUTLIER_SLOT: gl.constexpr = STEPS % BUFFERS
        bar = full.index(OUTLIER_SLOT)
        mbarrier.wait(free.index(OUTLIER_SLOT), ((STEPS // BUFFERS) & 1) ^ 1)
        mbarrier.expect(bar, (ASKED + P0 + P1 + P2) * depth * 2)
        _copy_rows(o0, o1, 0, bar, a_ring, OUTLIER_SLOT * Q, ROWS)
        tma.async_copy_global_to_shared(ow0, [n, 0], bar, _as(ring0, OUTLIER_SLOT * Q, ow0, P0, depth))
        if P1 > 0:
            tma.async_copy_global_to_shared(ow1, [n + P0, 0], bar, _as(ring1, OUTLIER_SLOT * Q, ow1, P1, depth))
        if P2 > 0:
            tma.async_copy_global_to_shared(ow2, [n + P0 + P1, 0], bar, _as(ring2, OUTLIER_SLOT * Q, ow2, P2, depth))
    if x0 is not None:
        LAST: gl.constexpr = STEPS + (R > 0)
        SUM_SLOT: gl.constexpr = LAST % BUFFERS
        bar = full.index(SUM_SLOT)
        mbarrier.wait(free.index(SUM_SLOT), ((LAST // BUFFERS) & 1) ^ 1)
        mbarrier.expect(bar, ROWS * (P0 + P1 + P2) * 2)
        tma.async_copy_global_to_shared(x0, [0, n], bar, _as(ring0, SUM_SLOT * Q, x0, ROWS, P0))
        if P1 > 0:
            tma.async_copy_global_to_shared(x1, [0, n + P0], bar, _as(ring1, SUM_SLOT * Q, x1, ROWS, P1))
        if P2 > 0:
            tma.async_copy_global_to_shared(x2, [0, n + P0 + P1], bar, _as(ring2, SUM_SLOT * Q, x2, ROWS, P2))


@gluon.jit
def _products(
    acc0, acc1, acc2, a_ring, ring0, ring1, ring2, full, free, count, Q: gl.constexpr, BUFFERS: gl.constexpr,
    P1: gl.constexpr, P2: gl.constexpr,
):  # fmt: skip
    """Add the products of the first `count` steps of a ring, and free their buffers."""
    for k in range(count):
        slot = k % BUFFERS
        mbarrier.wait(full.index(slot), (k // BUFFERS) & 1)
        for j in gl.static_range(Q):
            at = slot * Q + j
            acc0 = warpgroup_mma(a_ring.index(at), ring0.index(at).permute((1, 0)), acc0, is_async=True)
            if P1 > 0:
                acc1 = warpgroup_mma(a_ring.index(at), ring1.index(at).permute((1, 0)), acc1, is_async=True)
            if P2 > 0:
                acc2 = warpgroup_mma(a_ring.index(at), ring2.index(at).permute((1, 0)), acc2, is_async=True)
        # What still runs is what was just issued: the buffer of the step before is free.
        if P2 > 0:
            acc0, acc1, acc2 = warpgroup_mma_wait(num_outstanding=3 * Q, deps=(acc0, acc1, acc2))
        elif P1 > 0:
            acc0, acc1 = warpgroup_mma_wait(num_outstanding=2 * Q, deps=(acc0, acc1))
        else:
            acc0 = warpgroup_mma_wait(num_outstanding=Q, deps=(acc0,))
        mbarrier.arrive(free.index((k + BUFFERS - 1) % BUFFERS), count=1, pred=k > 0)
    if P2 > 0:
        acc0, acc1, acc2 = warpgroup_mma_wait(num_outstanding=0, deps=(acc0, acc1, acc2))
    elif P1 > 0:
        acc0, acc1 = warpgroup_mma_wait(num_outstanding=0, deps=(acc0, acc1))
    else:
        acc0 = warpgroup_mma_wait(num_outstanding=0, deps=(acc0,))
    mbarrier.arrive(free.index((count + BUFFERS - 1) % BUFFERS), count=1)
    return acc0, acc1, acc2


@gluon.jit
def _of_rows(pointer, stride, M, rows: gl.constexpr, LAYOUT: gl.constexpr):
    """One value per row; 0 where there are none."""
    at = gl.arange(0, rows, layout=gl.SliceLayout(1, LAYOUT))
    value = at
    if pointer is not None:
        value = gl.load(pointer + at.to(gl.int64) * stride, mask=at < M, other=0)
    return value


@gluon.jit
def _finish(
    acc, token, zero, affine: gl.constexpr, channels, biased: gl.constexpr, a_ring, ring, o, ow, x, c, n,
    STEPS: gl.constexpr, R: gl.constexpr, CODES: gl.constexpr, Q: gl.constexpr, BUFFERS: gl.constexpr,
    P: gl.constexpr, ROWS: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """From the sums of one piece to memory. Outliers and residual are there; the last step's weights are not needed
    any more, and the result leaves from where they were."""
    o_tile = a_ring
    ow_tile = ring
    if R > 0:
        depth: gl.constexpr = o.block_type.shape[1]
        o_tile = _as(a_ring, STEPS % BUFFERS * Q, o, ROWS, depth)
        ow_tile = _as(ring, STEPS % BUFFERS * Q, ow, P, depth)
    y = finished(acc, token, zero, affine, channels, biased, o_tile, ow_tile, R, CODES, OUT)
    if x is not None:
        y += _as(ring, (STEPS + (R > 0)) % BUFFERS * Q, x, ROWS, P).load(OUT).to(gl.float32)
    staging = _as(ring, (STEPS - 1) % BUFFERS * Q, c, ROWS, P)
    staging.store(y.to(c.dtype))
    return staging


@gluon.jit
def _multiply(
    a_ring, ring0, ring1, ring2, full, free, ah_ring, high0, high1, high2, high_full, high_free,
    o0, ow0, ow1, ow2, x0, x1, x2, blocks, c0, c1, c2, scale, scale_stride, zero_point, zero_point_stride,
    weight_scale, weight_sum, bias, n, M, N,
    STEPS: gl.constexpr, R: gl.constexpr, PER: gl.constexpr, CODES: gl.constexpr, Q: gl.constexpr,
    BUFFERS: gl.constexpr, HIGH_BUFFERS: gl.constexpr, P0: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """Four warps: products of what has come, and the results."""
    # Of a piece that there is not: some layout.
    N1: gl.constexpr = P1 if P1 > 0 else P0
    N2: gl.constexpr = P2 if P2 > 0 else P0
    warps: gl.constexpr = [gl.num_warps(), 1]
    OUT0: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=warps, instr_shape=[16, P0, 16])
    OUT1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=warps, instr_shape=[16, N1, 16])
    OUT2: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=warps, instr_shape=[16, N2, 16])
    affine: gl.constexpr = zero_point is not None
    biased: gl.constexpr = bias is not None
    acc0 = gl.zeros(
        [ROWS, P0], gl.int32, gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=warps, instr_shape=[16, P0, 32])
    )
    acc1 = acc0
    acc2 = acc0
    if P1 > 0:
        acc1 = gl.zeros(
            [ROWS, P1], gl.int32,
            gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=warps, instr_shape=[16, P1, 32]),
        )  # fmt: skip
    if P2 > 0:
        acc2 = gl.zeros(
            [ROWS, P2], gl.int32,
            gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=warps, instr_shape=[16, P2, 32]),
        )  # fmt: skip
    _wait_for_input()
    channels0 = of_channels(weight_scale, weight_sum, bias, n, N, P0)
    channels1 = channels0
    channels2 = channels0
    if P1 > 0:
        channels1 = of_channels(weight_scale, weight_sum, bias, n + P0, N, P1)
    if P2 > 0:
        channels2 = of_channels(weight_scale, weight_sum, bias, n + P0 + P1, N, P2)
    token0 = _of_rows(scale, scale_stride, M, ROWS, OUT0)
    token1 = _of_rows(scale, scale_stride, M, ROWS, OUT1)
    token2 = _of_rows(scale, scale_stride, M, ROWS, OUT2)
    zero0 = _of_rows(zero_point, zero_point_stride, M, ROWS, OUT0)
    zero1 = _of_rows(zero_point, zero_point_stride, M, ROWS, OUT1)
    zero2 = _of_rows(zero_point, zero_point_stride, M, ROWS, OUT2)
    if PER > 0:
        high_steps = count_bits(used_blocks(blocks, 0, M, ROWS)) * PER
        if high_steps > 0:
            acc0, acc1, acc2 = _products(
                acc0, acc1, acc2, ah_ring, high0, high1, high2, high_full, high_free, high_steps, 1, HIGH_BUFFERS,
                P1, P2,
            )  # fmt: skip
            acc0 = acc0 << 8
            acc1 = acc1 << 8
            acc2 = acc2 << 8
    acc0, acc1, acc2 = _products(
        acc0, acc1, acc2, a_ring, ring0, ring1, ring2, full, free, STEPS, Q, BUFFERS, P1, P2
    )  # fmt: skip
    if R > 0:
        mbarrier.wait(full.index(STEPS % BUFFERS), (STEPS // BUFFERS) & 1)
    if x0 is not None:
        mbarrier.wait(full.index((STEPS + (R > 0)) % BUFFERS), ((STEPS + (R > 0)) // BUFFERS) & 1)
    staging0 = _finish(
        acc0, token0, zero0, affine, channels0, biased, a_ring, ring0, o0, ow0, x0, c0, n, STEPS, R, CODES, Q, BUFFERS,
        P0, ROWS, OUT0,
    )  # fmt: skip
    staging1 = staging0
    staging2 = staging0
    if P1 > 0:
        staging1 = _finish(
            acc1, token1, zero1, affine, channels1, biased, a_ring, ring1, o0, ow1, x1, c1, n + P0, STEPS, R, CODES, Q,
            BUFFERS, P1, ROWS, OUT1,
        )  # fmt: skip
    if P2 > 0:
        staging2 = _finish(
            acc2, token2, zero2, affine, channels2, biased, a_ring, ring2, o0, ow2, x2, c2, n + P0 + P1, STEPS, R,
            CODES, Q, BUFFERS, P2, ROWS, OUT2,
        )  # fmt: skip
    fence_async_shared()
    synchronize()
    tma.async_copy_shared_to_global(c0, [0, n], staging0)
    if P1 > 0:
        tma.async_copy_shared_to_global(c1, [0, n + P0], staging1)
    if P2 > 0:
        tma.async_copy_shared_to_global(c2, [0, n + P0 + P1], staging2)
    tma.store_wait(0)


@gluon.jit
def linear_w8a8_wgmma(
    a0, a1, w0, w1, w2, o0, o1, ow0, ow1, ow2, x0, x1, x2, ah0, ah1, blocks, c0, c1, c2, scale, scale_stride,
    zero_point, zero_point_stride, weight_scale, weight_sum, bias, M, N,
    K: gl.constexpr, R: gl.constexpr, PER: gl.constexpr, CODES: gl.constexpr, Q: gl.constexpr, BUFFERS: gl.constexpr,
    HIGH_BUFFERS: gl.constexpr, P0: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr, ROWS: gl.constexpr,
    ASKED: gl.constexpr, BLOCK_K: gl.constexpr, LOADER_REGISTERS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """`M` rows, `ASKED` of a tile of `ROWS` loaded, and `N` channels, of which a program has P0 + P1 + P2; `Q` blocks
    of `BLOCK_K` columns are a step of the ring. A bit of `blocks` stands for `PER` blocks of `ah`; 0: there is none."""
    _let_next_start()
    a_ring = gl.allocate_shared_memory(gl.int8, [BUFFERS * Q, ROWS, BLOCK_K], a0.layout)
    ring0 = gl.allocate_shared_memory(gl.int8, [BUFFERS * Q, P0, BLOCK_K], w0.layout)
    ring1 = ring0
    ring2 = ring0
    if P1 > 0:
        ring1 = gl.allocate_shared_memory(gl.int8, [BUFFERS * Q, P1, BLOCK_K], w1.layout)
    if P2 > 0:
        ring2 = gl.allocate_shared_memory(gl.int8, [BUFFERS * Q, P2, BLOCK_K], w2.layout)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    ah_ring = a_ring
    high0 = ring0
    high1 = ring1
    high2 = ring2
    high_full = full
    high_free = free
    if PER > 0:
        ah_ring = gl.allocate_shared_memory(gl.int8, [HIGH_BUFFERS, ROWS, BLOCK_K], a0.layout)
        high0 = gl.allocate_shared_memory(gl.int8, [HIGH_BUFFERS, P0, BLOCK_K], w0.layout)
        high1 = high0
        high2 = high0
        if P1 > 0:
            high1 = gl.allocate_shared_memory(gl.int8, [HIGH_BUFFERS, P1, BLOCK_K], w1.layout)
        if P2 > 0:
            high2 = gl.allocate_shared_memory(gl.int8, [HIGH_BUFFERS, P2, BLOCK_K], w2.layout)
        high_full = gl.allocate_shared_memory(gl.int64, [HIGH_BUFFERS, 1], mbarrier.MBarrierLayout())
        high_free = gl.allocate_shared_memory(gl.int64, [HIGH_BUFFERS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(HIGH_BUFFERS):
            mbarrier.init(high_full.index(i), count=1)
            mbarrier.init(high_free.index(i), count=1)
    fence_async_shared()
    STEPS: gl.constexpr = (K + BLOCK_K * Q - 1) // (BLOCK_K * Q)
    n = gl.program_id(0) * (P0 + P1 + P2)
    gl.warp_specialize(
        [
            (_multiply, (
                a_ring, ring0, ring1, ring2, full, free, ah_ring, high0, high1, high2, high_full, high_free,
                o0, ow0, ow1, ow2, x0, x1, x2, blocks, c0, c1, c2, scale, scale_stride, zero_point, zero_point_stride,
                weight_scale, weight_sum, bias, n, M, N,
                STEPS, R, PER, CODES, Q, BUFFERS, HIGH_BUFFERS, P0, P1, P2, ROWS,
            )),
            (_load, (
                a0, a1, w0, w1, w2, o0, o1, ow0, ow1, ow2, x0, x1, x2, ah0, ah1, blocks, a_ring, ring0, ring1, ring2,
                full, free, ah_ring, high0, high1, high2, high_full, high_free, n, M,
                STEPS, R, PER, Q, BUFFERS, HIGH_BUFFERS, P0, P1, P2, ROWS, ASKED, BLOCK_K, EARLY,
            )),
        ],
        [1],
        [LOADER_REGISTERS],
    )  # fmt: skip


def row_pieces(m: int) -> tuple[int, int]:
    """How many rows are loaded, as two powers of two; 0 where one is enough. TMA fills rows beyond the tensor with
    zeros, and takes longer for many of them than for rows that there are (12 % of a step of 17 rows)."""
    return next(pieces for pieces in ROW_PIECES if m <= sum(pieces))


def width(n: int, multiprocessors: int) -> int:
    """Channels of a program, so that all programs run at once or, of very many channels, in equal turns."""
    for turns in itertools.count(1):
        share = -(-n // (multiprocessors * turns))
        rounded = max(LEAST, -(-share // LEAST) * LEAST)
        if rounded <= MOST:
            return rounded
    raise AssertionError


def pieces(channels: int) -> tuple[int, ...]:
    """A multiple of 16 up to 224 as three powers of two, the largest first; 0 where there is no piece."""
    found = [1 << bit for bit in range(7, 3, -1) if channels >> bit & 1]
    assert sum(found) == channels <= MOST, f"{channels} channels"
    return (*found, 0, 0)[:3]


def launch(
    device: torch.device, codes: Any, scale: Any, zero_point: Any | None, weight: Any, weight_scale: Any,
    weight_sum: Any | None, bias: Any | None, outliers: Any | None, outlier_weight: Any | None, code_columns: bool,
    high: Any | None, blocks: Any | None, residual: Any | None, out: Any,
) -> Launch:  # fmt: skip
    """`codes[M, K]`, M up to 64, `scale[M]`, `zero_point[M]`, `weight[N, K]` → `out[M, N]`: tensors, or what stands for
    them while a model is traced."""
    m, k = codes.shape
    n = out.shape[1]
    rows = row_pieces(m)
    channels = width(n, torch.cuda.get_device_properties(device).multi_processor_count)
    parts = pieces(channels)
    r = 0 if outliers is None else outliers.shape[1]
    depth = OUTLIERS // 2 if r <= OUTLIERS // 2 else OUTLIERS

    def each(matrix: Any | None, columns: int | None = None) -> list[Any]:
        """A descriptor of each piece: of its rows and as many columns as given, or of its columns and all rows."""
        there = [part if matrix is not None else 0 for part in parts]
        sizes = [(part, columns) if columns else (ROWS, part) for part in there]
        return [descriptor(matrix, *size) if part else None for part, size in zip(there, sizes, strict=True)]

    def of_rows(matrix: Any | None, columns: int) -> list[Any]:
        """A descriptor of each piece of rows."""
        return [descriptor(matrix, part, columns) if matrix is not None and part else None for part in rows]

    blocks_of_step = 2 if channels <= PAIRS else 1
    step = (ROWS + channels) * BLOCK_K
    room = SHARED - (0 if high is None else HIGH_BUFFERS * step)
    steps = -(-k // (BLOCK_K * blocks_of_step))
    buffers = max(3, min(room // (step * blocks_of_step), steps + (r > 0) + (residual is not None)))
    early = max(1, min(buffers, steps, EARLY // (channels * BLOCK_K * blocks_of_step)))
    arguments = (
        *of_rows(codes, BLOCK_K), *each(weight, BLOCK_K), *of_rows(outliers, depth), *each(outlier_weight, depth),
        *each(residual), *of_rows(high, BLOCK_K), blocks, *each(out),
        scale, scale.stride()[0], zero_point, 0 if zero_point is None else zero_point.stride()[0], weight_scale,
        weight_sum, bias, m, n,
    )  # fmt: skip
    constants = {
        "K": k, "R": r, "PER": 0 if high is None else numerics.block_width(k) // BLOCK_K, "CODES": code_columns,
        "Q": blocks_of_step, "BUFFERS": buffers, "HIGH_BUFFERS": HIGH_BUFFERS, "EARLY": early,
        "P0": parts[0], "P1": parts[1], "P2": parts[2], "ROWS": ROWS, "ASKED": sum(rows), "BLOCK_K": BLOCK_K,
        "LOADER_REGISTERS": LOADER_REGISTERS, "num_warps": WARPS, "maxnreg": REGISTERS,
        "launch_pdl": overlaps(device),
    }  # fmt: skip
    return Launch(linear_w8a8_wgmma, -(-n // channels), arguments, constants)
