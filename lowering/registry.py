"""The operator registry: an op is declared once, by its reference, and implementations attach to it.

The reference function *is* the op. Its signature gives the `torch.library` schema, running it on fake tensors gives
shapes and dtypes, and its result is what every implementation is compared with. An implementation names a target
("cpu", "triton", "onnx"), may restrict itself with a pure predicate of the arguments, and must have the parameters of
the reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "int8pass"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_OPS: dict[str, Op] = {}

Args = tuple[Any, ...]


class LoweringError(Exception):
    """An op has no implementation for a target; names both, and why each candidate declined."""


@dataclass(frozen=True)
class Sample:
    """One argument list of an op, made by its `samples` function; `label` names it in tests and benchmarks."""

    label: str
    args: Args


@dataclass(frozen=True)
class Tolerance:
    """How far an implementation may be from the reference: int8 codes by `codes` steps, floats by `rtol`/`atol`."""

    codes: int = 0
    rtol: float = 1e-5
    atol: float = 1e-5


@dataclass(frozen=True)
class Prepack:
    """Says that an implementation would rather have `compute(argument, *options(*args))` in place of the argument
    called `parameter`, where that is a constant of the graph: it is then computed once instead of in every call."""

    parameter: str
    compute: Callable[..., Tensor]
    options: Callable[..., tuple[Any, ...]] = lambda *args: ()


@dataclass(frozen=True)
class Implementation:
    """`function` for `target`; `when(*args)` says whether it takes these arguments (fake tensors included).

    One that is `composed` does what the ops that this one stands for would do apart: nothing is gained by it.
    """

    target: str
    name: str
    function: Callable[..., Any]
    when: Callable[..., bool | str]
    prepack: Prepack | None = None
    composed: bool = False

    def refuses(self, args: Args) -> str | None:
        """None when the implementation takes `args`; else why not."""
        verdict = self.when(*args)
        if verdict is True:
            return None
        return verdict if isinstance(verdict, str) else f"{self.name} does not take these arguments"


@dataclass
class Op:
    """A declared operator; call it with real, fake or traced tensors."""

    name: str
    reference: Callable[..., Any]
    samples: Callable[[torch.device], Iterator[Sample]]
    tolerance: Tolerance
    implementations: list[Implementation] = field(default_factory=list)

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The `torch.ops` overload that stands in graphs: always the same object, which shared evaluations count on."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def position(self, prepack: Prepack) -> int:
        """Where the argument that an implementation would rather have prepacked stands."""
        return list(inspect.signature(self.reference).parameters).index(prepack.parameter)

    def impl(
        self,
        target: str,
        *,
        when: Callable[..., bool | str] = lambda *args: True,
        name: str | None = None,
        prepack: Prepack | None = None,
        composed: bool = False,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Attach the decorated function as an implementation for `target`. The latest attached is asked first."""

        def attach(function: Callable[..., Any]) -> Callable[..., Any]:
            ours, theirs = inspect.signature(self.reference), inspect.signature(function)
            if list(ours.parameters) != list(theirs.parameters):
                raise TypeError(f"{target} implementation of {self.name} takes {theirs}, the op takes {ours}")
            label = name or f"{target}:{function.__name__}"
            self.implementations.insert(0, Implementation(target, label, function, when, prepack, composed))
            return function

        return attach

    def choose(self, target: str, args: Args) -> Implementation:
        """The implementation of this op for `target` and `args`.

        Raises:
            LoweringError: none is registered for the target, or all registered ones refuse the arguments.
        """
        candidates = [i for i in self.implementations if i.target == target]
        refusals = []
        for candidate in candidates:
            reason = candidate.refuses(args)
            if reason is None:
                return candidate
            refusals.append(reason)
        known = sorted({i.target for i in self.implementations})
        why = "; ".join(refusals) or f"implemented for: {', '.join(known) or 'nothing'}"
        raise LoweringError(f"op {self.name!r} has no implementation for target {target!r} ({why})")


def op(
    *, samples: Callable[[torch.device], Iterator[Sample]], tolerance: Tolerance = Tolerance()
) -> Callable[[Callable[..., Any]], Op]:
    """Declare the decorated reference function as an op of the `int8pass` namespace."""

    def declare(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        schema = torch.library.infer_schema(reference, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Explicit: autograd is refused long before, and functional tracing sees one node instead of its parts.
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", reference, lib=_LIBRARY)
        declared = Op(name, reference, samples, tolerance)
        _OPS[name] = declared
        return declared

    return declare


def all_ops() -> dict[str, Op]:
    """Every declared op by name, in declaration order."""
    return dict(_OPS)


def find(target: Any) -> Op | None:
    """The op behind an FX node's target, or None when the target is not one of ours."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return _OPS.get(target._schema.name.split("::")[1])
    return None


def random_tensor(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Gaussian test data with one large channel, as activations of trained models have."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    if x.numel() and shape[-1] > 2:
        x[..., 1] *= 12.0
    return x.to(device=device, dtype=dtype)
