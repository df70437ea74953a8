"""RMSNorm, and norms fused with the residual add before them and the quantization after them: one program per row.

Casts follow the references step by step (a norm in bf16 is rounded before it is quantized), so codes agree with them
except where a rounding tie or the order of a sum decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.ops.norm import add_norm_quantize, norm_quantize, rms_norm
from lowering.triton.launch import as_rows, empty, rounded, row_block, takes_rows, traceable, wrap_triton
from lowering.triton.quantize import (
    _split_columns,
    drop_columns,
    encode,
    removed_columns,
    row_extent,
    row_outputs,
    row_scale,
)


@triton.jit
def load_hidden(x, residual, hidden, at, mask):
    """`x`, or `x + residual` rounded as `hidden` is; in fp32."""
    h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        h = rounded(h, hidden.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def row_statistics(x, residual, hidden, eps, K: tl.constexpr, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """Mean (0 for RMSNorm) and reciprocal root of variance or mean square. Two passes: no cancellation."""
    mean = 0.0
    if LAYER:
        for start in range(0, K, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mean += tl.sum(load_hidden(x, residual, hidden, cols, cols < K), 0)
        mean = mean / K
    square = 0.0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        centred = load_hidden(x, residual, hidden, cols, cols < K) - mean
        square += tl.sum(tl.where(cols < K, centred * centred, 0.0), 0)
    return mean, tl.rsqrt(square / K + eps)


@triton.jit
def normalize(
    x, residual, hidden, weight, bias, cols, mask, mean, reciprocal, offset,
    LAYER: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """The norm's result at `cols`, rounded where the model rounds it; in fp32."""
    y = (load_hidden(x, residual, hidden, cols, mask) - mean) * reciprocal
    element = x.dtype.element_ty if residual is None else hidden.dtype.element_ty
    if weight is None:
        y = rounded(y, element)
    elif ROUND_FIRST:
        # gamma in its own dtype, (gamma + offset) rounded to it; the product in the wider of the two dtypes.
        gamma = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32) + offset
        y = rounded(y, element).to(tl.float32) * rounded(gamma, weight.dtype.element_ty).to(tl.float32)
        if weight.dtype.element_ty == element:
            y = rounded(y, element)
    else:
        gamma = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
        y *= gamma if LAYER else gamma + offset
        if bias is not None:
            y += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
        y = rounded(y, element)
    return y.to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x, x_stride, weight, out, eps, offset, K: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    mean, reciprocal = row_statistics(x, None, None, eps, K, False, BLOCK)
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = normalize(x, None, None, weight, None, cols, cols < K, mean, reciprocal, offset, False, ROUND_FIRST)
        tl.store(out + row * K + cols, rounded(y, out.dtype.element_ty), mask=cols < K)


@triton.jit
def _norm_quantize_kernel(
    x, x_stride, residual, residual_stride, weight, bias, removed, columns,
    hidden, codes, scale, zero_point, outliers, eps, offset,
    K: tl.constexpr, R: tl.constexpr, LAYER: tl.constexpr, ROUND_FIRST: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * K
    if residual is not None:
        residual += row * residual_stride
        hidden += row * K
    mean, reciprocal = row_statistics(x, residual, hidden, eps, K, LAYER, BLOCK)
    high = 0
    low = 0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = normalize(
            x, residual, hidden, weight, bias, cols, cols < K, mean, reciprocal, offset, LAYER, ROUND_FIRST
        )  # fmt: skip
        y = tl.where(cols < K, y, 0.0)
        above, below = row_extent(drop_columns(y, removed, cols, cols < K), SYMMETRIC)
        high = tl.maximum(high, above)
        low = tl.maximum(low, below)
    s, inverse, zero = row_scale(high, low, SYMMETRIC)
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = normalize(
            x, residual, hidden, weight, bias, cols, cols < K, mean, reciprocal, offset, LAYER, ROUND_FIRST
        )  # fmt: skip
        y = drop_columns(y, removed, cols, cols < K)
        # Loads before stores: the compiler merges equal loads only when nothing is written in between.
        h = load_hidden(x, residual, hidden, cols, cols < K)
        tl.store(codes + cols, encode(y, inverse, zero, SYMMETRIC), mask=cols < K)
        if residual is not None:
            tl.store(hidden + cols, rounded(h, hidden.dtype.element_ty), mask=cols < K)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)
    if R > 0:
        # Computed again for these few columns: cheaper than a trip of the row through shared memory.
        r = tl.arange(0, BLOCK_R)
        column = tl.load(columns + r, mask=r < R, other=0)
        value = normalize(
            x, residual, hidden, weight, bias, column, r < R, mean, reciprocal, offset, LAYER, ROUND_FIRST
        )  # fmt: skip
        tl.store(outliers + row * R + r, rounded(value, outliers.dtype.element_ty), mask=r < R)


