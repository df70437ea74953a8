"""The operator registry: an op is declared once, by its reference, and implementations attach to it.

The reference function *is* the op. Its signature gives the `torch.library` schema, running it on fake tensors gives
shapes and dtypes, and its result is what every implementation is compared with. An implementation names a target
("cpu", "triton", "onnx"), may restrict itself with a pure predicate of the arguments that the predicate names, and must
have the parameters of the reference.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
    """Says that an implementation would rather have `compute(argument, *options)` in place of the argument called
    `parameter`, where that is a constant of the graph: it is then computed once instead of in every call. What
    `options` gives is made of the arguments that it names."""

    parameter: str
    compute: Callable[..., Tensor]
    options: Callable[..., tuple[Any, ...]] = lambda: ()


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


def of_named(reference: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of all arguments of `reference`, though it has only those parameters of it that it looks at.

    Raises:
        TypeError: a parameter is none of the reference's, and has no default.
    """
    given, asked = list(inspect.signature(reference).parameters), inspect.signature(function).parameters
    unknown = [name for name, parameter in asked.items() if name not in given and parameter.default is parameter.empty]
    if unknown:
        raise TypeError(f"{reference.__name__} has no parameter {', '.join(unknown)}; it has {', '.join(given)}")
    places = {name: given.index(name) for name in asked if name in given}

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(**{name: args[place] for name, place in places.items()})

    return call


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
        when: Callable[..., bool | str] = lambda: True,
        name: str | None = None,
        prepack: Prepack | None = None,
        composed: bool = False,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Attach the decorated function as an implementation for `target`. The latest attached is asked first.

        `when` has parameters of the op's, by name, as many as it looks at; others must have a default, so that one
        predicate can serve several ops.
        """

        def attach(function: Callable[..., Any]) -> Callable[..., Any]:
            ours, theirs = inspect.signature(self.reference), inspect.signature(function)
            if list(ours.parameters) != list(theirs.parameters):
                raise TypeError(f"{target} implementation of {self.name} takes {theirs}, the op takes {ours}")
            label = name or f"{target}:{function.__name__}"
            asked = of_named(self.reference, when)
            packed = prepack and replace(prepack, options=of_named(self.reference, prepack.options))
            self.implementations.insert(0, Implementation(target, label, function, asked, packed, composed))
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
