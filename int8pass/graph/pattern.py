"""A small pattern language for trees of ATen calls.

    X, GAMMA, EPS = Bind("x"), Bind("gamma"), Bind("eps")
    mean_square = Call("mean", Square(X), [-1], True)
    norm = Mul(X, Call("rsqrt", Add(mean_square, EPS)))

A pattern matches from its root down. A name bound twice must be the same node. `Cast` looks through dtype conversions
and remembers what it saw; products and sums match in both orders. Names of ops are ATen's, without the overload.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lowering.registry import NAMESPACE

Bindings = dict[str, Any]

CASTS = {"to", "_to_copy", "type_as"}


def op_name(node: object) -> str:
    """Name of a call of ATen or of ours, without namespace and overload ("add"); of other operators with the namespace
    ("mylib::add"), since they are something else; "" for anything that calls no operator."""
    if isinstance(node, fx.Node) and node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        namespace, name = node.target._schema.name.split("::")
        return name if namespace == "aten" or namespace.startswith(NAMESPACE) else f"{namespace}::{name}"
    return ""


class Pattern:
    """Base: `match` gives the bindings of a match of `value`, or None."""

    def match(self, value: Any, bound: Bindings | None = None) -> Bindings | None:
        """Bindings when `value` has this shape and agrees with what is already `bound`; else None."""
        raise NotImplementedError


@dataclass(frozen=True)
class Bind(Pattern):
    """Any node or number, remembered under `name`."""

    name: str

    def match(self, value: Any, bound: Bindings | None = None) -> Bindings | None:
        bound = bound or {}
        if self.name in bound:
            return bound if bound[self.name] is value else None
        return {**bound, self.name: value}


@dataclass(frozen=True)
class Literal(Pattern):
    """Exactly this argument (a number or a list)."""

    expected: Any

    def match(self, value: Any, bound: Bindings | None = None) -> Bindings | None:
        if isinstance(value, fx.Node):
            return None
        plain = list(value) if isinstance(value, (list, tuple)) else value
        return (bound or {}) if plain == self.expected else None


@dataclass(frozen=True)
class Cast(Pattern):
    """`inner`, or conversions of it to other dtypes; under `name`, the dtype of the outermost (None: no conversion)."""

    inner: Pattern
    name: str = ""

    def match(self, value: Any, bound: Bindings | None = None) -> Bindings | None:
        outermost = None
        while op_name(value) in CASTS:
            outermost = outermost or value.meta["val"].dtype
            value = value.args[0]
        found = self.inner.match(value, bound)
        if found is None or not self.name:
            return found
        return {**found, self.name: outermost}


@dataclass(frozen=True)
class OneOf(Pattern):
    """The first alternative that matches."""

    alternatives: tuple[Pattern, ...]

    def match(self, value: Any, bound: Bindings | None = None) -> Bindings | None:
        for alternative in self.alternatives:
            found = alternative.match(value, bound)
            if found is not None:
                return found
        return None


@dataclass(frozen=True)
class Call(Pattern):
    """A call of the ATen op `name` whose leading arguments match; `either_order` tries the first two swapped."""

    name: str
    arguments: tuple[Pattern, ...]
    either_order: bool = False
    bind: str = field(default="")

    def match(self, value: Any, bound: Bindings | None = None) -> Bindings | None:
        if op_name(value) != self.name or len(value.args) < len(self.arguments):
            return None
        if value.kwargs.get("alpha", 1) != 1:  # add(a, b, alpha=c) is a + c·b
            return None
        orders = [value.args]
        if self.either_order:
            orders.append((value.args[1], value.args[0], *value.args[2:]))
        for arguments in orders:
            found: Bindings | None = bound or {}
            for pattern, argument in zip(self.arguments, arguments):
                found = pattern.match(argument, found)
                if found is None:
                    break
            if found is not None:
                return {**found, self.bind: value} if self.bind else found
        return None


def call(name: str, *arguments: Any, bind: str = "") -> Call:
    """`Call` with plain values as literals."""
    return Call(name, tuple(a if isinstance(a, Pattern) else Literal(a) for a in arguments), bind=bind)


def mul(a: Pattern, b: Pattern) -> Pattern:
    """`a * b` in either order."""
    return Call("mul", (a, b), either_order=True)


def add(a: Pattern, b: Any) -> Pattern:
    """`a + b` in either order; `b` may be a number."""
    return Call("add", (a, b if isinstance(b, Pattern) else Literal(b)), either_order=True)


def one_of(*alternatives: Pattern) -> Pattern:
    """The first alternative that matches."""
    return OneOf(alternatives)


def square(a: Pattern) -> Pattern:
    """`a²`, spelled `pow(a, 2)`, `square(a)` or `a * a`."""
    return one_of(call("pow", a, 2), call("square", a), call("mul", a, a))


def rsqrt(a: Pattern) -> Pattern:
    """`a^(-1/2)`, spelled `rsqrt(a)`, `pow(a, -0.5)` or `reciprocal(sqrt(a))`."""
    return one_of(call("rsqrt", a), call("pow", a, -0.5), call("reciprocal", call("sqrt", a)))
