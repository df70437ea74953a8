"""W8A8 for many rows on Hopper (sm_90): persistent, asynchronous `wgmma`, written in Gluon.

Triton itself waits for every int8 `wgmma` before it issues the next one. Here one step's products run while the next
is issued, and a ring of shared-memory buffers is filled by TMA several steps ahead, by one warp that does nothing
else, across the border of two tiles: the loads of the next tile run under the epilogue of this one. Two groups of four
warps multiply, 64 rows of a tile each, and wait for the ring alone: while one finishes its results, the other has the
tensor cores. A tile is 128 rows by two halves of 128 channels. These lie side by side; or, for the gate and up
projections of a gated MLP, they are the same channels of both, and the epilogue multiplies them: their product is all
that reaches memory.

Outlier columns are one more step of the same ring: 64 columns of bf16 are as many bytes as 128 of int8. High halves of
codes (`lowering.ops.hilo`) come before the low ones, in steps of their own for the blocks of columns that have some.
A residual comes last, in two steps that nothing is multiplied in: it is there when the epilogue adds it.

Where tiles of one half do not outnumber the multiprocessors, a tile has one half only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lowering import numerics

# Renamed in Triton 3.7.
synchronize = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

PART, HALF, BLOCK_K = 64, 128, 128
GROUP = 16  # tile rows that go through the columns together: as high as 132 tiles are wide
BLOCK_M = 2 * PART
# 4 stages of 48 KB and 32 KB to stage the result fill an H100's 227 KB.
BUFFERS = 4
NARROW_BUFFERS = 6  # of 32 KB
OUTLIERS = BLOCK_K // 2  # 16-bit columns that one step holds
WARPS = 4  # of each of the two groups that multiply
REGISTERS, LOADER_REGISTERS = 240, 24  # of a thread that multiplies, and of the one warp that loads
NO_ACTIVATION = -1
_GL = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8}


@gluon.jit
def _position(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Groups of `GROUP` tile rows go through the columns together, for the L2."""
    in_group = GROUP * tiles_n
    first = (tile // in_group) * GROUP
    size = gl.minimum(tiles_m - first, GROUP)
    return first + (tile % in_group) % size, (tile % in_group) // size


@gluon.jit
def _either(a, b):
    return a | b


@gluon.jit
def used_blocks(blocks, m, M, BLOCK_M: gl.constexpr):
    """The blocks in which some row of a tile has high halves."""
    rows = m + gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([BLOCK_M // 32], [32], [gl.num_warps()], [0]))
    return gl.reduce(gl.load(blocks + rows, mask=rows < M, other=0), 0, _either)


@gluon.jit
def count_bits(word):
    """Bits that are set."""
    rest = word.to(gl.uint32, bitcast=True)
    rest = rest - ((rest >> 1) & 0x55555555)
    rest = (rest & 0x33333333) + ((rest >> 2) & 0x33333333)
    rest = (rest + (rest >> 4)) & 0x0F0F0F0F
    return ((rest * 0x01010101) >> 24).to(gl.int32)


@gluon.jit
def _fill(
    a, w, a0_ring, a1_ring, w0_ring, w1_ring, full, free, m, n, k, step,
    SECOND: gl.constexpr, BUFFERS: gl.constexpr, PART: gl.constexpr, HALF: gl.constexpr, BLOCK_K: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """One step of the ring, once its buffer is free."""
    halves: gl.constexpr = 2 if WIDE else 1
    slot = step % BUFFERS
    bar = full.index(slot)
    mbarrier.wait(free.index(slot), ((step // BUFFERS) & 1) ^ 1)
    mbarrier.expect(bar, (2 * PART + halves * HALF) * BLOCK_K)
    tma.async_copy_global_to_shared(a, [m, k * BLOCK_K], bar, a0_ring.index(slot))
    tma.async_copy_global_to_shared(a, [m + PART, k * BLOCK_K], bar, a1_ring.index(slot))
    tma.async_copy_global_to_shared(w, [n, k * BLOCK_K], bar, w0_ring.index(slot))
    if WIDE:
        tma.async_copy_global_to_shared(w, [n + SECOND, k * BLOCK_K], bar, w1_ring.index(slot))


@gluon.jit
def _load(
    a, w, o, ow, x, ah, blocks, a0_ring, a1_ring, w0_ring, w1_ring, counts, full, free, M, N,
    K_STEPS: gl.constexpr, R: gl.constexpr, PER: gl.constexpr,
    NEXT: gl.constexpr, SECOND: gl.constexpr, BUFFERS: gl.constexpr,
    PART: gl.constexpr, HALF: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """One warp: the loads of all tiles of this program, as far ahead as the ring has room."""
    BLOCK_M: gl.constexpr = 2 * PART
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, NEXT)
    halves: gl.constexpr = 2 if WIDE else 1
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _position(tile, tiles_m, tiles_n, GROUP)
        m, n = tile_m * BLOCK_M, tile_n * NEXT
        if PER > 0:
            used = used_blocks(blocks, m, M, BLOCK_M)
            # Beside the first buffer of the tile: who waits for that can read how many of them have high halves.
            mbarrier.wait(free.index(step % BUFFERS), ((step // BUFFERS) & 1) ^ 1)
            number = gl.full([32], count_bits(used) * PER, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
            counts.index(step % BUFFERS).store(number)
            if used != 0:
                for k in range((K_STEPS + PER - 1) // PER * PER):
                    if ((used >> (k // PER)) & 1) != 0:
                        _fill(
                            ah, w, a0_ring, a1_ring, w0_ring, w1_ring, full, free, m, n, k, step,
                            SECOND, BUFFERS, PART, HALF, BLOCK_K, WIDE,
                        )  # fmt: skip
                        step += 1
        for k in range(K_STEPS):
            _fill(
                a, w, a0_ring, a1_ring, w0_ring, w1_ring, full, free, m, n, k, step,
                SECOND, BUFFERS, PART, HALF, BLOCK_K, WIDE,
            )  # fmt: skip
            step += 1
        if R > 0:
            kind: gl.constexpr = o.dtype
            wide: gl.constexpr = o.layout
            depth: gl.constexpr = o.block_type.shape[1]
            slot = step % BUFFERS
            bar = full.index(slot)
            mbarrier.wait(free.index(slot), ((step // BUFFERS) & 1) ^ 1)
            mbarrier.expect(bar, (BLOCK_M + halves * HALF) * depth * 2)
            tma.async_copy_global_to_shared(o, [m, 0], bar, a0_ring.index(slot)._reinterpret(kind, [PART, depth], wide))
            tma.async_copy_global_to_shared(
                o, [m + PART, 0], bar, a1_ring.index(slot)._reinterpret(kind, [PART, depth], wide)
            )
            tma.async_copy_global_to_shared(
                ow, [n, 0], bar, w0_ring.index(slot)._reinterpret(kind, [HALF, depth], wide)
            )
            if WIDE:
                tma.async_copy_global_to_shared(
                    ow, [n + SECOND, 0], bar, w1_ring.index(slot)._reinterpret(kind, [HALF, depth], wide)
                )
            step += 1
        if x is not None:  # a part of a half where a half of the weights lies: as many bytes
            element: gl.constexpr = x.dtype
            form: gl.constexpr = x.layout
            for i in gl.static_range(2):
                slot = step % BUFFERS
                bar = full.index(slot)
                mbarrier.wait(free.index(slot), ((step // BUFFERS) & 1) ^ 1)
                mbarrier.expect(bar, halves * PART * HALF * 2)
                first = w0_ring.index(slot)._reinterpret(element, [PART, HALF], form)
                if WIDE:  # a half in each step
                    second = w1_ring.index(slot)._reinterpret(element, [PART, HALF], form)
                    tma.async_copy_global_to_shared(x, [m, n + i * SECOND], bar, first)
                    tma.async_copy_global_to_shared(x, [m + PART, n + i * SECOND], bar, second)
                else:  # a part in each
                    tma.async_copy_global_to_shared(x, [m + i * PART, n], bar, first)
                step += 1


@gluon.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) to a few units in the last place, 0 where exp(-x) exceeds 2**126: without a division, which
    took 3 % of a gated linear's time."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }", "=f,f",
        [x * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _activation(x, ACT: gl.constexpr):
    """The activations of `lowering.triton.act` by their codes there, on fp32."""
    if ACT == 0:
        y = x * _sigmoid(x)
    elif ACT == 2:
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == 3:
        y = gl.where(x < 0.0, 0.0, x)
    else:
        y = _sigmoid(x)
    return y


@gluon.jit
def _per_channel(pointer, first, rows, HALF: gl.constexpr):
    """One value per channel of a half tile, one in each thread that multiplies: before a tile's products, when they
    take no time, and hardly a register. `gl.convert_layout` hands them round afterwards."""
    value = first
    if pointer is not None:
        n = first + gl.arange(0, HALF, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        value = gl.load(pointer + n, mask=n < rows, other=0)
    return value


@gluon.jit
def of_channels(scale, weight_sum, bias, n, rows, HALF: gl.constexpr):
    """Scales, sums and biases of the channels of a half tile."""
    return (
        _per_channel(scale, n, rows, HALF),
        _per_channel(weight_sum, n, rows, HALF),
        _per_channel(bias, n, rows, HALF),
    )


@gluon.jit
def _channels(value, LAYOUT: gl.constexpr):
    """`[1, HALF]` as the results lie."""
    return gl.convert_layout(value, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def finished(
    acc, token, zero, has_zero: gl.constexpr, channels, has_bias: gl.constexpr, o, ow, R: gl.constexpr,
    CODES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Everything between the int32 sums and the one rounding, for one half of a part."""
    scale, weight_sum, bias = channels
    acc = gl.convert_layout(acc, LAYOUT)
    if has_zero:
        acc -= zero[:, None] * _channels(weight_sum, LAYOUT)
    channel = _channels(scale, LAYOUT)
    y = acc.to(gl.float32) * token[:, None]
    if R > 0:
        if CODES:  # both parts share the channel's scale
            y = warpgroup_mma(o, ow.permute((1, 0)), y) * channel
        else:
            y = warpgroup_mma(o, ow.permute((1, 0)), y * channel)
    else:
        y *= channel
    if has_bias:
        y += _channels(bias, LAYOUT).to(gl.float32)
    return y


@gluon.jit
def _with_residual(
    y, x, ring, full, free, step, part, BUFFERS: gl.constexpr, WIDE: gl.constexpr, PART: gl.constexpr,
    HALF: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """`y` plus what the next step of the ring brings: with one half a tile, the next two, of which one is of this
    part; the other is waited for, too, so that its buffer is not said to be free before it is filled."""
    steps: gl.constexpr = 1 if WIDE else 2
    for i in gl.static_range(steps):
        slot = step % BUFFERS
        mbarrier.wait(full.index(slot), (step // BUFFERS) & 1)
        if WIDE or part == i:
            y += ring.index(slot)._reinterpret(x.dtype, [PART, HALF], x.layout).load(LAYOUT).to(gl.float32)
        fence_async_shared()  # the buffer is read here as by any thread, and filled again by TMA
        mbarrier.arrive(free.index(slot), count=1)
        step += 1
    return y, step


@gluon.jit
def _store(c, staging, y, m, n):
    """Through shared memory, behind the previous store."""
    tma.store_wait(0)
    synchronize()
    staging.store(y)
    fence_async_shared()
    synchronize()
    tma.async_copy_shared_to_global(c, [m, n], staging)


@gluon.jit
def _products(
    left, right, a_ring, w0_ring, w1_ring, full, free, step, count, BUFFERS: gl.constexpr, WIDE: gl.constexpr
):
    """Add the products of `count` steps of the ring, and free their buffers."""
    for k in range(count):
        slot = step % BUFFERS
        mbarrier.wait(full.index(slot), (step // BUFFERS) & 1)
        left = warpgroup_mma(a_ring.index(slot), w0_ring.index(slot).permute((1, 0)), left, is_async=True)
        # What still runs is what was just issued: the buffer of the step before is free.
        if WIDE:
            right = warpgroup_mma(a_ring.index(slot), w1_ring.index(slot).permute((1, 0)), right, is_async=True)
            left, right = warpgroup_mma_wait(num_outstanding=2, deps=(left, right))
        else:
            left = warpgroup_mma_wait(num_outstanding=1, deps=(left,))
        # One thread arrives; Triton puts a barrier of these warps before it, so that all have waited.
        mbarrier.arrive(free.index((step + BUFFERS - 1) % BUFFERS), count=1, pred=k > 0)
        step += 1
    if WIDE:
        left, right = warpgroup_mma_wait(num_outstanding=0, deps=(left, right))
    else:
        left = warpgroup_mma_wait(num_outstanding=0, deps=(left,))
    mbarrier.arrive(free.index((step + BUFFERS - 1) % BUFFERS), count=1)
    return left, right, step


@gluon.jit
def _sums(
    a_ring, w0_ring, w1_ring, counts, full, free, step, K_STEPS: gl.constexpr, PER: gl.constexpr,
    BUFFERS: gl.constexpr, PART: gl.constexpr, HALF: gl.constexpr, WIDE: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """The int32 sums of one part of a tile: of high halves, if there are some, and of all codes."""
    left = gl.zeros([PART, HALF], gl.int32, ACC)
    right = gl.zeros([PART, HALF], gl.int32, ACC)
    if PER > 0:
        mbarrier.wait(full.index(step % BUFFERS), (step // BUFFERS) & 1)
        number = counts.index(step % BUFFERS).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        high_steps = gl.max(number, 0)
        if high_steps > 0:
            left, right, step = _products(
                left, right, a_ring, w0_ring, w1_ring, full, free, step, high_steps, BUFFERS, WIDE
            )  # fmt: skip
            left = left << 8
            right = right << 8
    left, right, step = _products(
        left, right, a_ring, w0_ring, w1_ring, full, free, step, K_STEPS, BUFFERS, WIDE
    )  # fmt: skip
    return left, right, step


@gluon.jit
def _multiply(
    a_ring, w0_ring, w1_ring, x_ring, counts, full, free, staging, o, x, c, scale, scale_stride, zero_point,
    zero_point_stride, weight_scale, weight_sum, bias, part: gl.constexpr, M, N, rows,
    K_STEPS: gl.constexpr, R: gl.constexpr, PER: gl.constexpr, CODES: gl.constexpr, ACT: gl.constexpr,
    NEXT: gl.constexpr, SECOND: gl.constexpr, BUFFERS: gl.constexpr,
    PART: gl.constexpr, HALF: gl.constexpr, GROUP: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Four warps: products of what has come, and the results, for one of the two parts of every tile."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, HALF, 32]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, HALF, 16]
    )
    affine: gl.constexpr = zero_point is not None
    biased: gl.constexpr = bias is not None
    tiles_m = gl.cdiv(M, 2 * PART)
    tiles_n = gl.cdiv(N, NEXT)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _position(tile, tiles_m, tiles_n, GROUP)
        m, n = tile_m * (2 * PART) + part * PART, tile_n * NEXT
        at = m + gl.arange(0, PART, layout=gl.SliceLayout(1, OUT))
        token = gl.load(scale + at.to(gl.int64) * scale_stride, mask=at < M, other=0.0)
        zero = at
        if affine:
            zero = gl.load(zero_point + at.to(gl.int64) * zero_point_stride, mask=at < M, other=0)
        channels0 = of_channels(weight_scale, weight_sum, bias, n, rows, HALF)
        channels1 = channels0
        if WIDE:
            channels1 = of_channels(weight_scale, weight_sum, bias, n + SECOND, rows, HALF)
        left, right, step = _sums(
            a_ring, w0_ring, w1_ring, counts, full, free, step, K_STEPS, PER, BUFFERS, PART, HALF, WIDE, ACC
        )  # fmt: skip
        last = step % BUFFERS
        o_tile = a_ring.index(last)
        ow0 = w0_ring.index(last)
        ow1 = w1_ring.index(last)
        if R > 0:
            mbarrier.wait(full.index(last), (step // BUFFERS) & 1)
            step += 1
            kind: gl.constexpr = o.dtype
            wide: gl.constexpr = o.layout
            depth: gl.constexpr = o.block_type.shape[1]
            o_tile = o_tile._reinterpret(kind, [PART, depth], wide)
            ow0 = ow0._reinterpret(kind, [HALF, depth], wide)
            ow1 = ow1._reinterpret(kind, [HALF, depth], wide)
        y = finished(left, token, zero, affine, channels0, biased, o_tile, ow0, R, CODES, OUT)
        if ACT < 0:
            if x is not None:
                y, step = _with_residual(y, x, x_ring, full, free, step, part, BUFFERS, WIDE, PART, HALF, OUT)
            _store(c, staging, y.to(c.dtype), m, n)
            if WIDE:
                y = finished(right, token, zero, affine, channels1, biased, o_tile, ow1, R, CODES, OUT)
                if x is not None:
                    y, step = _with_residual(y, x, x_ring, full, free, step, part, BUFFERS, WIDE, PART, HALF, OUT)
                _store(c, staging, y.to(c.dtype), m, n + SECOND)
        else:
            # Rounded after every step, as eager PyTorch does.
            gate = _activation(y.to(c.dtype).to(gl.float32), ACT).to(c.dtype)
            y = finished(right, token, zero, affine, channels1, biased, o_tile, ow1, R, CODES, OUT)
            product = (gate.to(gl.float32) * y.to(c.dtype).to(gl.float32)).to(c.dtype)
            _store(c, staging, product, m, n)
        if R > 0:
            mbarrier.arrive(free.index(last), count=1)
    tma.store_wait(0)


@gluon.jit
def linear_w8a8_wgmma(
    a, w, o, ow, x, ah, blocks, c, scale, scale_stride, zero_point, zero_point_stride, weight_scale, weight_sum, bias,
    M, N, rows,
    K: gl.constexpr, R: gl.constexpr, PER: gl.constexpr, CODES: gl.constexpr, ACT: gl.constexpr,
    NEXT: gl.constexpr, SECOND: gl.constexpr, BUFFERS: gl.constexpr,
    PART: gl.constexpr, HALF: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr, WIDE: gl.constexpr,
    REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """`N` columns of the result, `rows` of the weight. Tiles start `NEXT` columns apart, halves `SECOND` rows. A bit
    of `blocks` stands for `PER` steps of `ah`; 0: there is none."""
    a0_ring = gl.allocate_shared_memory(gl.int8, [BUFFERS, PART, BLOCK_K], a.layout)
    a1_ring = gl.allocate_shared_memory(gl.int8, [BUFFERS, PART, BLOCK_K], a.layout)
    w0_ring = gl.allocate_shared_memory(gl.int8, [BUFFERS, HALF, BLOCK_K], w.layout)
    w1_ring = w0_ring
    if WIDE:
        w1_ring = gl.allocate_shared_memory(gl.int8, [BUFFERS, HALF, BLOCK_K], w.layout)
    staging0 = gl.allocate_shared_memory(c.dtype, [PART, HALF], c.layout)
    staging1 = gl.allocate_shared_memory(c.dtype, [PART, HALF], c.layout)
    counts = gl.allocate_shared_memory(gl.int32, [BUFFERS, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    K_STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    gl.warp_specialize(
        [
            (_multiply, (
                a0_ring, w0_ring, w1_ring, w0_ring, counts, full, free, staging0, o, x, c, scale, scale_stride,
                zero_point, zero_point_stride, weight_scale, weight_sum, bias, gl.constexpr(0), M, N, rows,
                K_STEPS, R, PER, CODES, ACT, NEXT, SECOND, BUFFERS, PART, HALF, GROUP, WIDE,
            )),
            (_multiply, (
                a1_ring, w0_ring, w1_ring, w1_ring, counts, full, free, staging1, o, x, c, scale, scale_stride,
                zero_point, zero_point_stride, weight_scale, weight_sum, bias, gl.constexpr(1), M, N, rows,
                K_STEPS, R, PER, CODES, ACT, NEXT, SECOND, BUFFERS, PART, HALF, GROUP, WIDE,
            )),
            (_load, (
                a, w, o, ow, x, ah, blocks, a0_ring, a1_ring, w0_ring, w1_ring, counts, full, free, M, N,
                K_STEPS, R, PER, NEXT, SECOND, BUFFERS, PART, HALF, BLOCK_K, GROUP, WIDE,
            )),
        ],
        [4, 1],
        [REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def layout(rows: int, width: int, dtype: torch.dtype) -> Any:
    """Shared-memory layout of a tile of `rows` by `width` elements."""
    return gl.NVMMASharedLayout.get_default_for([rows, width], _GL[dtype])


def descriptor(tensor: Any, rows: int, width: int) -> Any:
    """TMA descriptor of a matrix whose rows are contiguous."""
    return TensorDescriptor.from_tensor(tensor, [rows, width], layout(rows, width, tensor.dtype))


class Launch(NamedTuple):
    """What a launch takes, and of which kernel."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def is_wide(m: int, n: int, multiprocessors: int) -> bool:
    """Whether a product takes tiles of both halves: unless those of one half do not outnumber the multiprocessors."""
    narrow = -(-m // BLOCK_M) * -(-n // HALF)
    return narrow > multiprocessors or n <= HALF


def launch(
    device: torch.device, codes: Any, scale: Any, zero_point: Any | None, weight: Any, weight_scale: Any,
    weight_sum: Any | None, bias: Any | None, outliers: Any | None, outlier_weight: Any | None, code_columns: bool,
    high: Any | None, blocks: Any | None, residual: Any | None, out: Any, act: int,
) -> Launch:  # fmt: skip
    """`codes[M, K]`, `scale[M]`, `zero_point[M]`, `weight[N, K]` → `out[M, N]`, or the gated `[M, N / 2]`: tensors, or
    what stands for them while a model is traced."""
    m, k = codes.shape
    n = out.shape[1]
    gated = act != NO_ACTIVATION
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    wide = gated or is_wide(m, n, multiprocessors)
    step, second = (HALF, n) if gated or not wide else (2 * HALF, HALF)
    r = 0 if outliers is None else outliers.shape[1]
    tiles = -(-m // BLOCK_M) * -(-n // step)
    a, w = descriptor(codes, PART, BLOCK_K), descriptor(weight, HALF, BLOCK_K)
    o = ow = None
    if r:
        assert outliers is not None
        assert outlier_weight is not None
        depth = OUTLIERS // 2 if r <= OUTLIERS // 2 else OUTLIERS
        o, ow = descriptor(outliers, PART, depth), descriptor(outlier_weight, HALF, depth)
    ah = None if high is None else descriptor(high, PART, BLOCK_K)
    x = None if residual is None else descriptor(residual, PART, HALF)
    arguments = (
        a, w, o, ow, x, ah, blocks, descriptor(out, PART, HALF), scale, scale.stride()[0],
        zero_point, 0 if zero_point is None else zero_point.stride()[0], weight_scale, weight_sum, bias,
        m, n, weight.shape[0],
    )  # fmt: skip
    constants = {
        "K": k, "R": r, "PER": 0 if high is None else numerics.block_width(k) // BLOCK_K,
        "CODES": code_columns, "ACT": act, "NEXT": step, "SECOND": second,
        "BUFFERS": BUFFERS if wide else NARROW_BUFFERS, "PART": PART, "HALF": HALF, "BLOCK_K": BLOCK_K, "GROUP": GROUP,
        "WIDE": wide, "REGISTERS": REGISTERS, "LOADER_REGISTERS": LOADER_REGISTERS, "num_warps": WARPS,
    }  # fmt: skip
    return Launch(linear_w8a8_wgmma, min(tiles, multiprocessors), arguments, constants)
