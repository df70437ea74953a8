"""Call a model as it is, or under a backend, whatever form its inputs have."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def run(model: nn.Module, args: Any, backend: Callable[..., Any]) -> Any:
    """Call `model` once under a backend, without gradients and without touching what is compiled already."""
    compiled = torch.compile(model, backend=backend)
    # Past its limit of graphs per code object Dynamo runs eagerly without a word, and would show an empty model; many
    # models share code objects. Patched for this call only.
    limits = torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)
    with torch.no_grad(), limits:
        return call(compiled, args)


def call(function: Callable[..., Any], args: Any) -> Any:
    """Call with a tensor, a tuple of positional or a dictionary of keyword arguments."""
    if isinstance(args, Mapping):
        return function(**args)
    return function(*((args,) if isinstance(args, Tensor) else args))


def return_large_blocks() -> None:
    """For a process of our own: let glibc give every freed block of 1 MiB or more back to the system.

    Left to itself it raises that limit to 32 MiB, and the holes between packed weights become a third of the peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


__all__ = ["call", "return_large_blocks", "run"]
