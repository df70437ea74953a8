"""Release: give back the memory of original weights once their int8 form is in use (opt-in, `free_weights`).

The parameter objects stay, with shape, dtype and strides, so that Dynamo's guards hold and later recompiles work. Only
their storage goes. A module that owns a released weight refuses to run eagerly, or to hand out a state dict, with an
error that says so: it would compute with nothing.
"""

from __future__ import annotations

import gc
import math
import mmap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from int8pass.errors import WeightError
from int8pass.graph.constants import Store


def release_weights(weights: Mapping[str, Tensor], store: Store) -> None:
    """Free the storage of `weights` (label → parameter) and guard the modules that own them."""
    fresh = {label: tensor for label, tensor in weights.items() if not store.is_released(tensor)}
    for tensor in fresh.values():
        _drop_storage(tensor)
        store.mark_released(tensor)
    _guard_owners({id(t): label for label, t in fresh.items()}, store)


def _drop_storage(tensor: Tensor) -> None:
    with torch.no_grad():
        if tensor.device.type == "cpu":
            tensor.data = _untouched(tensor)
        else:
            tensor.untyped_storage().resize_(0)


def _untouched(tensor: Tensor) -> Tensor:
    """Zeros of the same shape, dtype and strides on pages that take no memory until somebody writes to them.

    An empty storage would be simpler, but reading one on the CPU ends the process instead of raising.
    """
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    if math.prod(tensor.shape) == 0:
        return torch.empty_like(tensor)
    pages = mmap.mmap(-1, span * tensor.element_size())
    return torch.frombuffer(pages, dtype=tensor.dtype, count=span).as_strided(tensor.shape, tensor.stride())


def _guard_owners(labels: Mapping[int, str], store: Store) -> None:
    """Hook every module that owns a released parameter. Found through the collector: a graph knows no modules.

    By `type` and not `isinstance`, which asks every object for its class, and some answer with code of their own.
    """
    for module in [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]:
        for parameter in module.__dict__.get("_parameters", {}).values():
            if parameter is not None and id(parameter) in labels:
                _guard(module, parameter, labels[id(parameter)], store)


def _guard(module: nn.Module, parameter: Tensor, label: str, store: Store) -> None:
    def refuse(*args: Any) -> None:
        # Dynamo runs hooks while it traces a recompile, and the compiled graph does not read the weight.
        if torch.compiler.is_compiling() or not store.is_released(parameter):
            return
        raise WeightError(
            f"{label}: its weight was released after compilation (free_weights=True); the model runs compiled only. "
            "Load the weights again, or compile without free_weights, to run it eagerly or save it."
        )

    module.register_forward_pre_hook(refuse)
    module.register_state_dict_pre_hook(refuse)
