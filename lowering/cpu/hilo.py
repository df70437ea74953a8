"""Two planes of codes on the CPU: the references. There LLM.int8() keeps its columns (`int8pass.hilo`)."""

from lowering.ops import hilo

for _op in (
    hilo.quantize_hilo,
    hilo.norm_quantize_hilo,
    hilo.add_norm_quantize_hilo,
    hilo.act_mul_quantize_hilo,
    hilo.linear_w8a8_hilo,
    hilo.gated_linear_quantize_hilo,
):
    _op.impl("cpu")(_op.reference)

hilo.linear_w8a8_hilo_add.impl("cpu", composed=True)(hilo.linear_w8a8_hilo_add.reference)