def _norm_dtype(x: torch.dtype, weight: Tensor | None, round_first: bool) -> torch.dtype:
    return torch.promote_types(x, weight.dtype) if round_first and weight is not None else x


def _norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    columns: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if residual is not None and residual.shape != x.shape:
        x, residual = torch.broadcast_tensors(x, residual)
    rows, added = as_rows(x), None if residual is None else as_rows(residual)
    k = rows.width
    hidden = x if residual is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    codes, scale, zero_point = row_outputs(x, symmetric)
    columns = None if columns is None else _split_columns(columns)
    r = 0 if columns is None else columns.shape[0]
    round_first = mode == "rms_round_first"
    outliers = torch.empty((*x.shape[:-1], r), dtype=_norm_dtype(dtype, weight, round_first), device=x.device)
    if not empty(rows.count):
        block, warps = row_block(k)
        wrap_triton(_norm_quantize_kernel)[(rows.count,)](
            rows.data, rows.stride, None if added is None else added.data, 0 if added is None else added.stride,
            None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous(),
            None if columns is None else removed_columns(k, columns), columns,
            None if residual is None else hidden, codes, scale,
            None if symmetric else zero_point, outliers if r else None, eps, offset,
            K=k, R=r, LAYER=mode == "layer", ROUND_FIRST=round_first, SYMMETRIC=symmetric,
            BLOCK=block, BLOCK_R=triton.next_power_of_2(max(r, 1)), num_warps=warps,
        )  # fmt: skip
    return hidden, codes, scale, zero_point, outliers


@rms_norm.impl("triton", when=lambda x, weight, *rest: takes_rows(x, weight))
@traceable
def rms_norm_rows(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> Tensor:
    """One launch, statistics in fp32, the result rounded in the model's own order."""
    rows = as_rows(x)
    k = rows.width
    out = torch.empty(x.shape, dtype=_norm_dtype(x.dtype, weight, round_first), device=x.device)
    if not empty(rows.count):
        block, warps = row_block(k)
        wrap_triton(_rms_norm_kernel)[(rows.count,)](
            rows.data, rows.stride, None if weight is None else weight.contiguous(), out, eps, offset,
            K=k, ROUND_FIRST=round_first, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


@norm_quantize.impl("triton", when=lambda x, weight, bias, *rest: takes_rows(x, weight, bias))
@traceable
def norm_quantize_rows(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    columns: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm, quantization and outlier gather in one launch."""
    return _norm_quantize(x, None, weight, bias, eps, offset, mode, columns, symmetric)[1:]


@add_norm_quantize.impl("triton", when=lambda x, residual, weight, bias, *rest: takes_rows(x, residual, weight, bias))
@traceable
def add_norm_quantize_rows(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    columns: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`norm_quantize_rows` that adds the residual first and writes the sum as well, still one launch."""
    return _norm_quantize(x, residual, weight, bias, eps, offset, mode, columns, symmetric)
