"""int8 linears on `torch._int_mm` (VNNI or AMX through oneDNN). Plain tensor code: Inductor fuses the epilogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowering.ops.linear import linear_w8a8, linear_w8a16


def _int32_product(codes: Tensor, weight: Tensor) -> Tensor:
    """`codes[..., K] @ weight[N, K]ᵀ` in int32."""
    rows = codes.reshape(-1, codes.shape[-1])
    if isinstance(rows.shape[0], int) and rows.shape[0] == 1:
        # With one row `_int_mm` trusts the row stride, which is arbitrary there, and reads garbage (torch 2.11 to
        # 2.13): a second row makes the stride real. Rows are free as long as the weight is read once.
        return torch._int_mm(torch.cat([rows, rows]), weight.t())[:1].view(*codes.shape[:-1], weight.shape[0])
    return torch._int_mm(rows, weight.t()).view(*codes.shape[:-1], weight.shape[0])


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
    dtype: torch.dtype,
) -> Tensor:
    """int32 product by `_int_mm`, one fused epilogue."""
    acc = _int32_product(codes, weight)
    if zero_point is not None:
        assert weight_sum is not None
        acc = acc - zero_point * weight_sum
    y = acc.float() * scale * weight_scale
    if outliers is not None:
        assert outlier_weight is not None
        part = F.linear(outliers, outlier_weight.to(outliers.dtype)).float()
        y = y + (part * weight_scale if outlier_weight.dtype == torch.int8 else part)
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


@linear_w8a16.impl("cpu")
def linear_dequantized_weight(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Many rows: the weight is converted on the way (exact: codes fit bf16) and the float matmul does the rest."""
    y = F.linear(x, weight.to(x.dtype)).float() * weight_scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _one_row(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> bool | str:
    sizes = x.shape[:-1]
    if all(isinstance(s, int) and s == 1 for s in sizes):
        return True
    return "takes a single token"


@linear_w8a16.impl("cpu", when=_one_row)
def linear_matrix_vector(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """One row: a sum of products that Inductor fuses with the conversion, so that the weight is read once, as int8."""
    y = (x.reshape(1, -1).float() * weight.float()).sum(-1) * weight_scale
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
