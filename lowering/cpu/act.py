"""On the CPU the reference is the implementation: Inductor fuses it with its neighbours into one loop."""

from __future__ import annotations

from torch import Tensor

from lowering.cpu.quantize import split_quantize_by_column_search
from lowering.ops.act import (
    ACTIVATIONS,
    act_mul_quantize,
    act_mul_quantize_dynamic,
    gated_linear_quantize,
    gated_linear_quantize_dynamic,
)

act_mul_quantize.impl("cpu")(act_mul_quantize.reference)
# Never chosen by the pass, which fuses across the linear on GPUs only.
for _op in (gated_linear_quantize, gated_linear_quantize_dynamic):
    _op.impl("cpu")(_op.reference)


@act_mul_quantize_dynamic.impl("cpu")
def act_mul_quantize_by_column_search(
    gate: Tensor, up: Tensor, act: str, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The product, then the search."""
    return split_quantize_by_column_search(ACTIVATIONS[act](gate) * up, capacity, threshold, symmetric)
