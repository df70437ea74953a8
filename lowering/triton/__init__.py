"""Triton implementations of the ops that remain in a lowered GPU graph. Importing them needs Triton, not a GPU."""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lowering.triton needs the 'triton' package, which torch's CUDA wheels bring along (without one: "
        "pip install triton). Only compiling for a GPU needs it."
    ) from error

from lowering.triton import (
    act,
    attention,
    gated,
    hilo,
    linear,
    linear_groups,
    linear_w8a16,
    norm,
    per_tensor,
    quantize,
    residual,
)

__all__ = [
    "act", "attention", "gated", "hilo", "linear", "linear_groups", "linear_w8a16", "norm", "per_tensor", "quantize",
    "residual",
]  # fmt: skip
