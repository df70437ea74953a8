"""On the CPU the reference is the implementation: Inductor fuses it with its neighbours into one loop."""

from lowering.ops.act import act_mul_quantize

act_mul_quantize.impl("cpu")(act_mul_quantize.reference)
