"""Activation products of gated MLPs with the quantization of their result: one program per row, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.ops.act import ACTIVATIONS, act_mul_quantize
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

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
RELU = tl.constexpr(3)
SIGMOID = tl.constexpr(4)
_CODE = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "sigmoid": 4}


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


@triton.jit
def _act_mul_quantize_kernel(
    gate, gate_stride, up, up_stride, removed, columns, codes, scale, zero_point, outliers,
    K: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gate += row * gate_stride
    up += row * up_stride
    codes += row * K
    high = 0
    low = 0
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = product(gate, up, cols, cols < K, ACT)
        above, below = row_extent(drop_columns(y, removed, cols, cols < K), SYMMETRIC)
        high = tl.maximum(high, above)
        low = tl.maximum(low, below)
    s, inverse, zero = row_scale(high, low, SYMMETRIC)
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = drop_columns(product(gate, up, cols, cols < K, ACT), removed, cols, cols < K)
        tl.store(codes + cols, encode(y, inverse, zero, SYMMETRIC), mask=cols < K)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)
    if R > 0:
        r = tl.arange(0, BLOCK_R)
        column = tl.load(columns + r, mask=r < R, other=0)
        value = product(gate, up, column, r < R, ACT)
        tl.store(outliers + row * R + r, rounded(value, outliers.dtype.element_ty), mask=r < R)


def _fits(gate: Tensor, up: Tensor, act: str, columns: Tensor | None, symmetric: bool) -> bool | str:
    if act not in _CODE:
        return f"activation {act!r} is none of {', '.join(ACTIVATIONS)}"
    return takes_rows(gate, up)


@act_mul_quantize.impl("triton", when=_fits)
@traceable
def act_mul_quantize_rows(
    gate: Tensor, up: Tensor, act: str, columns: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activation, product, quantization and outlier gather in one launch; halves of a merged gate/up stay views."""
    if gate.shape != up.shape:
        gate, up = torch.broadcast_tensors(gate, up)
    gates, ups = as_rows(gate), as_rows(up)
    k = gates.width
    codes, scale, zero_point = row_outputs(gate, symmetric)
    columns = None if columns is None else _split_columns(columns)
    r = 0 if columns is None else columns.shape[0]
    dtype = torch.promote_types(gate.dtype, up.dtype)
    outliers = torch.empty((*gate.shape[:-1], r), dtype=dtype, device=gate.device)
    if not empty(gates.count):
        block, warps = row_block(k)
        wrap_triton(_act_mul_quantize_kernel)[(gates.count,)](
            gates.data, gates.stride, ups.data, ups.stride,
            None if columns is None else removed_columns(k, columns), columns, codes, scale,
            None if symmetric else zero_point, outliers if r else None,
            K=k, R=r, ACT=_CODE[act], SYMMETRIC=symmetric, BLOCK=block,
            BLOCK_R=triton.next_power_of_2(max(r, 1)), num_warps=warps,
        )  # fmt: skip
    return codes, scale, zero_point, outliers
