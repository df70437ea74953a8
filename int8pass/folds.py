"""Folds: where the division by a smoothing vector goes, so that smoothing costs nothing at run time.

    norm(γ, β)      → every reader     γ / s, β / s (of a (1 + w) norm: (1 + w) / s)
    x · constant    → every reader     constant / s: norms in a spelling of their own
    linear          → attention, values only, grouped-query heads included → every reader: rows of W, b / s
    linear          → the product with a gate                              → every reader: rows of W, b / s
    linear          → ReLU                                                 → every reader: rows of W, b / s
    anything else   → a multiply by 1 / s, which fuses into what quantizes the input

Legal is a fold when nothing but the site's own linears sees the divided channels (SmoothQuant, arXiv 2211.10438,
section 4, folds into whatever layer has the right name; that changes the function of many models). Every fold's way
is run on random numbers in fp32 before it is taken: a relative change over 1e-5 refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from int8pass.capture import Program
from int8pass.graph.channels import ChannelMap, carries_scale, gamma_of, trace_channels
from int8pass.graph.constants import Constant, tensor_on
from int8pass.graph.pattern import CASTS, op_name
from int8pass.graph.rewrite import Edit
from int8pass.match import Site


def divide(vector: Tensor, s: Tensor) -> Tensor:
    """`vector / s` in the dtype of `vector`; exact for a gamma when s are powers of two or `representable`."""
    return (vector.float() / s).to(vector.dtype)


def shifted_gamma(gamma: Tensor, s: Tensor, offset: float) -> Tensor:
    """`(gamma + offset) / s` in fp32: the (1 + w) of a norm, folded, has no (1 + w) form that is exact."""
    return (gamma.float() + offset) / s


def divide_rows(weight: Tensor, s: Tensor) -> Tensor:
    """`weight[N, K] / s[N, None]` in fp32: an int8 weight follows, and one more rounding to bf16 would cost it."""
    return weight.float() / s.unsqueeze(-1)


def divide_rows_in_dtype(weight: Tensor, s: Tensor) -> Tensor:
    """The same in the dtype of a weight that stays a float."""
    return divide_rows(weight, s).to(weight.dtype)


def multiply_columns(weight: Tensor, s: Tensor) -> Tensor:
    """`weight[N, K] · s[K]` in fp32."""
    return weight.float() * s


def inverse(s: Tensor, dtype: torch.dtype) -> Tensor:
    """`1 / s` in `dtype`."""
    return s.reciprocal().to(dtype)


def representable(gamma: Tensor, s: Tensor) -> Tensor:
    """The s for which γ / s is exact in the dtype of γ: nearest to `s`, so that rounding γ / s costs nothing."""
    folded = divide(gamma, s).float()
    return torch.where(folded != 0, gamma.float() / folded, s)


def representable_inverse(s: Tensor, dtype: torch.dtype) -> Tensor:
    """The s nearest to `s` for which 1 / s is exact in `dtype`."""
    return inverse(s, dtype).float().reciprocal()


def group_maximum(s: Tensor, channels: tuple[int, ...], width: int) -> Tensor:
    """s [K] per input channel → [width] per channel of the producer: the largest of those it makes, 1 where none."""
    index = tensor_on(channels, torch.int64, s.device)
    grouped = torch.full((width,), -torch.inf, device=s.device).scatter_reduce(0, index, s.float(), "amax")
    return torch.where(grouped.isfinite(), grouped, torch.ones_like(grouped))


def take(s: Tensor, channels: tuple[int, ...]) -> Tensor:
    """`s[channels]`."""
    return s[tensor_on(channels, torch.int64, s.device)]


@dataclass(frozen=True)
class Fold:
    """How the input of a site can be divided by a vector at no cost; with `reason` set, it cannot."""

    kind: str
    """"norm", "linear" (what makes the input), or "none": the input is multiplied."""
    reason: str = ""
    channels: ChannelMap | None = field(default=None, repr=False)


class Folds:
    """The legal folds of sites of a program (`wanted`; default: all). Decided on the unchanged graph, before any is
    applied: to check one runs what lies between, attention over a whole prompt among it."""

    def __init__(self, program: Program, sites: tuple[Site, ...], wanted: Iterable[Site] | None = None) -> None:
        self._program = program
        self._checked: dict[Any, bool] = {}
        linears = [n for n in program.graph.nodes if op_name(n) == "linear"]
        weights = [program.constants.get(n.args[1]) for n in linears]
        self._shared = {w for w in weights if w is not None and weights.count(w) > 1}
        self._quantized = {reader.node for site in sites for reader in site.readers}
        self._found = {site.name: self._decide(site) for site in (sites if wanted is None else wanted)}

    def of(self, site: Site) -> Fold:
        """The fold of a site."""
        return self._found[site.name]

    def _decide(self, site: Site) -> Fold:
        source = site.source
        if any(reader.node.args[0] is not source or reader.node.args[1] is source for reader in site.readers):
            return Fold("none", "its input is read as a weight")
        if any(reader.weight in self._shared for reader in site.readers):
            return Fold("none", "a weight is shared with another linear")
        found = trace_channels(source, frozenset(r.node for r in site.readers))
        if isinstance(found, str):
            return Fold("none", found)
        kind = "linear" if op_name(found.producer) == "linear" else "norm"
        reason = self._followers(found) or (self._linear(found) if kind == "linear" else self._norm(found.producer))
        if not reason and not self._carries(found, source):
            reason = "the fold changed the result by more than 1e-5"
        return Fold("none", reason) if reason else Fold(kind, "", found)

    def _carries(self, found: ChannelMap, source: fx.Node) -> bool:
        """`carries_scale`, once for all layers that are alike."""
        key = tuple((n.target, len(n.args), str(n.meta.get("val"))) for n in found.path), found.channels
        if key not in self._checked:
            self._checked[key] = carries_scale(found, source)
        return self._checked[key]

    def _followers(self, found: ChannelMap) -> str:
        """Why the other linears that read these channels cannot be rescaled."""
        for node, _ in found.followers:
            weight = self._program.constants.get(node.args[1])
            if node in self._quantized or weight is None or weight in self._shared:
                return "what makes it is also read by a linear of another site, or one that cannot be rescaled"
            if node.meta["val"].dtype != torch.float32:
                return f"{weight.label}, which reads it too, stays in {node.meta['val'].dtype} and would be rounded"
        return ""

    def _norm(self, norm: fx.Node) -> str:
        constants = self._program.constants
        if constants.get(gamma_of(norm)) is None:
            return "its norm has no constant gamma"
        if op_name(norm) == "rms_norm" and norm.args[3] and norm.args[4]:
            return "its norm rounds before it multiplies by (1 + gamma)"
        beta = norm.args[3] if op_name(norm) == "layer_norm" and len(norm.args) > 3 else None
        if beta is not None and constants.get(beta) is None:
            return "its norm has no constant beta"
        if op_name(norm) == "layer_norm" and len(norm.args[1]) != 1:  # type: ignore[arg-type]
            return "its norm is over more than one axis"
        return ""

    def _linear(self, found: ChannelMap) -> str:
        producer, constants = found.producer, self._program.constants
        weight = constants.get(producer.args[1])
        if weight is None:
            return "the linear that makes it has no constant weight"
        if weight in self._shared:
            return f"{weight.label}, which makes it, is shared with another linear"
        if len(producer.args) > 2 and producer.args[2] is not None and constants.get(producer.args[2]) is None:
            return "the linear that makes it has no constant bias"
        if producer not in self._quantized and producer.meta["val"].dtype != torch.float32:
            return f"{weight.label}, which makes it, stays in {producer.meta['val'].dtype} and would be rounded"
        return ""

    def apply(self, site: Site, s: Constant) -> None:
        """Divide the site's input by `s` in what makes it, and multiply its linears' columns by `s`.

        The vector must be one that the fold can carry (`vector`); without a legal fold the input is multiplied by 1/s.
        """
        edit, fold = Edit(self._program), self.of(site)
        if fold.channels is None:
            _multiply(edit, site, s)
        else:
            self._divide(edit, site, fold.channels, s)
        for reader in site.readers:
            weight = edit.constant(reader.node.args[1])
            assert weight is not None
            (scaled,) = edit.derive(f"{reader.path}.smoothed", multiply_columns, [weight, s], before=reader.node)
            reader.node.update_arg(1, scaled)

    def _divide(self, edit: Edit, site: Site, found: ChannelMap, s: Constant) -> None:
        constants, options = self._program.constants, (found.channels, found.width)
        (of_producer,) = constants.derive(f"{site.name}.divisor", group_maximum, (s,), options)
        if self.of(site).kind == "norm":
            _divide_norm(edit, found.producer, of_producer)
        else:
            _divide_linear(edit, found.producer, of_producer, found.producer in self._quantized)
        for node, channels in found.followers:
            weight = edit.constant(node.args[1])
            assert weight is not None
            (own,) = constants.derive(f"{weight.label}.smoothing", take, (of_producer,), (channels,))
            (scaled,) = edit.derive(f"{weight.label}.smoothed", multiply_columns, [weight, own], before=node)
            node.update_arg(1, scaled)

    def vector(self, site: Site, s: Constant) -> Constant:
        """`s` moved to values that the site's fold carries exactly: equal within a head group, exact in the dtype."""
        constants, fold, label = self._program.constants, self.of(site), f"{site.name}.smoothing"
        found = fold.channels
        if found is None:
            return constants.derive(label, representable_inverse, (s,), (site.source.meta["val"].dtype,))[0]
        (s,) = constants.derive(label, group_maximum, (s,), (found.channels, found.width))
        norm = found.producer
        if fold.kind == "norm" and not (op_name(norm) == "rms_norm" and norm.args[3]):
            gamma = constants.get(gamma_of(norm))
            assert gamma is not None
            (s,) = constants.derive(label, representable, (gamma, s))
        return constants.derive(label, take, (s,), (found.channels,))[0]


