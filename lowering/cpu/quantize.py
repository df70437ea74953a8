"""Quantization of rows by our own kernels; where those cannot run, the references, which Inductor fuses.

There only the search for this call's outlier columns is an op of its own: it reads whole columns where everything
around it works on rows; left to the fusion, every kernel near it would recompute the site's input, and compile for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowering.cpu import native
from lowering.ops import quantize
from lowering.registry import Op

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


def _takes(x: Tensor) -> bool | str:
    return native.takes(x)


@quantize.quantize_per_token.impl("cpu", when=_takes)
def native_quantize_per_token(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over each row."""
    return native.quantize_per_token(x.contiguous(), symmetric)


@quantize.split_quantize.impl("cpu", when=_takes)
def native_split_quantize(x: Tensor, columns: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over each row."""
    return native.split_quantize(x.contiguous(), columns, symmetric)


@quantize.split_quantize_dynamic.impl("cpu", when=_takes)
def native_split_quantize_dynamic(
    x: Tensor, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over the columns for their absmax, one over the rows."""
    return native.split_quantize_dynamic(x.contiguous(), capacity, threshold, symmetric)


def quantize_rows(x: Tensor, columns: Tensor | None, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, zero point and outliers of rows, by whichever kernel takes them: for the ops that end in it."""
    if columns is None:
        return (*_chosen(quantize.quantize_per_token, x, symmetric), x.new_empty((*x.shape[:-1], 0)))
    return _chosen(quantize.split_quantize, x, columns, symmetric)


def split_rows(
    x: Tensor, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`split_quantize_dynamic` by whichever kernel takes `x`."""
    return _chosen(quantize.split_quantize_dynamic, x, capacity, threshold, symmetric)


def _chosen(op: Op, *args: Any) -> Any:
    """The result of the implementation that takes these arguments; nothing in them was made for it in advance."""
    chosen = op.choose("cpu", args)
    if chosen.prepack is not None:
        position = op.position(chosen.prepack)
        packed = chosen.prepack.compute(args[position], *chosen.prepack.options(*args))
        args = (*args[:position], packed, *args[position + 1 :])
    return chosen.function(*args)
