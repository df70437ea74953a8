"""On the CPU the references are the implementations: Inductor fuses them with their neighbours into one loop."""

from lowering.ops import norm

for _op in (norm.rms_norm, norm.norm_quantize, norm.add_norm_quantize):
    _op.impl("cpu")(_op.reference)
