"""int8 linears by our own kernels; where those cannot run, on `torch._int_mm` with an epilogue that Inductor fuses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowering.cpu import native
from lowering.numerics import rows
from lowering.ops.linear import linear_w8a8, linear_w8a8_add, linear_w8a16, linear_w8a16_add

FEW_ROWS = 32


def _int_mm(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows[M, K] @ weight[N, K]ᵀ` in int32, around what `torch._int_mm` gets wrong (torch 2.11 to 2.13)."""
    if rows.shape[1] == 1:  # reads past the end
        rows, weight = F.pad(rows, (0, 1)), F.pad(weight, (0, 1))
    count = rows.shape[0]
    if isinstance(count, int) and count == 1:  # trusts the row stride, which means nothing with one row
        return torch._int_mm(torch.cat([rows, rows]), weight.t())[:1]
    return torch._int_mm(rows.contiguous(), weight.t())  # expanded rows are read wrong


def _int32_product(codes: Tensor, weight: Tensor) -> Tensor:
    """`codes[..., K] @ weight[N, K]ᵀ` in int32."""
    return _int_mm(codes.reshape(-1, codes.shape[-1]), weight).view(*codes.shape[:-1], weight.shape[0])


@linear_w8a8.impl("cpu")
def linear_int_mm(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    outliers: Tensor | None,
    outlier_weight: Tensor | None,
    columns: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """int32 product by `_int_mm`, one fused epilogue."""
    acc = _int32_product(codes, weight)
    if zero_point is not None:
        assert weight_sum is not None
        acc = acc - zero_point * weight_sum
    y = acc.float() * scale * weight_scale
    if outliers is not None:
        right = weight.index_select(1, columns) if columns is not None else outlier_weight
        assert right is not None
        # Many rows: in their own dtype, whose matmul is several times faster; a row or two: exactly.
        own = outliers.dtype if columns is not None else right.dtype
        wide = torch.float32 if (rows(codes) or FEW_ROWS) < FEW_ROWS else own
        part = F.linear(outliers.to(wide), right.to(wide)).float()
        y = y + (part * weight_scale if columns is not None else part)
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


@linear_w8a16.impl("cpu")
def linear_dequantized_weight(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Many rows: the weight is converted on the way (exact: codes fit bf16) and the float matmul does the rest."""
    y = F.linear(x, weight.to(x.dtype)).float() * weight_scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _one_row(x: Tensor) -> bool | str:
    return rows(x) == 1 or "takes a single token"


def _one_bf16_row(x: Tensor, weight: Tensor) -> bool | str:
    if x.dtype != torch.bfloat16 or _one_row(x) is not True:
        return "takes a single bf16 token"
    n, k = weight.shape
    # ATen's kernel reads whole vectors: at other sizes it reads past the end.
    return (n % 16 == 0 and k % 64 == 0) or "takes N in multiples of 16 and K in multiples of 64"


@linear_w8a16.impl("cpu", when=_one_row)
def linear_matrix_vector(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """One row: a sum of products, in which Inductor converts the int8 weight as it reads it."""
    y = (x.reshape(1, -1).float() * weight.float()).sum(-1) * weight_scale
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("int8pass_cpu::bf16_row_times_int8", mutates_args=())
def _bf16_row_times_int8(x: Tensor, weight: Tensor, ones: Tensor) -> Tensor:
    """`x[1, K] bf16 @ weight[N, K]ᵀ int8` as bf16 `[1, N]`, by ATen's kernel.

    An op of its own, because Inductor (2.13) fails on ATen's when its input is not in memory yet.
    """
    return torch._weight_int8pack_mm(x, weight, ones)


@_bf16_row_times_int8.register_fake
def _(x: Tensor, weight: Tensor, ones: Tensor) -> Tensor:
    return x.new_empty(1, weight.shape[0])


@linear_w8a16.impl("cpu", when=_one_bf16_row)
def linear_int8pack(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """One bf16 row: ATen's matrix-vector product. It would take bf16 scales; the fp32 ones are applied here."""
    ones = torch.ones(weight.shape[0], dtype=torch.bfloat16, device=x.device)
    y = _bf16_row_times_int8(x.reshape(1, -1), weight, ones)[0].float() * weight_scale
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _native_w8a8(
    codes: Tensor, bias: Tensor | None, outliers: Tensor | None, outlier_weight: Tensor | None, dtype: torch.dtype
) -> bool | str:
    """Whether the native kernels take these arguments of `linear_w8a8`."""
    if dtype not in native.FLOATS:
        return f"the native kernels give float32, bfloat16 and float16, not {dtype}"
    for tensor in (bias, outliers, outlier_weight):
        if tensor is not None and tensor.dtype not in native.FLOATS:
            return f"the native kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    return native.takes_width(codes)


@linear_w8a8.impl("cpu", when=_native_w8a8)
def native_linear_w8a8(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    outliers: Tensor | None,
    outlier_weight: Tensor | None,
    columns: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """AMX or VNNI product, everything after it before the result leaves the cache."""
    return native.linear_w8a8(
        *native_arguments(
            codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype
        )
    )


def native_arguments(codes: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """Arguments of `linear_w8a8` as the native kernels read them: contiguous, and of every row its scale."""
    one = (*codes.shape[:-1], 1)
    return (
        codes.contiguous(),
        scale.expand(one).contiguous(),
        None if zero_point is None else zero_point.expand(one).contiguous(),
        *(value.contiguous() if isinstance(value, Tensor) else value for value in rest),
    )


FEW_FLOAT_ROWS = 8


def _native_w8a16(x: Tensor, bias: Tensor | None) -> bool | str:
    if (rows(x) or FEW_FLOAT_ROWS + 1) > FEW_FLOAT_ROWS:
        return f"the native kernel takes up to {FEW_FLOAT_ROWS} tokens"
    return native.takes(x, bias)


@linear_w8a16.impl("cpu", when=_native_w8a16)
def native_linear_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """A few rows: the int8 weights are read once, converted in registers, and multiplied in fp32."""
    bias = None if bias is None else bias.contiguous()
    return native.linear_w8a16(x.contiguous(), weight.contiguous(), weight_scale.contiguous(), bias)


# For graphs that someone writes: on a CPU Inductor adds the residual where it is read next, and nothing makes this op.
linear_w8a8_add.impl("cpu", composed=True)(linear_w8a8_add.reference)
linear_w8a16_add.impl("cpu", composed=True)(linear_w8a16_add.reference)
