"""Operator declarations: each function here is the meaning of one op (schema, fake result and reference)."""

from lowering.ops import act, linear, norm, quantize

__all__ = ["act", "linear", "norm", "quantize"]
