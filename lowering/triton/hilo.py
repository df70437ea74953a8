"""Outlier blocks (`lowering.ops.hilo`): the row kernels, one program per row, and the linears that read their codes.

A row stays in registers, like in plain int8 quantization; one more byte is written per value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering import numerics
from lowering.ops.hilo import (
    act_mul_quantize_hilo,
    add_norm_quantize_hilo,
    gated_linear_quantize_hilo,
    linear_w8a8_hilo,
    norm_quantize_hilo,
    quantize_hilo,
)
from lowering.triton.act import CODE, product
from lowering.triton.choice import fits_w8a8, on_wgmma
from lowering.triton.columns import floor_of
from lowering.triton.gated import fits_gated, gated_on_wgmma
from lowering.triton.launch import (
    MAX_BLOCK,
    as_rows,
    ask_early,
    empty,
    follow,
    linked,
    rounded,
    row_block,
    takes_rows,
    traceable,
    wrap_triton,
    writes,
)
from lowering.triton.linear import Hilo, tiles_product, wgmma_product
from lowering.triton.norm import load_hidden, normalize, row_statistics
from lowering.triton.quantize import encode, round_to_int, row_outputs, row_scale

REACH = tl.constexpr(float(numerics.HILO_REACH))


@triton.jit
def outlier_blocks(reach, reaches, floor, LIMIT: tl.constexpr, COUNT: tl.constexpr):
    """Bits of the blocks with outliers, of magnitudes (as bits of floats): `numerics.outlier_blocks`.

    `reach[COUNT]` is spread over the warps, `reaches[1, COUNT]` in each: what is reduced there needs no barrier.
    """
    own = reach[:, None]
    next_lower = tl.max(tl.where(reaches < own, reaches, 0), 1)
    rank = tl.sum((reaches >= own).to(tl.int32), 1)
    twice = 2.0 * next_lower.to(tl.float32, bitcast=True)
    gap = (next_lower > 0) & (reach.to(tl.float32, bitcast=True) >= twice) & (rank <= LIMIT)
    apart = reaches >= tl.min(tl.where(gap, reach, 0x7F800000), 0)
    either = apart | (reaches > floor)
    few = tl.sum(either.to(tl.int32), 1)[:, None] <= LIMIT
    chosen = (few & either) | (apart & (reaches < 0x7F800000))
    return tl.sum(tl.sum(chosen.to(tl.int32) << tl.arange(0, COUNT)[None, :], 1), 0)


@triton.jit
def hilo_scale(above, below, absmax, total, SUM: tl.constexpr, SYMMETRIC: tl.constexpr):
    """`row_scale`, or what the outliers of a row take where that is more (0 if there are none). NaN stays NaN."""
    scale, inverse, zero = row_scale(above, below, SYMMETRIC)
    needed = tl.maximum(tl.div_rn(absmax, REACH), tl.div_rn(total, SUM * 1.0), propagate_nan=tl.PropagateNan.ALL)
    if (needed > scale) | (needed != needed):
        scale = needed
        inverse = tl.div_rn(1.0, scale)
        if not SYMMETRIC:
            zero = round_to_int(below.to(tl.float32, bitcast=True) * inverse - 128.0)
    return scale, inverse, zero


@triton.jit
def row_codes(
    y, floor, K: tl.constexpr, SUM: tl.constexpr, LIMIT: tl.constexpr, COUNT: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a row, fp32 with zeros beyond `K`, is quantized by: scale, its inverse, zero point, blocks with outliers."""
    # Extents (`row_extent`) block by block: those of the inliers and those of all follow from them.
    PER: tl.constexpr = BLOCK // COUNT
    VECTOR: tl.constexpr = 16 if PER > 16 else PER
    bits = tl.reshape(y.to(tl.int32, bitcast=True), [COUNT, PER // VECTOR, VECTOR])
    if SYMMETRIC:
        up = tl.max(tl.max(bits & 0x7FFFFFFF, 2), 1)
        down = tl.zeros_like(up)
    else:  # as signed numbers, bits of negative floats are below those of others; as unsigned ones, above
        up = tl.maximum(tl.max(tl.max(bits, 2), 1), 0)
        least = tl.max(tl.max(bits.to(tl.uint32, bitcast=True), 2), 1).to(tl.int32, bitcast=True)
        down = tl.where(least < 0, least & 0x7FFFFFFF, 0)
    # To every warp, in one exchange.
    both = ((up.to(tl.int64) << 32) | down.to(tl.int64))[None, :]
    ups = (both >> 32).to(tl.int32)
    downs = both.to(tl.int32)
    reaches = tl.maximum(ups, downs)
    used = outlier_blocks(tl.maximum(up, down), reaches, floor, LIMIT, COUNT)
    total = tl.sum(tl.abs(y), 0)
    absmax = tl.max(tl.max(reaches, 1), 0).to(tl.float32, bitcast=True)
    if used == 0:
        total, absmax = 0.0, 0.0
    outside = (used >> tl.arange(0, COUNT)[None, :]) & 1 != 0
    above = tl.max(tl.max(tl.where(outside, 0, ups), 1), 0)
    below = tl.max(tl.max(tl.where(outside, 0, downs), 1), 0)
    s, inverse, zero = hilo_scale(above, below, absmax, total, SUM, SYMMETRIC)
    return s, inverse, zero, used


@triton.jit
def store_row(
    y, row, s, inverse, zero, used, codes, scale, zero_point, high, blocks,
    K: tl.constexpr, COUNT: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All results for a row."""
    cols = tl.arange(0, BLOCK)
    codes += row * K
    high += row * K
    if used != 0:
        wide = ((used >> tl.arange(0, COUNT)) & 1 != 0)[:, None]  # bounds once per block, not once per value
        code = round_to_int(tl.reshape(y, [COUNT, BLOCK // COUNT]) * inverse)
        if not SYMMETRIC:
            code += zero
        code = tl.minimum(tl.maximum(code, tl.where(wide, -32768, -128)), tl.where(wide, 32639, 127))
        code = tl.reshape(code, [BLOCK])
        tl.store(codes + cols, code.to(tl.int8), mask=cols < K)  # the low byte
        tl.store(high + cols, ((code + 128) >> 8).to(tl.int8), mask=cols < K)
    else:  # which most rows are, and which takes half the instructions
        tl.store(codes + cols, encode(y, inverse, zero, SYMMETRIC), mask=cols < K)
        tl.store(high + cols, tl.zeros([BLOCK], dtype=tl.int8), mask=cols < K)
    tl.store(blocks + row, used)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)


@writes("codes", "scale", "zero_point", "high", "blocks")
@triton.jit
def _quantize_hilo_kernel(
    x, x_stride, codes, scale, zero_point, high, blocks, floor,
    K: tl.constexpr, SUM: tl.constexpr, LIMIT: tl.constexpr, COUNT: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    follow(LINKED)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    y = tl.load(x + row * x_stride + cols, mask=cols < K, other=0.0).to(tl.float32)
    s, inverse, zero, used = row_codes(y, floor, K, SUM, LIMIT, COUNT, SYMMETRIC, BLOCK)
    if BLOCK > 8192:  # kept, it would take the registers that a second program on the multiprocessor needs
        y = tl.load(x + row * x_stride + cols, mask=cols < K, other=0.0, cache_modifier=".ca").to(tl.float32)
    store_row(
        y, row, s, inverse, zero, used, codes, scale, zero_point, high, blocks, K, COUNT, SYMMETRIC, BLOCK
    )  # fmt: skip


@writes("hidden", "codes", "scale", "zero_point", "high", "blocks")
@triton.jit
def _norm_quantize_hilo_kernel(
    x, x_stride, residual, residual_stride, weight, bias, hidden, codes, scale, zero_point, high, blocks,
    floor, eps, offset,
    K: tl.constexpr, SUM: tl.constexpr, LIMIT: tl.constexpr, COUNT: tl.constexpr, LAYER: tl.constexpr,
    ROUND_FIRST: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    ask_early(weight, K, BLOCK, LINKED)
    ask_early(bias, K, BLOCK, LINKED)
    follow(LINKED)
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    if residual is not None:
        residual += row * residual_stride
        hidden += row * K
    mean, reciprocal = row_statistics(x, residual, hidden, eps, K, LAYER, BLOCK)
    cols = tl.arange(0, BLOCK)
    y = normalize(
        x, residual, hidden, weight, bias, cols, cols < K, mean, reciprocal, offset, LAYER, ROUND_FIRST
    )  # fmt: skip
    if residual is not None:
        added = load_hidden(x, residual, hidden, cols, cols < K)
        tl.store(hidden + cols, rounded(added, hidden.dtype.element_ty), mask=cols < K)
    y = tl.where(cols < K, y, 0.0)
    s, inverse, zero, used = row_codes(y, floor, K, SUM, LIMIT, COUNT, SYMMETRIC, BLOCK)
    store_row(
        y, row, s, inverse, zero, used, codes, scale, zero_point, high, blocks, K, COUNT, SYMMETRIC, BLOCK
    )  # fmt: skip


@writes("codes", "scale", "zero_point", "high", "blocks")
@triton.jit
def _act_mul_quantize_hilo_kernel(
    gate, gate_stride, up, up_stride, codes, scale, zero_point, high, blocks, floor,
    K: tl.constexpr, SUM: tl.constexpr, LIMIT: tl.constexpr, COUNT: tl.constexpr, ACT: tl.constexpr,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    follow(LINKED)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    y = product(gate + row * gate_stride, up + row * up_stride, cols, cols < K, ACT)
    s, inverse, zero, used = row_codes(y, floor, K, SUM, LIMIT, COUNT, SYMMETRIC, BLOCK)
    store_row(
        y, row, s, inverse, zero, used, codes, scale, zero_point, high, blocks, K, COUNT, SYMMETRIC, BLOCK
    )  # fmt: skip


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
    assert block >= k
    return {
        "K": k, "SUM": numerics.hilo_sum(k), "LIMIT": numerics.HILO_BLOCKS,
        "COUNT": max(1, block // numerics.block_width(k)), "SYMMETRIC": symmetric, "BLOCK": block, "num_warps": warps,
    }  # fmt: skip


def _takes(*tensors: Tensor | None) -> bool | str:
    verdict = takes_rows(*tensors)
    if verdict is True and tensors[0] is not None and tensors[0].shape[-1] > MAX_BLOCK:
        return f"takes rows of at most {MAX_BLOCK}"
    return verdict


# Longer rows than stay in registers: plain tensor code, which Inductor compiles.
for _op in (quantize_hilo, norm_quantize_hilo, add_norm_quantize_hilo):
    _op.impl("triton", when=lambda x: takes_rows(x))(_op.reference)
act_mul_quantize_hilo.impl("triton", when=lambda gate: takes_rows(gate))(act_mul_quantize_hilo.reference)


@quantize_hilo.impl("triton", when=lambda x: _takes(x))
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
            floor_of(threshold), LINKED=linked(x.device, rows.count), **_constants(rows.width, symmetric),
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
            floor_of(threshold), eps, offset,
            LAYER=mode == "layer", ROUND_FIRST=mode == "rms_round_first", LINKED=linked(x.device, rows.count),
            **_constants(rows.width, symmetric),
        )  # fmt: skip
    return hidden, codes, scale, zero_point, high, blocks


@norm_quantize_hilo.impl("triton", when=lambda x, weight, bias: _takes(x, weight, bias))
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


@add_norm_quantize_hilo.impl("triton", when=lambda x, residual, weight, bias: _takes(x, residual, weight, bias))
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
    "triton", when=lambda gate, up, act: _takes(gate, up) if act in CODE else f"activation {act!r} is unknown"
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
            blocks, floor_of(threshold), ACT=CODE[act], LINKED=linked(gate.device, gates.count),
            **_constants(gates.width, symmetric),
        )  # fmt: skip
    return codes, scale, zero_point, high, blocks


# -- the linears that read them


@linear_w8a8_hilo.impl("triton", when=fits_w8a8)
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


@linear_w8a8_hilo.impl("triton", when=on_wgmma)
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
    """On Hopper: `lowering.triton.wgmma`."""
    linear = (codes, scale, zero_point, weight, weight_scale, weight_sum, bias, None, None, None, dtype)
    return wgmma_product(*linear, hilo=Hilo(high, blocks))


@gated_linear_quantize_hilo.impl("triton", when=fits_gated)
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


@gated_linear_quantize_hilo.impl("triton", when=gated_on_wgmma)
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
