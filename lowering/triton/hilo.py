"""Outliers value by value (`lowering.ops.hilo`): the row kernels, one program per row, and the linears that read them.

One pass over the row, like plain int8 quantization, and one more byte written per value. A row without outliers is done
with the first statistics; one with some takes them again without those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering import numerics
from lowering.ops.hilo import (
    MAX_K,
    act_mul_quantize_hilo,
    add_norm_quantize_hilo,
    gated_linear_quantize_hilo,
    linear_w8a8_hilo,
    norm_quantize_hilo,
    quantize_hilo,
)
from lowering.triton.act import CODE, product
from lowering.triton.columns import floor_of
from lowering.triton.gated import IN_EPILOGUE
from lowering.triton.launch import as_rows, empty, rounded, row_block, takes_rows, traceable, wrap_triton
from lowering.triton.linear import Hilo, either, fills_hopper, fits_w8a8, tiles_product, wgmma_product
from lowering.triton.norm import load_hidden, normalize, row_statistics
from lowering.triton.quantize import round_to_int, row_extent, row_outputs, row_scale

REACH = tl.constexpr(float(numerics.HILO_REACH))


@triton.jit
def inlier(y, threshold):
    """`y` with 0 where it is an outlier; NaN is none, and makes the scale NaN."""
    return tl.where(tl.abs(y) > threshold, 0.0, y)


@triton.jit
def hilo_scale(high, low, needed, SYMMETRIC: tl.constexpr):
    """`row_scale`, or what the outliers need where that is more."""
    scale, inverse, zero = row_scale(high, low, SYMMETRIC)
    if needed > scale:
        scale = needed
        inverse = tl.div_rn(1.0, scale)
        if not SYMMETRIC:
            zero = round_to_int(low.to(tl.float32, bitcast=True) * inverse - 128.0)
    return scale, inverse, zero


@triton.jit
def hilo_needs(absmax, total, SUM: tl.constexpr):
    """The scale below which an outlier would leave int16, or the sum of a product int32."""
    return tl.maximum(tl.div_rn(absmax.to(tl.float32, bitcast=True), REACH), tl.div_rn(total, SUM * 1.0))


@triton.jit
def store_hilo(
    y, inverse, zero, threshold, codes, high, cols, K: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr
):  # fmt: skip
    """Write both halves of a piece of a row; the blocks in which a high half is not 0, as bits."""
    code = round_to_int(y * inverse)
    if not SYMMETRIC:
        code += zero
    low = tl.minimum(tl.maximum(code, -128), 127)
    code = tl.where(tl.abs(y) > threshold, tl.minimum(tl.maximum(code, -32768), 32639), low)
    upper = (code + 128) >> 8
    tl.store(codes + cols, (code - (upper << 8)).to(tl.int8), mask=cols < K)
    tl.store(high + cols, upper.to(tl.int8), mask=cols < K)
    return tl.reduce(tl.where((upper != 0) & (cols < K), 1 << (cols // GROUP), 0), 0, either)


@triton.jit
def _quantize_hilo_kernel(
    x, x_stride, codes, scale, zero_point, high, blocks, threshold, floor,
    K: tl.constexpr, SUM: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    upper = 0
    lower = 0
    needed = 0.0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        above, below = row_extent(tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32), SYMMETRIC)
        upper = tl.maximum(upper, above)
        lower = tl.maximum(lower, below)
    absmax = tl.maximum(upper, lower)
    if absmax > floor:
        upper = 0
        lower = 0
        total = 0.0
        for start in range(0, K, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            y = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
            above, below = row_extent(inlier(y, threshold), SYMMETRIC)
            upper = tl.maximum(upper, above)
            lower = tl.maximum(lower, below)
            total += tl.sum(tl.abs(y), 0)
        needed = hilo_needs(absmax, total, SUM)
    s, inverse, zero = hilo_scale(upper, lower, needed, SYMMETRIC)
    used = 0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        used |= store_hilo(
            y, inverse, zero, threshold, codes + row * K, high + row * K, cols, K, GROUP, SYMMETRIC
        )  # fmt: skip
    tl.store(blocks + row, used)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)


@triton.jit
def _norm_quantize_hilo_kernel(
    x, x_stride, residual, residual_stride, weight, bias, hidden, codes, scale, zero_point, high, blocks,
    threshold, floor, eps, offset,
    K: tl.constexpr, SUM: tl.constexpr, GROUP: tl.constexpr, LAYER: tl.constexpr, ROUND_FIRST: tl.constexpr,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    if residual is not None:
        residual += row * residual_stride
        hidden += row * K
    mean, reciprocal = row_statistics(x, residual, hidden, eps, K, LAYER, BLOCK)
    upper = 0
    lower = 0
    needed = 0.0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = normalize(
            x, residual, hidden, weight, bias, cols, cols < K, mean, reciprocal, offset, LAYER, ROUND_FIRST
        )  # fmt: skip
        above, below = row_extent(tl.where(cols < K, y, 0.0), SYMMETRIC)
        upper = tl.maximum(upper, above)
        lower = tl.maximum(lower, below)
    absmax = tl.maximum(upper, lower)
    if absmax > floor:
        upper = 0
        lower = 0
        total = 0.0
        for start in range(0, K, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            y = normalize(
                x, residual, hidden, weight, bias, cols, cols < K, mean, reciprocal, offset, LAYER, ROUND_FIRST
            )  # fmt: skip
            y = tl.where(cols < K, y, 0.0)
            above, below = row_extent(inlier(y, threshold), SYMMETRIC)
            upper = tl.maximum(upper, above)
            lower = tl.maximum(lower, below)
            total += tl.sum(tl.abs(y), 0)
        needed = hilo_needs(absmax, total, SUM)
    s, inverse, zero = hilo_scale(upper, lower, needed, SYMMETRIC)
    used = 0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = normalize(
            x, residual, hidden, weight, bias, cols, cols < K, mean, reciprocal, offset, LAYER, ROUND_FIRST
        )  # fmt: skip
        # Loads before stores: the compiler merges equal loads only when nothing is written in between.
        added = load_hidden(x, residual, hidden, cols, cols < K)
        used |= store_hilo(
            y, inverse, zero, threshold, codes + row * K, high + row * K, cols, K, GROUP, SYMMETRIC
        )  # fmt: skip
        if residual is not None:
            tl.store(hidden + cols, rounded(added, hidden.dtype.element_ty), mask=cols < K)
    tl.store(blocks + row, used)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)


@triton.jit
def _act_mul_quantize_hilo_kernel(
    gate, gate_stride, up, up_stride, codes, scale, zero_point, high, blocks, threshold, floor,
    K: tl.constexpr, SUM: tl.constexpr, GROUP: tl.constexpr, ACT: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gate += row * gate_stride
    up += row * up_stride
    upper = 0
    lower = 0
    needed = 0.0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        above, below = row_extent(product(gate, up, cols, cols < K, ACT), SYMMETRIC)
        upper = tl.maximum(upper, above)
        lower = tl.maximum(lower, below)
    absmax = tl.maximum(upper, lower)
    if absmax > floor:
        upper = 0
        lower = 0
        total = 0.0
        for start in range(0, K, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            y = product(gate, up, cols, cols < K, ACT)
            above, below = row_extent(inlier(y, threshold), SYMMETRIC)
            upper = tl.maximum(upper, above)
            lower = tl.maximum(lower, below)
            total += tl.sum(tl.abs(y), 0)
        needed = hilo_needs(absmax, total, SUM)
    s, inverse, zero = hilo_scale(upper, lower, needed, SYMMETRIC)
    used = 0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = product(gate, up, cols, cols < K, ACT)
        used |= store_hilo(
            y, inverse, zero, threshold, codes + row * K, high + row * K, cols, K, GROUP, SYMMETRIC
        )  # fmt: skip
    tl.store(blocks + row, used)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)


# ---------------------------------------------------------------------------------------------------------------------
# Host side

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(like: Tensor, symmetric: bool) -> Five:
    """Memory for the results: those of plain int8, then high halves and blocks."""
    blocks = torch.empty((*like.shape[:-1], 1), dtype=torch.int32, device=like.device)
    return (*row_outputs(like, symmetric), torch.empty(like.shape, dtype=torch.int8, device=like.device), blocks)


def _constants(k: int, symmetric: bool) -> dict[str, int]:
    """Constants of all row kernels."""
    block, warps = row_block(k)
    return {
        "K": k, "SUM": numerics.hilo_sum(k), "GROUP": numerics.block_width(k), "SYMMETRIC": symmetric,
        "BLOCK": block, "num_warps": warps,
    }  # fmt: skip


def _takes(*tensors: Tensor | None) -> bool | str:
    verdict = takes_rows(*tensors)
    width = tensors[0].shape[-1] if tensors[0] is not None and tensors[0].dim() else 0
    if verdict is True and width > MAX_K:
        return f"takes at most {MAX_K} channels"
    return verdict


@quantize_hilo.impl("triton", when=lambda x, *rest: _takes(x))
@traceable
def quantize_hilo_rows(
    x: Tensor, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One launch."""
    rows = as_rows(x)
    codes, scale, zero_point, high, blocks = _outputs(x, symmetric)
    if not empty(rows.count):
        wrap_triton(_quantize_hilo_kernel)[(rows.count,)](
            rows.data, rows.stride, codes, scale, None if symmetric else zero_point, high, blocks,
            threshold, floor_of(threshold), **_constants(rows.width, symmetric),
        )  # fmt: skip
    return codes, scale, zero_point, high, blocks


