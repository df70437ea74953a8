"""CPU implementations: our own C++ kernels, else `torch._int_mm` and plain tensor code that Inductor fuses."""

from lowering.cpu import act, attention, hilo, linear, linear_groups, norm, quantize

__all__ = ["act", "attention", "hilo", "linear", "linear_groups", "norm", "quantize"]
