"""Call a model as it is, or under a backend, whatever form its inputs have."""

from __future__ import annotations

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


__all__ = ["call", "run"]