def _norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden = x
    if residual is not None:
        if residual.shape != x.shape:
            x, residual = torch.broadcast_tensors(x, residual)
        hidden = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    rows, added = as_rows(x), None if residual is None else as_rows(residual)
    codes, scale, zero_point, high, blocks = _outputs(x, symmetric)
    if not empty(rows.count):
        wrap_triton(_norm_quantize_hilo_kernel)[(rows.count,)](
            rows.data, rows.stride, None if added is None else added.data, 0 if added is None else added.stride,
            None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous(),
            None if residual is None else hidden, codes, scale, None if symmetric else zero_point, high, blocks,
            threshold, floor_of(threshold), eps, offset,
            LAYER=mode == "layer", ROUND_FIRST=mode == "rms_round_first", **_constants(rows.width, symmetric),
        )  # fmt: skip
    return hidden, codes, scale, zero_point, high, blocks


@norm_quantize_hilo.impl("triton", when=lambda x, weight, bias, *rest: _takes(x, weight, bias))
@traceable
def norm_quantize_hilo_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Norm and quantization in one launch."""
    return _norm_quantize(x, None, weight, bias, eps, offset, mode, threshold, symmetric)[1:]


@add_norm_quantize_hilo.impl("triton", when=lambda x, residual, weight, bias, *rest: _takes(x, residual, weight, bias))
@traceable
def add_norm_quantize_hilo_rows(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Residual add, norm and quantization in one launch."""
    return _norm_quantize(x, residual, weight, bias, eps, offset, mode, threshold, symmetric)


