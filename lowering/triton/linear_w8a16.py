"""Linear layers of float rows and int8 weights (W8A16): what decides is how fast the weights are read.

Few rows are waited for by nobody but the weights, so that a sum with a residual is made here too, before the one
rounding: a kernel of its own would take as long to start as its work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.ops.linear import linear_w8a16, linear_w8a16_add
from lowering.triton.choice import ANY, Tiles, choose_tile, count, shared_memory
from lowering.triton.launch import (
    INTERPRETED,
    Rows,
    as_rows,
    empty,
    expected_rows,
    rounded,
    takes_rows,
    traceable,
    wrap_triton,
    writes,
)
from lowering.triton.linear import GROUP_M, load_tile, store_tile, tile_position, weight_rows
from lowering.triton.tuning import Tile

W8A16_TILES: Tiles = (
    (16, 4224, Tile(16, 32, 256, 4, 6)),
    (16, 8448, Tile(16, 32, 256, 4, 4)),
    (16, ANY, Tile(16, 32, 256, 4, 2)),
    (32, 8448, Tile(32, 32, 256, 4, 4)),
    (32, ANY, Tile(32, 64, 128, 4, 4)),
    (64, 8448, Tile(64, 32, 256, 4, 3)),
    (64, ANY, Tile(64, 64, 128, 4, 4)),
    (512, 8448, Tile(64, 128, 64, 4, 4)),
    (ANY, ANY, Tile(128, 128, 64, 8, 3)),
)
W8A16_FP32_TILES: Tiles = (
    (16, ANY, Tile(16, 32, 64, 4, 3)),
    (ANY, ANY, Tile(64, 64, 32, 8, 3)),
)
MOST_ROWS = max(tile.m for *_, tile in (*W8A16_TILES, *W8A16_FP32_TILES))
# One row: channels and depth of a program's step, its warps, and how many steps its loads are ahead, the more where K
# is deep. Best of 91 forms on one H100, 0.69 to 0.90 of the time that loads take which are waited for at once.
GEMV_ROWS, GEMV_BLOCK, GEMV_WARPS = 4, 512, 2
GEMV_STAGES, GEMV_STAGES_DEEP, GEMV_DEEP = 3, 4, 8192


@writes("out")
@triton.jit
def _linear_w8a16_kernel(
    x, x_stride, weight, weight_stride, weight_scale, bias, residual, residual_stride, out, M, N,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN_N: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    first_m = (tile_m * BLOCK_M).to(tl.int64)
    first_n = (tile_n * BLOCK_N).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    has_row = rows < M - tile_m * BLOCK_M
    has_col = cols < N - tile_n * BLOCK_N
    depth = tl.arange(0, BLOCK_K)
    x_pointers = x + first_m * x_stride + (rows[:, None] * x_stride + depth[None, :])
    w_pointers = weight + first_n * weight_stride + (cols[:, None] * weight_stride + depth[None, :])
    y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a = load_tile(x_pointers, has_row, depth < K - start, False, K % BLOCK_K == 0)
        w = load_tile(w_pointers, has_col, depth < K - start, EVEN_N, K % BLOCK_K == 0)
        # A code fits bf16 and fp16 exactly; the channel's scale comes after the sum.
        if INTERPRETED:
            a, w = a.to(tl.float32), w.to(tl.float32)
        else:
            w = w.to(x.dtype.element_ty)
        y = tl.dot(a, w.T, y, input_precision="ieee")
        x_pointers += BLOCK_K
        w_pointers += BLOCK_K
    y *= tl.load(weight_scale + first_n + cols, mask=has_col, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + first_n + cols, mask=has_col, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        residual += first_m * residual_stride + first_n
        added = residual + (rows[:, None] * residual_stride + cols[None, :])
        y += tl.load(added, mask=has_row[:, None] & has_col[None, :], other=0.0).to(tl.float32)
    store_tile(out, y, first_m, first_n, rows, cols, has_row, has_col, N)


@writes("out")
@triton.jit
def _gemv_w8a16_kernel(
    x, weight, weight_stride, weight_scale, bias, residual, out, N,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """One row of `x`: no tensor core, each program streams `BLOCK_N` rows of the weight, `STAGES` - 1 steps ahead."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_col = n < N
    depth = tl.arange(0, BLOCK_K)
    w_pointers = weight + (n.to(tl.int64)[:, None] * weight_stride + depth[None, :])
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            a = tl.load(x + start + depth)
        else:
            a = tl.load(x + start + depth, mask=depth < K - start, other=0.0)
        w = load_tile(w_pointers, has_col, depth < K - start, EVEN_N, K % BLOCK_K == 0)
        total += a.to(tl.float32)[None, :] * w.to(tl.float32)
        w_pointers += BLOCK_K
    y = tl.sum(total, 1) * tl.load(weight_scale + n, mask=has_col, other=0.0)
    if bias is not None:
        y += tl.load(bias + n, mask=has_col, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + n, mask=has_col, other=0.0).to(tl.float32)
    tl.store(out + n, rounded(y, out.dtype.element_ty), mask=has_col)


