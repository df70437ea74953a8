"""One walk through a call: the captured program node by node, the quantized one beside it.

Where the walk comes to the input of a site, every variant's part of that site runs on the same input (local error), and
the quantized program follows to the same linears (cumulative error). A linear whose rows were divided for the smoothing
of a later site is multiplied back before it is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from int8pass.graph.pattern import op_name
from int8pass.inspect.numbers import Noise, SiteNumbers, alpha_curve
from int8pass.inspect.replay import Arguments, Replay, tensors_of
from int8pass.inspect.variants import FINAL, FIXES, NAIVE, SMOOTHED
from int8pass.match import Site

if TYPE_CHECKING:
    from int8pass.inspect.observe import GraphObserver, Progress


class Walk:
    """One pass over the captured program; `expected` is its output where sensitivities are wanted."""

    def __init__(self, observer: GraphObserver, arguments: Arguments, last: bool, expected: Any) -> None:
        self.observer, self.last, self.expected = observer, last, expected
        self.float = Replay(observer.captured, arguments)
        final = observer.variant(FINAL)
        self.quantized = Replay(final.program, arguments, lazy=True)
        self.names = [FINAL, NAIVE, SMOOTHED, *(FIXES if last else ())]
        self.replays = {name: Replay(observer.variant(name).program, arguments, lazy=True) for name in self.names[1:]}
        self.replays[FINAL] = self.quantized
        self.divisors = {name: observer.variant(name).divisors(self.float) for name in self.names}
        self.ends = {node: linear for linear, node in final.ends.items()}
        self.ready: dict[str, Tensor] = {}
        self.pending: dict[fx.Node, dict[str, Tensor]] = {}
        self.site_of = {reader.node: site for site in observer.sites for reader in site.readers}

    def run(self, progress: Progress) -> None:
        """To the end of the graph."""
        sources: dict[fx.Node, list[Site]] = {}
        for site in self.observer.sites:
            sources.setdefault(site.source, []).append(site)
        done, total = 0, len(self.observer.sites)
        progress("measure sites", 0, total)
        while not self.float.done:
            node, value = self.float.step()
            if node in self.pending:
                self._compare(node, value)
            for site in sources.get(node, ()):
                self._enter(site, value)
                done += 1
                progress("measure sites", done, total)

    def _enter(self, site: Site, x: Tensor) -> None:
        """The input of a site is there: its statistics, and what every variant makes of it."""
        numbers = self.observer.numbers[site.name]
        numbers.see_input(x)
        for name in self.names:
            variant = self.observer.variant(name)
            smooths = name != NAIVE and not variant.multiplies(site.name)
            see = _codes_into(numbers) if name == FINAL else _nothing
            values = variant.parts[site.name].run(numbers.smooth(x) if smooths else x, self.replays[name], see)
            for reader, value in zip(site.readers, values):
                self.pending.setdefault(reader.node, {})[name] = self._undivided(name, reader.node.name, value)
        if self.expected is not None:
            self._sensitivity(numbers, {r.node: self.pending[r.node][FINAL] for r in site.readers})
        if self.last:
            assert numbers.x is not None
            assert numbers.w is not None
            weights = [self.float.value(reader.weight) for reader in site.readers]
            scheme = self.observer.recipe.at(site.name).scheme
            assert scheme is not None
            numbers.curve = alpha_curve(x, weights, numbers.x, numbers.w, scheme)

    def _undivided(self, variant: str, linear: str, value: Tensor) -> Tensor:
        """What a linear of a variant would give, had the smoothing of a later site not been folded into it."""
        divisor = self.divisors[variant].get(linear)
        return value if divisor is None else (value.float() * divisor).to(value.dtype)

    def _sensitivity(self, numbers: SiteNumbers, replaced: dict[fx.Node, Tensor]) -> None:
        noise = Noise()
        for one, other in zip(tensors_of(self.expected), tensors_of(self.float.fork(replaced))):
            noise.add(one, other)
        numbers.alone = noise.sqnr

    def _compare(self, node: fx.Node, expected: Tensor) -> None:
        """A linear of the captured program is done."""
        numbers = self.observer.numbers[self.site_of[node].name]
        for name, found in self.pending.pop(node).items():
            numbers.noise(name).add(expected, found)
        while node.name not in self.ready and not self.quantized.done:
            done, value = self.quantized.step()
            if done in self.ends:
                self.ready[self.ends[done]] = value
        numbers.cumulative.add(expected, self._undivided(FINAL, node.name, self.ready.pop(node.name)))


def _nothing(node: fx.Node, value: Any) -> None:
    """See nothing."""


def _codes_into(numbers: SiteNumbers) -> Callable[[fx.Node, Any], None]:
    """Counts the activation codes that a part makes."""

    def see(node: fx.Node, value: Any) -> None:
        if op_name(node) in {"quantize_per_token", "quantize_per_tensor"}:
            numbers.histograms.quantized(*value)

    return see


__all__ = ["Walk"]
