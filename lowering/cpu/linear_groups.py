"""int8 linears with group-wise weight scales: one `torch._int_mm` per group, added up in fp32.

One opaque op and not a graph of its parts: a layer has dozens of groups, and Inductor would compile each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.cpu.linear import _int_mm
from lowering.ops.linear import linear_w8a8_groups


@torch.library.custom_op("int8pass_cpu::group_product", mutates_args=())
def _group_product(
    codes: Tensor, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor, group: int
) -> Tensor:
    """`Σ_g (codes - zero_point)_g @ weight_gᵀ · weight_scale[:, g]` of `codes[M, K]`, fp32 `[M, N]`."""
    m, k = codes.shape
    out = torch.zeros(m, weight.shape[0], dtype=torch.float32)
    if m == 0:
        return out
    for index, start in enumerate(range(0, k, group)):
        part = weight[:, start : start + group].contiguous()
        acc = _int_mm(codes[:, start : start + group].contiguous(), part)
        if zero_point is not None:
            acc = acc - zero_point * part.sum(1, dtype=torch.int32)
        out += acc * weight_scale[:, index]
    return out


@_group_product.register_fake
def _(codes: Tensor, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor, group: int) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=torch.float32)


@linear_w8a8_groups.impl("cpu")
def linear_int_mm_groups(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    group: int,
    bias: Tensor | None,
    outliers: Tensor | None,
    outlier_weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """int32 products by `_int_mm`, one fused epilogue."""
    zeros = None if zero_point is None else zero_point.expand(*codes.shape[:-1], 1).reshape(-1, 1)
    y = _group_product(codes.reshape(-1, codes.shape[-1]), zeros, weight, weight_scale, group)
    y = y.view(*codes.shape[:-1], weight.shape[0]) * scale
    if outliers is not None:
        assert outlier_weight is not None
        own = outlier_weight.dtype
        y = y + torch.nn.functional.linear(outliers.to(own), outlier_weight).float()
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)
