"""Activation products of gated MLPs with the quantization of their result: one program per row, one launch."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.ops.act import ACTIVATIONS, act_mul_quantize, act_mul_quantize_dynamic
from lowering.triton.columns import (
    PREPACKED_COLUMNS,
    SEARCH_COLUMNS,
    SEARCH_ROWS,
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
    as_rows,
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
from lowering.triton.quantize import encode, outlier_output, row_extent, row_outputs, row_scale

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
RELU = tl.constexpr(3)
SIGMOID = tl.constexpr(4)
CODE = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "sigmoid": 4}


@triton.jit
def activation(x, ACT: tl.constexpr):
    """One of `ACTIVATIONS` on fp32 values; NaN stays NaN."""
    if ACT == SILU:
        y = x * tl.sigmoid(x)
    elif ACT == GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == GELU_TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == RELU:
        y = tl.where(x < 0.0, 0.0, x)
    else:
        y = tl.sigmoid(x)
    return y


@triton.jit
def product(gate, up, cols, mask, ACT: tl.constexpr):
    """`act(gate) · up` at `cols`, rounded after either step as eager PyTorch does; in fp32."""
    g = tl.load(gate + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + cols, mask=mask, other=0.0).to(tl.float32)
    y = rounded(activation(g, ACT), gate.dtype.element_ty).to(tl.float32) * u
    if gate.dtype.element_ty == up.dtype.element_ty:
        y = rounded(y, gate.dtype.element_ty).to(tl.float32)
    return y


@writes("codes", "scale", "zero_point", "outliers")
@triton.jit
def _act_mul_quantize_kernel(
    gate, gate_stride, up, up_stride, marks, codes, scale, zero_point, outliers,
    K: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    follow(LINKED)
    row = tl.program_id(0).to(tl.int64)
    gate += row * gate_stride
    up += row * up_stride
    codes += row * K
    if marks is not None:  # early: loads that wait for one another
        column, taken = outlier_columns(marks, K, R, BLOCK_R)
        value = product(gate, up, column, taken, ACT)
    high = 0
    low = 0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = product(gate, up, cols, cols < K, ACT)
        above, below = row_extent(inliers(y, marks, cols, cols < K), SYMMETRIC)
        high = tl.maximum(high, above)
        low = tl.maximum(low, below)
    s, inverse, zero = row_scale(high, low, SYMMETRIC)
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = product(gate, up, cols, cols < K, ACT)
        y = inliers(y, marks, cols, cols < K)
        tl.store(codes + cols, encode(y, inverse, zero, SYMMETRIC), mask=cols < K)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)
    if marks is not None:
        store_gathered(outliers + row * R, value, taken, R, BLOCK_R)


@writes("bits")
@triton.jit
def _product_absmax_kernel(
    gate, gate_stride, up, up_stride, bits, floor, M,
    K: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Column absmax of the product (see `lowering.triton.columns`)."""
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(0).to(tl.int64) * ROWS
    best = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.int32)
    for start in range(0, ROWS, BLOCK_M):
        rows = (first + start + tl.arange(0, BLOCK_M))[:, None]
        mask = (rows < M) & (cols < K)[None, :]
        y = product(gate + rows * gate_stride, up + rows * up_stride, cols[None, :], mask, ACT)
        best = tl.maximum(best, bits_of(y))
    raise_absmax(bits, tl.max(best, 0), cols, floor, K)


PREPACKED = replace(PREPACKED_COLUMNS, options=lambda gate: (gate.shape[-1],))


def _fits(gate: Tensor, up: Tensor, act: str) -> bool | str:
    if act not in CODE:
        return f"activation {act!r} is none of {', '.join(ACTIVATIONS)}"
    return takes_rows(gate, up)


def _act_mul_quantize(
    gate: Tensor, up: Tensor, act: str, split: Split, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gates, ups = as_rows(gate), as_rows(up)
    k = gates.width
    codes, scale, zero_point = row_outputs(gate, symmetric)
    outliers = outlier_output(gate, split, torch.promote_types(gate.dtype, up.dtype))
    if not empty(gates.count):
        block, warps = row_block(k)
        wrap_triton(_act_mul_quantize_kernel)[(gates.count,)](
            gates.data, gates.stride, ups.data, ups.stride, split.marks, codes, scale,
            None if symmetric else zero_point, outliers if split.count else None,
            K=k, ACT=CODE[act], SYMMETRIC=symmetric, BLOCK=block, LINKED=linked(gate.device, gates.count),
            num_warps=warps, **split.constants(),
        )  # fmt: skip
    return codes, scale, zero_point, outliers


@act_mul_quantize.impl("triton", when=_fits, prepack=PREPACKED)
@traceable
def act_mul_quantize_rows(
    gate: Tensor, up: Tensor, act: str, columns: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activation, product, quantization and outliers in one launch; halves of a merged gate/up stay views."""
    if gate.shape != up.shape:
        gate, up = torch.broadcast_tensors(gate, up)
    return _act_mul_quantize(gate, up, act, static_split(columns, gate.shape[-1]), symmetric)


@act_mul_quantize_dynamic.impl("triton", when=_fits)
@traceable
def act_mul_quantize_rows_dynamic(
    gate: Tensor, up: Tensor, act: str, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Column absmax of the product, choice of columns, then `act_mul_quantize_rows`."""
    if gate.shape != up.shape:
        gate, up = torch.broadcast_tensors(gate, up)
    gates, ups = as_rows(gate), as_rows(up)
    m, k = gates.count, gates.width
    found = search(k, capacity, threshold, torch.promote_types(gate.dtype, up.dtype), gate.device)
    blocks = triton.cdiv(k, SEARCH_COLUMNS)
    group = search_rows(m, blocks, SEARCH_ROWS)
    wrap_triton(_product_absmax_kernel)[(programs(m, group), blocks)](
        gates.data, gates.stride, ups.data, ups.stride, *found.arguments(), m,
        ACT=CODE[act], BLOCK_M=SEARCH_ROWS, BLOCK_K=SEARCH_COLUMNS, ROWS=group, num_warps=4, **found.constants(),
    )  # fmt: skip
    split, columns, overflow = found.result()
    return (*_act_mul_quantize(gate, up, act, split, symmetric), columns, overflow)
