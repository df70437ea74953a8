"""On the CPU the references are the implementations: Inductor fuses them with their neighbours into one loop."""

from lowering.ops import quantize

for _op in (
    quantize.quantize_per_token,
    quantize.dequantize,
    quantize.dequantize_weight,
    quantize.outlier_split,
    quantize.outlier_split_dynamic,
    quantize.split_quantize,
    quantize.split_quantize_dynamic,
):
    _op.impl("cpu")(_op.reference)
