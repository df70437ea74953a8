"""CPU implementations: int8 products on `torch._int_mm`, the rest as plain tensor code that Inductor fuses."""

from lowering.cpu import act, linear, linear_groups, norm, quantize

__all__ = ["act", "linear", "linear_groups", "norm", "quantize"]
