"""What PyTorch asks about a Triton kernel, answered once per compilation.

To know what a kernel writes, PyTorch runs Triton's front end on it: four times for every launch in a graph, 50 ms each.
A model launches the same few kernels in every layer, so on a GPU that was most of the time that int8 took longer to
compile than bf16. Nothing in PyTorch remembers the answer; here it is remembered while one graph is compiled.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

# By module. PyTorch 2.11 has the first, 2.13 the second: what a version lacks is passed over.
QUESTIONS = (
    ("torch._higher_order_ops.triton_kernel_wrap", "identify_mutated_tensors"),
    ("torch._higher_order_ops.triton_kernel_wrap", "identify_accessed_tensors"),
    ("torch._inductor.codegen.wrapper", "user_defined_triton_kernel_transitive_closure_source_code"),
)


@contextmanager
def asked_once() -> Iterator[None]:
    """Within it, a question about the same kernel and like arguments gets the answer of the first time."""
    replaced = []
    for name, question in QUESTIONS:
        module = importlib.import_module(name)
        original = getattr(module, question, None)
        if original is not None:
            setattr(module, question, _remembering(original))
            replaced.append((module, question, original))
    try:
        yield
    finally:
        for module, question, original in replaced:
            setattr(module, question, original)


def _remembering(question: Callable[..., Any]) -> Callable[..., Any]:
    answers: dict[Hashable, Any] = {}

    def ask(kernel: Any, *rest: Any, **named: Any) -> Any:
        key = _key((kernel, *rest), named)
        if key is None:
            return question(kernel, *rest, **named)
        if key not in answers:
            answers[key] = (question(kernel, *rest, **named), kernel)  # with the kernel: its id is not used again
        return answers[key][0]

    return ask


def _key(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Hashable | None:
    """What the answer depends on; None where that is not known."""
    kernel, *rest = arguments
    try:
        return (_identity(kernel), *(_described(value) for value in rest), _described(named))
    except TypeError:
        return None


def _identity(kernel: Any) -> Hashable:
    """PyTorch wraps a kernel anew for every launch that sets `num_warps`: as an autotuner of one configuration."""
    configurations = getattr(kernel, "configs", None)
    if configurations is None:
        return id(kernel)
    return id(kernel.fn), tuple(_described(c.all_kwargs()) for c in configurations)


def _described(value: Any) -> Hashable:
    """Of tensors the dtype, of sizes that are not known yet nothing (to the front end they are all alike).

    Raises:
        TypeError: a value of another kind.
    """
    if isinstance(value, Mapping):
        return tuple((name, _described(inner)) for name, inner in value.items())
    if isinstance(value, Tensor):
        return Tensor, value.dtype
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return type(value), value
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, sympy.Expr)):
        return sympy.Expr
    if type(value).__name__ == "TensorBox":  # Inductor's
        return Tensor, value.get_dtype()
    raise TypeError(f"{type(value)} is not compared")
