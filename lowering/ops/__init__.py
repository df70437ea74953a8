"""Operator declarations: each function here is the meaning of one op (schema, fake result and reference)."""

from lowering.ops import act, attention, hilo, linear, norm, quantize

__all__ = ["act", "attention", "hilo", "linear", "norm", "quantize"]
