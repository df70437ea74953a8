"""What PyTorch asks about a Triton kernel, answered once per compilation.

To know what a kernel writes, PyTorch runs Triton's front end on it: four times for every launch in a graph, 50 ms each.
A model launches the same few kernels in every layer, so on a GPU that was most of the time that int8 took longer to
compile than bf16. Nothing in PyTorch remembers the answer; here it is remembered while one graph is compiled.

Our own kernels say what they write (`lowering.triton.launch.writes`): PyTorch 2.11 need not ask at all. What 2.13 asks
has more to it: what is read, and whether other kernels may be appended.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

MUTATED = "identify_mutated_tensors"
# By module. PyTorch 2.11 has the first, 2.13 the second: what a version lacks is passed over.
QUESTIONS = (
    ("torch._higher_order_ops.triton_kernel_wrap", MUTATED),
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
        if question.__name__ == MUTATED and (declared := _declared(kernel, *rest)) is not None:
            return declared
        key = _key((kernel, *rest), named)
        if key is None:
            return question(kernel, *rest, **named)
        if key not in answers:
            answers[key] = (question(kernel, *rest, **named), kernel)  # with the kernel: its id is not used again
        return answers[key][0]

    return ask


def _declared(kernel: Any, given: Mapping[str, Any] | None = None, *rest: Any) -> list[str] | None:
    """Names of the tensors `given` that a kernel says it writes; None where it says nothing, or they are of a kind that
    is not known."""
    kernel = _unwrapped(kernel)
    names = getattr(kernel, "writes", None)
    if names is None or given is None:
        return None
    written = [name for name in kernel.arg_names if name in names and given.get(name) is not None]
    return written if all(_is_tensor(given[name]) for name in written) else None


def _key(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Hashable | None:
    """What the answer depends on; None where that is not known."""
    kernel, *rest = arguments
    try:
        return (_identity(kernel), *(_described(value) for value in rest), _described(named))
    except TypeError:
        return None


def _identity(kernel: Any) -> Hashable:
    configurations = getattr(kernel, "configs", ())
    return id(_unwrapped(kernel)), tuple(_described(c.all_kwargs()) for c in configurations)


def _unwrapped(kernel: Any) -> Any:
    """PyTorch wraps a kernel anew for every launch that sets `num_warps`: as an autotuner of one configuration."""
    return kernel.fn if hasattr(kernel, "configs") else kernel


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or type(value).__name__ == "TensorBox"  # Inductor's


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
    if _is_tensor(value):
        return Tensor, value.get_dtype()
    raise TypeError(f"{type(value)} is not compared")
