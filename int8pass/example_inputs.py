"""Example inputs of transformers models for export: what `int8pass export MODEL` traces a model with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int8pass.errors import UnsupportedError

Axes = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """Keyword arguments of a model, and which of their axes may have any size, as torch.export wants to know it."""

    args: dict[str, Any]
    dynamic_shapes: Axes | None


def prefill(model: Any, ids: Tensor, *, dynamic: bool = True) -> Example:
    """A whole text at once: `input_ids` `[batch, length]`, and an attention mask for encoders.

    The length is dynamic, and for encoders the batch.
    Logits or hidden states of every token come out; nothing is kept for a next token.
    """
    model.config.use_cache = False
    axes = {1: torch.export.Dim("length", min=2, max=_longest(model))}
    args = {"input_ids": ids}
    if not _generates(model):
        if dynamic and len(ids) == 1:
            ids = torch.cat([ids, ids.flip(1)])  # an axis of one is taken for a constant
        args = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        axes[0] = torch.export.Dim("batch", min=1, max=4096)
    return Example(args, {name: dict(axes) for name in args} if dynamic else None)


def decode(model: Any, ids: Tensor, *, dynamic: bool = True) -> Example:
    """One more token after `ids` `[1, length]`: past keys and values go in, and come out longer by one.

    Raises:
        UnsupportedError: the model does not generate text over a key/value cache of transformers.
    """
    from transformers import DynamicCache
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    if not _generates(model):
        raise UnsupportedError(f"{type(model).__name__} does not generate text, so it has no decode graph")
    register_dynamic_cache_export_support()
    model.config.use_cache = True
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers = len(cache.layers)
    if any(layer.keys is None or layer.keys.dim() != 4 for layer in cache.layers):
        raise UnsupportedError(f"{type(model).__name__} keeps another kind of cache than keys and values per layer")
    past = {2: torch.export.Dim("past", min=1, max=_longest(model) - 1)}
    args = {"input_ids": ids[:, -1:], "past_key_values": cache, "use_cache": True}
    shapes: Axes = {
        "input_ids": {},
        "past_key_values": [[dict(past) for _ in range(layers)], [dict(past) for _ in range(layers)]],
        "use_cache": None,
    }
    return Example(args, shapes if dynamic else None)


def _generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


def _longest(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
