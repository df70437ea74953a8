"""Operator declarations: each function here is the meaning of one op (schema, fake result and reference)."""

from lowering.ops import act, attention, linear, norm, quantize

__all__ = ["act", "attention", "linear", "norm", "quantize"]
