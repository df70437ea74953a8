"""Quantization with one scale for the whole tensor: calibrated limits in one launch, those of the call in two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowering.ops.quantize import dequantize_weight_groups, quantize_per_tensor
from lowering.triton.launch import as_rows, empty, row_block, takes_rows, traceable, wrap_triton, writes
from lowering.triton.quantize import row_extent, row_outputs, row_scale


@writes("extent")
@triton.jit
def _extent_kernel(x, x_stride, extent, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr):
    """Bits of (max(x, 0), max(-x, 0)) over the tensor, joined by integer atomics: exact in any order, NaN wins."""
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(0).to(tl.int64) * ROWS
    high = 0
    low = 0
    for start in range(0, tl.minimum(M - first, ROWS), BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        y = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        above, below = row_extent(tl.reshape(y, [BLOCK_M * BLOCK_K]), False)
        high = tl.maximum(high, above)
        low = tl.maximum(low, below)
    tl.atomic_max(extent, high, sem="relaxed")
    tl.atomic_max(extent + 1, low, sem="relaxed")


@writes("codes", "scale", "zero_point")
@triton.jit
def _quantize_kernel(
    x, x_stride, extent, codes, scale, zero_point, K: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    high = tl.load(extent)
    low = tl.load(extent + 1)
    if SYMMETRIC:
        high = tl.maximum(high, low)
    s, inverse, zero = row_scale(high, low, SYMMETRIC)
    for start in range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = tl.load(x + row * x_stride + cols, mask=cols < K, other=0.0).to(tl.float32) * inverse
        # Saturate before rounding: the fast conversion holds for |v| < 2^22 only, and limits may be far inside.
        y = tl.minimum(tl.maximum(y, -512.0), 512.0)
        value = ((y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000) + zero
        if SYMMETRIC:
            value = tl.minimum(tl.maximum(value, -127), 127)
        else:
            value = tl.minimum(tl.maximum(value, -128), 127)
        tl.store(codes + row * K + cols, value.to(tl.int8), mask=cols < K)
    tl.store(scale + row, s)
    if not SYMMETRIC:
        tl.store(zero_point + row, zero)


@quantize_per_tensor.impl("triton", when=lambda x: takes_rows(x))
@traceable
def quantize_tensor(x: Tensor, limits: Tensor | None, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The extent of the call in one launch where no limits are given; codes and the repeated scale in another."""
    rows = as_rows(x)
    m, k = rows.count, rows.width
    codes, scale, zero_point = row_outputs(x, symmetric)
    if empty(m):
        return codes, scale, zero_point
    block, warps = row_block(k)
    if limits is not None:
        extent = torch.stack([limits[1].clamp_min(0.0), (-limits[0]).clamp_min(0.0)]).view(torch.int32)
    else:
        extent = torch.zeros(2, dtype=torch.int32, device=x.device)
        block_k, group = 128, 256
        grid = ((m + group - 1) // group, triton.cdiv(k, block_k))
        wrap_triton(_extent_kernel)[grid](
            rows.data, rows.stride, extent, m, k, BLOCK_M=16, BLOCK_K=block_k, ROWS=group, num_warps=4
        )
    wrap_triton(_quantize_kernel)[(m,)](
        rows.data, rows.stride, extent, codes, scale, None if symmetric else zero_point,
        K=k, SYMMETRIC=symmetric, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return codes, scale, zero_point


# Weight-only linears with group scales: plain tensor code, which Inductor compiles to Triton itself.
dequantize_weight_groups.impl("triton")(dequantize_weight_groups.reference)
