"""On the CPU the references are the implementations: Inductor fuses them with their neighbours into one loop.

With columns found per call, the search is an op of its own (`lowering.cpu.quantize`) behind the norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.cpu.quantize import split_quantize_by_column_search
from lowering.ops import norm

for _op in (norm.rms_norm, norm.norm_quantize, norm.add_norm_quantize):
    _op.impl("cpu")(_op.reference)


@norm.norm_quantize_dynamic.impl("cpu")
def norm_quantize_by_column_search(
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
    """The norm, then the search."""
    y = norm.normalize(x, weight, bias, eps, offset, mode)
    return split_quantize_by_column_search(y, capacity, threshold, symmetric)


@norm.add_norm_quantize_dynamic.impl("cpu")
def add_norm_quantize_by_column_search(
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
    """The sum, the norm, then the search."""
    h = torch.add(x, residual)
    return (h, *norm_quantize_by_column_search(h, weight, bias, eps, offset, mode, capacity, threshold, symmetric))
