"""Gate products on the CPU: Inductor's loop for the product, our kernel for the quantization."""

from __future__ import annotations

from torch import Tensor

from lowering.cpu import native
from lowering.cpu.quantize import native_rows
from lowering.ops.act import ACTIVATIONS, act_mul_quantize

act_mul_quantize.impl("cpu")(act_mul_quantize.reference)


@act_mul_quantize.impl("cpu", when=lambda gate, *rest: native.takes(gate))
def native_act_mul_quantize(
    gate: Tensor, up: Tensor, act: str, columns: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The product as in the reference, then one pass over each row."""
    return native_rows(ACTIVATIONS[act](gate) * up, columns, symmetric)