@act_mul_quantize_hilo.impl(
    "triton", when=lambda gate, up, act, *rest: _takes(gate, up) if act in CODE else f"activation {act!r} is unknown"
)
@traceable
def act_mul_quantize_hilo_rows(
    gate: Tensor, up: Tensor, act: str, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Activation, product and quantization in one launch; halves of a merged gate/up stay views."""
    if gate.shape != up.shape:
        gate, up = torch.broadcast_tensors(gate, up)
    gates, ups = as_rows(gate), as_rows(up)
    codes, scale, zero_point, high, blocks = _outputs(gate, symmetric)
    if not empty(gates.count):
        wrap_triton(_act_mul_quantize_hilo_kernel)[(gates.count,)](
            gates.data, gates.stride, ups.data, ups.stride, codes, scale, None if symmetric else zero_point, high,
            blocks, threshold, floor_of(threshold), ACT=CODE[act], **_constants(gates.width, symmetric),
        )  # fmt: skip
    return codes, scale, zero_point, high, blocks


# -- the linears that read them


def _fits(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    high: Tensor,
    blocks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> bool | str:
    return fits_w8a8(codes, None, dtype)


def _in_tiles_of_hopper(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    high: Tensor,
    blocks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> bool | str:
    return fills_hopper(codes, weight, None, None, None, dtype)


@linear_w8a8_hilo.impl("triton", when=_fits)
@traceable
def linear_w8a8_hilo_tiles(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    high: Tensor,
    blocks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """One launch: the product of the low halves, then of the blocks that have high ones."""
    none = (None, None, None)
    return tiles_product(
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, *none, dtype, Hilo(high, blocks)
    )


@linear_w8a8_hilo.impl("triton", when=_in_tiles_of_hopper)
def linear_w8a8_hilo_wgmma(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    high: Tensor,
    blocks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Many rows on Hopper: `lowering.triton.hopper`."""
    linear = (codes, scale, zero_point, weight, weight_scale, weight_sum, bias, None, None, None, dtype)
    return wgmma_product(*linear, hilo=Hilo(high, blocks))


def _gated_fits(codes: Tensor, *rest: object) -> bool | str:
    if rest[9] not in CODE:
        return f"activation {rest[9]!r} is none of {', '.join(CODE)}"
    weight, dtype = rest[4], rest[8]
    if isinstance(weight, Tensor) and weight.shape[0] < 2:
        return "takes at least one channel of each half"
    assert isinstance(dtype, torch.dtype)
    return fits_w8a8(codes, None, dtype)


def _in_epilogue(codes: Tensor, *rest: object) -> bool | str:
    weight, dtype, act = rest[4], rest[8], rest[9]
    assert isinstance(weight, Tensor)
    assert isinstance(dtype, torch.dtype)
    if act not in IN_EPILOGUE:
        return f"takes {', '.join(IN_EPILOGUE)}"
    if weight.shape[0] % 32:
        return "takes halves in multiples of 16 channels"
    return fills_hopper(codes, weight, None, None, None, dtype)


@gated_linear_quantize_hilo.impl("triton", when=_gated_fits)
def gated_linear_then_hilo_rows(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    high: Tensor,
    blocks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    act: str,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The linear, then the row kernel."""
    linear = (codes, scale, zero_point, high, blocks, weight, weight_scale, weight_sum, bias, dtype)
    gate, up = linear_w8a8_hilo.choose("triton", linear).function(*linear).chunk(2, -1)
    return act_mul_quantize_hilo_rows(gate, up, act, threshold, symmetric)


@gated_linear_quantize_hilo.impl("triton", when=_in_epilogue)
def gated_linear_hilo_wgmma(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    high: Tensor,
    blocks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    act: str,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The product comes out of the linear."""
    linear = (codes, scale, zero_point, weight, weight_scale, weight_sum, bias, None, None, None, dtype)
    return quantize_hilo_rows(
        wgmma_product(*linear, act=CODE[act], hilo=Hilo(high, blocks)), threshold, symmetric
    )  # fmt: skip