def _divide_norm(edit: Edit, norm: fx.Node, s: Constant) -> None:
    """Replace γ (and β) of a norm by γ / s (β / s)."""
    gamma = edit.constant(gamma_of(norm))
    assert gamma is not None
    is_rms = op_name(norm) == "rms_norm"
    offset = float(norm.args[3]) if is_rms else 0.0  # type: ignore[arg-type]
    if op_name(norm) == "mul":
        (folded,) = edit.derive(f"{gamma.label}.smoothed", divide, [gamma, s], before=norm)
        _replace_through_casts(norm, gamma_of(norm), folded)
        return
    if offset:
        (folded,) = edit.derive(f"{gamma.label}.smoothed", shifted_gamma, [gamma, s], offset, before=norm)
        norm.args = (norm.args[0], folded, norm.args[2], 0.0, False)
        return
    (folded,) = edit.derive(f"{gamma.label}.smoothed", divide, [gamma, s], before=norm)
    arguments = list(norm.args)
    arguments[1 if is_rms else 2] = folded
    if not is_rms and len(arguments) > 3 and arguments[3] is not None:
        beta = edit.constant(arguments[3])
        assert beta is not None
        (arguments[3],) = edit.derive(f"{beta.label}.smoothed", divide, [beta, s], before=norm)
    norm.args = tuple(arguments)


