"""RMSNorm, and norms fused with the residual add before them and the quantization after them: one program per row.

Casts follow the references step by step (a norm in bf16 is rounded before it is quantized), so codes agree with them
except where a rounding tie or the order of a sum decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.ops.norm import (
    add_norm_quantize,
    add_norm_quantize_dynamic,
    norm_quantize,
    norm_quantize_dynamic,
    rms_norm,
)
from lowering.ops.norm import normalize as norm_of
from lowering.triton.columns import (
    PREPACKED_COLUMNS,
    ROW_PROGRAMS,
    ROW_PROGRAMS_THRESHOLD,
    Split,
    bits_of,
    inliers,
    outlier_columns,
    programs,
    raise_absmax,
    search,
    search_rows,
    static_split,
    store_gathered,
)
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
from lowering.triton.quantize import (
    encode,
    outlier_output,
    row_extent,
    row_outputs,
    row_scale,
    split_quantize_rows_dynamic,
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
def load_terms(x, residual, hidden, weight, bias, cols, mask):
    """All that a norm's result at `cols` is made of but the statistics: hidden value, gamma, bias (0 for none)."""
    gamma = 0.0
    if weight is not None:
        gamma = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    beta = 0.0
    if bias is not None:
        beta = tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    return load_hidden(x, residual, hidden, cols, mask), gamma, beta