def _near(x: Tensor) -> Rows:
    """`x` as rows; copied, where those of a tile lie so far apart that 32 bits cannot count the elements between."""
    rows = as_rows(x)
    far = isinstance(rows.stride, int) and rows.stride * MOST_ROWS >= 2**31
    return as_rows(x.contiguous()) if far else rows


def _product(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """One launch: a product without tensor cores for a single row, else the weight tile widened to the type of `x`."""
    rows = _near(x)
    m, k, n = rows.count, rows.width, weight.shape[0]
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if empty(m) or empty(n):
        return out
    weight, weight_scale = weight_rows(weight), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    added = None if residual is None else _near(residual)
    if isinstance(m, int) and m == 1:
        block = min(GEMV_BLOCK, triton.next_power_of_2(k))
        wrap_triton(_gemv_w8a16_kernel)[(count(n, GEMV_ROWS),)](
            rows.data, weight, weight.stride(0), weight_scale, bias, None if added is None else added.data, out, n,
            K=k, BLOCK_N=GEMV_ROWS, BLOCK_K=block, STAGES=GEMV_STAGES_DEEP if k > GEMV_DEEP else GEMV_STAGES,
            EVEN_N=n % GEMV_ROWS == 0, num_warps=GEMV_WARPS,
        )  # fmt: skip
        return out
    tiles = W8A16_FP32_TILES if x.dtype == torch.float32 else W8A16_TILES
    # The widened weight tile passes through shared memory beside the stages: leave room for it.
    sizes = (x.dtype.itemsize, 1 + x.dtype.itemsize)
    tile = choose_tile(tiles, expected_rows(m), n, k, sizes, shared_memory(x.device))
    wrap_triton(_linear_w8a16_kernel)[(count(m, tile.m) * count(n, tile.n),)](
        rows.data, rows.stride, weight, weight.stride(0), weight_scale, bias,
        None if added is None else added.data, 0 if added is None else added.stride, out, m, n,
        K=k, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP_M,
        EVEN_N=n % tile.n == 0, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@linear_w8a16.impl("triton", when=lambda x: takes_rows(x))
@traceable
def linear_w8a16_tiles(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """In one launch."""
    return _product(x, weight, weight_scale, bias, None)


@linear_w8a16_add.impl("triton", when=lambda x: takes_rows(x), composed=True)
def linear_w8a16_then_add(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    """The linear in fp32, then the sum."""
    y = linear_w8a16_tiles(x.float(), weight, weight_scale, bias)
    return (y + residual.float()).to(x.dtype)


def _takes_added(x: Tensor, weight: Tensor, residual: Tensor) -> bool | str:
    if residual.shape != (*x.shape[:-1], weight.shape[0]):
        return "takes a residual of the result's shape"
    return takes_rows(x, residual)


@linear_w8a16_add.impl("triton", when=_takes_added)
@traceable
def linear_w8a16_add_tiles(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    """In one launch, with the residual."""
    return _product(x, weight, weight_scale, bias, residual)