def _replace_through_casts(node: fx.Node, old: fx.Node | None, new: fx.Node) -> None:
    """Let `node` read `new` where it reads `old`, directly or through casts of its own."""
    for argument in node.all_input_nodes:
        if argument is old:
            node.replace_input_with(old, new)
        elif op_name(argument) in CASTS and len(argument.users) == 1:
            _replace_through_casts(argument, old, new)


def _divide_linear(edit: Edit, producer: fx.Node, s: Constant, quantized: bool) -> None:
    """Divide the rows of a linear's weight, and its bias, by s."""
    weight = edit.constant(producer.args[1])
    assert weight is not None
    compute = divide_rows if quantized else divide_rows_in_dtype
    (folded,) = edit.derive(f"{weight.label}.smoothed", compute, [weight, s], before=producer)
    producer.update_arg(1, folded)
    if len(producer.args) > 2 and producer.args[2] is not None:
        bias = edit.constant(producer.args[2])
        assert bias is not None
        (divided,) = edit.derive(f"{bias.label}.smoothed", divide, [bias, s], before=producer)
        producer.update_arg(2, divided)


def _multiply(edit: Edit, site: Site, s: Constant) -> None:
    """Let the site's linears read `x · (1 / s)`; it fuses into what quantizes x."""
    first = min(reader.node for reader in site.readers)
    x = first.args[0]
    assert isinstance(x, fx.Node)
    (factor,) = edit.derive(f"{site.name}.unsmoothing", inverse, [s], x.meta["val"].dtype, before=first)
    product = edit.call(torch.ops.aten.mul.Tensor, x, factor, before=first)
    for reader in site.readers:
        reader.node.replace_input_with(x, product)
