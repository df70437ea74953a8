"""On the CPU the references are the implementations: Inductor fuses them with their neighbours into one loop.

Only the search for this call's outlier columns is an op of its own. It reads whole columns where everything around it
works on rows; left to the fusion, every kernel near it would recompute the site's input, and compile for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.ops import quantize

for _op in (
    quantize.quantize_per_token,
    quantize.quantize_per_tensor,
    quantize.dequantize,
    quantize.dequantize_weight,
    quantize.dequantize_weight_groups,
    quantize.outlier_split,
    quantize.outlier_split_dynamic,
    quantize.split_quantize,
):
    _op.impl("cpu")(_op.reference)


@torch.library.custom_op("int8pass_cpu::outlier_columns", mutates_args=())
def _outlier_columns(x: Tensor, capacity: int, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x[..., K]` → columns `[R]`, which of them are taken `[R]`, channels that stay int8 `[K]`, overflow `[]`."""
    width = x.shape[-1]
    count = min(capacity, width)
    if x.numel() == 0:
        absmax = x.new_zeros(width)
    else:
        rows = x.reshape(-1, width)
        absmax = torch.maximum(rows.amax(0), -rows.amin(0))
    values, columns = torch.topk(absmax, count)
    taken = values > threshold if threshold > 0 else torch.ones_like(columns, dtype=torch.bool)
    kept = quantize.kept_without(x, columns, (~taken).to(x.dtype))
    above = (absmax > threshold).sum() - taken.sum() if threshold > 0 else x.new_zeros(())
    return columns, taken.to(x.dtype), kept, above.to(torch.int32)


@_outlier_columns.register_fake
def _(x: Tensor, capacity: int, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = min(capacity, x.shape[-1])
    columns = x.new_empty(count, dtype=torch.int64)
    return columns, x.new_empty(count), x.new_empty(x.shape[-1]), x.new_empty((), dtype=torch.int32)


@quantize.split_quantize_dynamic.impl("cpu")
def split_quantize_by_column_search(
    x: Tensor, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The column search as one op, the rest as the reference has it."""
    columns, taken, kept, overflow = _outlier_columns(x, capacity, threshold)
    outliers = x[..., columns]
    if threshold > 0:
        outliers = quantize.keep_columns(outliers, taken)
    codes, scale, zero_point = quantize.quantize_per_token.reference(quantize.keep_columns(x, kept), symmetric)
    return codes, scale, zero_point, outliers, columns, overflow
