"""Which kernel and which tile a W8A8 linear takes: by shipped or measured tables, else by a rule for every size."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import triton
from torch import Tensor

from lowering.triton.launch import FEW_ROWS, FLOATS, expected_rows, is_hopper, overlaps
from lowering.triton.tuning import WGMMA, Choice, Tile, chosen

# (rows up to, channels up to, tile), the first that fits: best of a few on one H100 for the layers of a Llama-3-8B.
# What counts is to give 132 multiprocessors one or two tiles each. Other chips get fewer stages where shared memory
# is smaller.
Tiles = tuple[tuple[float, float, Tile], ...]
ANY = math.inf
W8A8_TILES: Tiles = (
    (16, ANY, Tile(16, 32, 256, 4, 5)),
    (32, 8448, Tile(32, 32, 256, 4, 5)),
    (32, ANY, Tile(32, 64, 256, 4, 5)),
    (64, 4224, Tile(64, 32, 256, 4, 5)),
    (64, 8448, Tile(64, 64, 256, 4, 5)),
    (64, ANY, Tile(64, 64, 128, 4, 5)),
    (128, 4224, Tile(64, 64, 256, 4, 5)),
    (256, 4224, Tile(64, 64, 128, 4, 5)),
    (128, 8448, Tile(64, 64, 128, 4, 5)),
    (256, 8448, Tile(64, 128, 128, 4, 4)),
    (ANY, ANY, Tile(128, 128, 128, 4, 3)),
)
# fp32 outliers take part without tensor cores (they have no full fp32 product), which needs registers.
W8A8_FP32_OUTLIER_TILES: Tiles = (
    (16, ANY, Tile(16, 32, 256, 4, 4)),
    (ANY, ANY, Tile(64, 64, 128, 4, 4)),
)

# Codes of 8 bits with a zero point reach 255 · 127 a product: beyond this depth an int32 sum may overflow.
MAX_K = (2**31 - 1) // (255 * 127)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory one program may use; an H100's where there is no GPU to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 227 * 1024
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024))


def choose_tile(tiles: Tiles, rows: int, n: int, k: int, bytes_per_k: tuple[int, int], shared: int) -> Tile:
    """The table's tile for `rows` and `n` channels, fitted to `k`, with as many stages as `shared` bytes hold.

    The depth is the largest that divides `k` (no masks in the loop) or, where none from 64 up does, that covers it.
    `bytes_per_k` are the sizes of one element of the left and of the right operand.
    """
    tile = next(tile for most_rows, most_n, tile in tiles if rows <= most_rows and n <= most_n)
    depth = tile.k
    while k % depth and depth > 64:
        depth //= 2
    if k % depth:
        depth = max(32, min(tile.k, triton.next_power_of_2(k)))
    stage = (tile.m * bytes_per_k[0] + tile.n * bytes_per_k[1]) * depth
    return replace(tile, k=depth, stages=max(1, min(tile.stages, shared // stage)))


_FORCED: list[Choice | None] = []


@contextmanager
def forced(choice: Choice | None) -> Iterator[None]:
    """What `measured` answers within: for the search itself, to which no table may answer."""
    _FORCED.append(choice)
    try:
        yield
    finally:
        _FORCED.pop()


def measured(device: torch.device, rows: int, n: int, k: int) -> Choice | None:
    """The choice measured for this chip and layer, if there is one."""
    return _FORCED[-1] if _FORCED else chosen(device, rows, n, k)


def count(size: int, tile: int) -> int:
    """Tiles that cover `size`, also a symbolic one."""
    return (size + tile - 1) // tile


def fits_w8a8(codes: Tensor, dtype: torch.dtype, outliers: Tensor | None = None) -> bool | str:
    """Whether the tiles take these operands."""
    if dtype not in FLOATS or (outliers is not None and outliers.dtype not in FLOATS):
        return "the Triton kernels take float32, bfloat16 and float16"
    k = codes.shape[-1]
    if not isinstance(k, int) or k == 0:
        return "the Triton kernels need a last dimension of fixed size, at least 1"
    return k <= MAX_K or f"{k} input channels may overflow an int32 sum (at most {MAX_K})"


@functools.cache
def on_hopper(device: torch.device) -> bool:
    """True for a GPU that has `wgmma`, under a Triton that has the Gluon it takes."""
    if not is_hopper(device):
        return False
    try:
        import lowering.triton.wgmma  # noqa: F401
    except ImportError:
        return False
    return True


def fills_hopper(
    codes: Tensor, weight: Tensor, dtype: torch.dtype, outliers: Tensor | None = None, columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
) -> bool | str:  # fmt: skip
    """Whether the kernel of `lowering.triton.hopper` takes a product, and has the tiles to be the faster one.

    Measured on one H100: 40 tiles are enough beyond 128 rows; up to 128, where most of a tile may be empty, 250. For
    few rows it never is.
    """
    takes = _takes_wgmma(codes, weight, dtype, outliers, columns, outlier_weight)
    if takes is not True:
        return takes
    rows, (n, k) = expected_rows(math.prod(codes.shape[:-1])), weight.shape
    if rows <= FEW_ROWS:
        return f"{rows} rows are too few for tiles of 128"
    found = measured(codes.device, rows, n, k)
    if found is not None:
        return found == WGMMA or f"{found} was measured to be faster"
    tiles = count(rows, 128) * count(n, 256)
    enough = 40 if rows > 128 else 250
    return tiles >= enough or f"{tiles} tiles are too few for persistent programs"


def on_wgmma(
    codes: Tensor, weight: Tensor, dtype: torch.dtype, outliers: Tensor | None = None, columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
) -> bool | str:  # fmt: skip
    """Whether one of the Gluon kernels takes a product that ends in no gate; for few rows it is
    `lowering.triton.hopper_few`, where it can begin early."""
    rows, (n, k) = expected_rows(math.prod(codes.shape[:-1])), weight.shape
    if rows > FEW_ROWS:
        return fills_hopper(codes, weight, dtype, outliers, columns, outlier_weight)
    takes = _takes_wgmma(codes, weight, dtype, outliers, columns, outlier_weight)
    if takes is not True:
        return takes
    found = measured(codes.device, rows, n, k)
    if found not in (None, WGMMA):
        return f"{found} was measured to be faster"
    return overlaps(codes.device) or "launches do not overlap here, and Triton's tiles are as fast"


def _takes_wgmma(
    codes: Tensor, weight: Tensor, dtype: torch.dtype, outliers: Tensor | None = None, columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
) -> bool | str:  # fmt: skip
    """Whether the Gluon kernels can make a product."""
    n, k = weight.shape
    if not on_hopper(codes.device):
        return "needs a Hopper GPU and a Triton with Gluon for it"
    if dtype not in (torch.bfloat16, torch.float16) or k % 16 or n % 16 or k > MAX_K or k == 0:
        return "takes bf16 and fp16, and N and K in multiples of 16"
    if outliers is not None:
        r = outliers.shape[-1]
        if outliers.dtype != dtype or r % 8 or not 0 < r <= 64:
            return "takes up to 64 outlier columns of the output's dtype, in multiples of 8"
        if columns is None and (outlier_weight is None or outlier_weight.dtype != dtype):
            return "takes outlier weights of the output's dtype"
    return True