@triton.jit
def normalized(
    h, gamma, beta, x, residual, hidden, weight, bias, mean, reciprocal, offset,
    LAYER: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """The norm's result from its terms, rounded where the model rounds it; in fp32."""
    y = (h - mean) * reciprocal
    element = x.dtype.element_ty if residual is None else hidden.dtype.element_ty
    if weight is None:
        y = rounded(y, element)
    elif ROUND_FIRST:
        # gamma in its own dtype, (gamma + offset) rounded to it; the product in the wider of the two dtypes.
        y = rounded(y, element).to(tl.float32) * rounded(gamma + offset, weight.dtype.element_ty).to(tl.float32)
        if weight.dtype.element_ty == element:
            y = rounded(y, element)
    else:
        y *= gamma if LAYER else gamma + offset
        if bias is not None:
            y += beta
        y = rounded(y, element)
    return y.to(tl.float32)


@triton.jit
def normalize(
    x, residual, hidden, weight, bias, cols, mask, mean, reciprocal, offset,
    LAYER: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """The norm's result at `cols`."""
    h, gamma, beta = load_terms(x, residual, hidden, weight, bias, cols, mask)
    return normalized(
        h, gamma, beta, x, residual, hidden, weight, bias, mean, reciprocal, offset, LAYER, ROUND_FIRST
    )  # fmt: skip


@writes("out")
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


@writes("hidden", "codes", "scale", "zero_point", "outliers")
@triton.jit
def _norm_quantize_kernel(
    x, x_stride, residual, residual_stride, weight, bias, marks, hidden, codes, scale, zero_point, outliers,
    eps, offset, K: tl.constexpr, R: tl.constexpr, LAYER: tl.constexpr, ROUND_FIRST: tl.constexpr,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    ask_early(weight, K, BLOCK, LINKED)
    ask_early(bias, K, BLOCK, LINKED)
    follow(LINKED)
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * K
    if residual is not None:
        residual += row * residual_stride
        hidden += row * K
    if marks is not None:  # early: loads that wait for one another
        column, taken = outlier_columns(marks, K, R, BLOCK_R)
        h, gamma, beta = load_terms(x, residual, hidden, weight, bias, column, taken)
    mean, reciprocal = row_statistics(x, residual, hidden, eps, K, LAYER, BLOCK)
    high = 0
    low = 0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = normalize(
            x, residual, hidden, weight, bias, cols, cols < K, mean, reciprocal, offset, LAYER, ROUND_FIRST
        )  # fmt: skip
        y = tl.where(cols < K, y, 0.0)
        above, below = row_extent(inliers(y, marks, cols, cols < K), SYMMETRIC)
        high = tl.maximum(high, above)
        low = tl.maximum(low, below)
    s, inverse, zero = row_scale(high, low, SYMMETRIC)
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = normalize(
            x, residual, hidden, weight, bias, cols, cols < K, mean, reciprocal, offset, LAYER, ROUND_FIRST
        )  # fmt: skip
        y = inliers(y, marks, cols, cols < K)
        # Loads before stores: the compiler merges equal loads only when nothing is written in between.
        added = load_hidden(x, residual, hidden, cols, cols < K)
        tl.store(codes + cols, encode(y, inverse, zero, SYMMETRIC), mask=cols < K)
        if residual is not None:
            tl.store(hidden + cols, rounded(added, hidden.dtype.element_ty), mask=cols < K)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)
    if marks is not None:
        value = normalized(
            h, gamma, beta, x, residual, hidden, weight, bias, mean, reciprocal, offset, LAYER, ROUND_FIRST
        )  # fmt: skip
        store_gathered(outliers + row * R, value, taken, R, BLOCK_R)


@writes("hidden", "bits")
@triton.jit
def _norm_absmax_kernel(
    x, x_stride, residual, residual_stride, weight, bias, hidden, bits, floor, eps, offset, M,
    K: tl.constexpr, BLOCK: tl.constexpr,
    LAYER: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The residual sum of `ROWS` rows, stored, and the column absmax of their norm (see `lowering.triton.columns`).

    The norm itself is computed again by the kernel that quantizes it: storing it would cost as much as reading the
    rows twice.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    cols = tl.arange(0, BLOCK)
    best = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(tl.minimum(M - first, ROWS).to(tl.int32)):
        row = first + i
        at = x + row * x_stride
        other = residual
        if residual is not None:
            other = residual + row * residual_stride
        mean, reciprocal = row_statistics(at, other, hidden, eps, K, LAYER, BLOCK)
        y = normalize(
            at, other, hidden, weight, bias, cols, cols < K, mean, reciprocal, offset, LAYER, ROUND_FIRST
        )  # fmt: skip
        best = tl.maximum(best, bits_of(tl.where(cols < K, y, 0.0)))
        if residual is not None:
            h = load_hidden(at, other, hidden, cols, cols < K)
            tl.store(hidden + row * K + cols, rounded(h, hidden.dtype.element_ty), mask=cols < K)
    raise_absmax(bits, best, cols, floor, K)


def _norm_dtype(x: torch.dtype, weight: Tensor | None, round_first: bool) -> torch.dtype:
    return torch.promote_types(x, weight.dtype) if round_first and weight is not None else x


def _hidden_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    split: Split,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _hidden_dtype(x, residual)
    if residual is not None and residual.shape != x.shape:
        x, residual = torch.broadcast_tensors(x, residual)
    rows, added = as_rows(x), None if residual is None else as_rows(residual)
    k = rows.width
    hidden = x if residual is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    codes, scale, zero_point = row_outputs(x, symmetric)
    round_first = mode == "rms_round_first"
    outliers = outlier_output(x, split, _norm_dtype(dtype, weight, round_first))
    if not empty(rows.count):
        block, warps = row_block(k)
        wrap_triton(_norm_quantize_kernel)[(rows.count,)](
            rows.data, rows.stride, None if added is None else added.data, 0 if added is None else added.stride,
            None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous(),
            split.marks, None if residual is None else hidden, codes, scale,
            None if symmetric else zero_point, outliers if split.count else None, eps, offset,
            K=k, LAYER=mode == "layer", ROUND_FIRST=round_first, SYMMETRIC=symmetric,
            BLOCK=block, LINKED=linked(x.device, rows.count), num_warps=warps, **split.constants(),
        )  # fmt: skip
    return hidden, codes, scale, zero_point, outliers


def _norm_quantize_dynamic(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    capacity: int,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two passes over the rows with the choice of columns between them."""
    dtype = _hidden_dtype(x, residual)
    rows, added = as_rows(x), None if residual is None else as_rows(residual)
    m, k, round_first = rows.count, rows.width, mode == "rms_round_first"
    hidden = x if residual is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    found = search(k, capacity, threshold, _norm_dtype(dtype, weight, round_first), x.device)
    block, warps = row_block(k)
    group = search_rows(m, 1, 1, ROW_PROGRAMS_THRESHOLD if threshold > 0.0 else ROW_PROGRAMS)
    wrap_triton(_norm_absmax_kernel)[(programs(m, group),)](
        rows.data, rows.stride, None if added is None else added.data, 0 if added is None else added.stride,
        None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous(),
        None if residual is None else hidden, *found.arguments(), eps, offset, m,
        BLOCK=block, LAYER=mode == "layer", ROUND_FIRST=round_first, ROWS=group, num_warps=warps, **found.constants(),
    )  # fmt: skip
    split, columns, overflow = found.result()
    rest = _norm_quantize(hidden, None, weight, bias, eps, offset, mode, split, symmetric)[1:]
    return (hidden, *rest, columns, overflow)


@rms_norm.impl("triton", when=lambda x, weight: takes_rows(x, weight))
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


@norm_quantize.impl("triton", when=lambda x, weight, bias: takes_rows(x, weight, bias), prepack=PREPACKED_COLUMNS)
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
    split = static_split(columns, x.shape[-1])
    return _norm_quantize(x, None, weight, bias, eps, offset, mode, split, symmetric)[1:]


@add_norm_quantize.impl(
    "triton",
    when=lambda x, residual, weight, bias: takes_rows(x, residual, weight, bias),
    prepack=PREPACKED_COLUMNS,
)
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
    split = static_split(columns, x.shape[-1])
    return _norm_quantize(x, residual, weight, bias, eps, offset, mode, split, symmetric)


def _one_block(x: Tensor, *rest: Tensor | None) -> bool | str:
    verdict = takes_rows(x, *rest)
    if verdict is True and x.shape[-1] > MAX_BLOCK:
        return f"takes rows of at most {MAX_BLOCK}"
    return verdict


def _takes_added(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool | str:
    if x.shape != residual.shape:
        return "takes a residual of the shape of x"
    return _one_block(x, residual, weight, bias)


@norm_quantize_dynamic.impl("triton", when=lambda x: takes_rows(x))
def norm_then_split_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    capacity: int,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the fused form refuses (very long rows): the norm is left to Inductor."""
    return split_quantize_rows_dynamic(norm_of(x, weight, bias, eps, offset, mode), capacity, threshold, symmetric)


@add_norm_quantize_dynamic.impl("triton", when=lambda x: takes_rows(x))
def add_then_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    capacity: int,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the fused form refuses."""
    h = torch.add(x, residual)
    return (h, *norm_then_split_quantize(h, weight, bias, eps, offset, mode, capacity, threshold, symmetric))


@norm_quantize_dynamic.impl("triton", when=lambda x, weight, bias: _one_block(x, weight, bias))
@traceable
def norm_quantize_rows_dynamic(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    capacity: int,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Column absmax of the norm, choice of columns, norm and quantization: three launches and a fill."""
    return _norm_quantize_dynamic(x, None, weight, bias, eps, offset, mode, capacity, threshold, symmetric)[1:]


@add_norm_quantize_dynamic.impl("triton", when=_takes_added)
@traceable
def add_norm_quantize_rows_dynamic(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    capacity: int,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`norm_quantize_rows_dynamic` whose first pass adds the residual and stores the sum."""
    return _norm_quantize_dynamic(x, residual, weight, bias, eps, offset, mode, capacity, threshold, symmetric)
