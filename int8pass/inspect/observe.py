"""Measure one graph: its captured program and its quantized variants, run side by side on the arguments of a call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from int8pass.capture import Program, mutated_values
from int8pass.graph.pattern import op_name
from int8pass.graph.rewrite import LINEAR, RewriteLog
from int8pass.inspect.numbers import Noise, SiteNumbers
from int8pass.inspect.replay import Arguments, Part, Replay, linear_names, tensors_of
from int8pass.inspect.variants import FINAL, Variant, key_of, variants
from int8pass.inspect.walk import Walk
from int8pass.match import Site, match
from int8pass.pipeline import Watch
from int8pass.recipe import Recipe

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all), with 0 done when it begins."""


class GraphObserver:
    """One graph of Dynamo's: its programs, and what is measured when it is called.

    `numbers` belongs to all graphs of a model: a site that is in several counts together.
    """

    def __init__(
        self, captured: Program, log: RewriteLog, recipe: Recipe, numbers: dict[str, SiteNumbers], watch: Watch
    ) -> None:
        self.captured, self.recipe, self.numbers = captured, recipe, numbers
        self._log = log
        self.matches = match(captured, recipe)
        self.sites: tuple[Site, ...] = self.matches.sites
        self._by_name = variants(recipe)
        self._variants = {key_of(recipe): Variant.of(captured, log, recipe, watch)}
        self.output = Noise()

    def variant(self, name: str) -> Variant:
        """A variant by name, made when it is first asked for; equal recipes share one."""
        return self.made(self._by_name[name])

    def made(self, recipe: Recipe) -> Variant:
        """The variant of a recipe."""
        key = key_of(recipe)
        if key not in self._variants:
            self._variants[key] = Variant.of(self.captured, self._log, recipe)
        return self._variants[key]

    def forget_variants(self) -> None:
        """Let go of all variants but the recipe's own: their graphs are large."""
        self._variants = {key_of(self.recipe): self.variant(FINAL)}
        gc.collect()  # nodes refer to each other, and a large heap is collected seldom

    def see_weights(self, arguments: Arguments, names: Mapping[int, str]) -> None:
        """Weights alone: their channels, their error, the smoothing; `names` are the model's, by id of the tensor."""
        final = self.variant(FINAL)
        replay, quantized = (Replay(p, arguments, lazy=True) for p in (self.captured, final.program))
        divisors = final.divisors(replay)
        for site in self.sites:
            numbers = self.numbers.setdefault(site.name, SiteNumbers())
            for reader in site.readers:
                tensors = [arguments[p.position] for p in reader.weight.parameters() if p.position is not None]
                numbers.linears.update(dict.fromkeys(names[id(t)] for t in tensors if id(t) in names))
            if not numbers.weights_seen:
                numbers.weights_seen = True
                vector = final.facts.smoothing.vectors.get(site.name)
                numbers.smoothing = None if vector is None else replay.value(vector)
                self._weights_of(site, numbers, replay, quantized, divisors)

    def _weights_of(
        self, site: Site, numbers: SiteNumbers, replay: Replay, quantized: Replay, divisors: Mapping[str, Tensor]
    ) -> None:
        """Channels and error of a site's weights."""
        settings = self.recipe.at(site.name)
        assert settings.scheme is not None
        columns = settings.columns if settings.scheme.outliers == "static" else ()
        nodes = _weights(self.variant(FINAL).parts[site.name], site)
        for reader, node in zip(site.readers, nodes):
            weight = replay.value(reader.weight)
            smoothed = weight.float() if numbers.smoothing is None else weight.float() * numbers.smoothing
            if (divisor := divisors.get(reader.node.name)) is not None:
                smoothed = smoothed / divisor[:, None]
            numbers.see_weight(weight, smoothed)
            if node is None:
                continue
            found = quantized.constant_result(node)
            if columns:
                kept = torch.ones_like(smoothed[0]).index_fill(0, torch.tensor(columns, device=weight.device), 0)
                smoothed, found = smoothed * kept, found.float() * kept
            numbers.weight.add(smoothed, found)

    def measure(self, arguments: Arguments, last: bool, alone: bool, progress: Progress) -> None:
        """All numbers of one call. `last` adds what is measured once, `alone` the one-site-at-a-time sensitivity."""
        expected = Replay(self.captured, arguments).finish()
        alone = alone and not mutated_values(self.captured.graph)
        walk = Walk(self, arguments, last, expected if alone else None)
        walk.run(progress)
        for one, other in zip(tensors_of(expected), tensors_of(walk.quantized.finish())):
            self.output.add(one, other)


def _weights(part: Part, site: Site) -> list[fx.Node | None]:
    """For every linear of a site, the node of its dequantized weight in a portable program."""
    found = []
    for name, reader in zip(linear_names(site), site.readers):
        nodes = [n for n in part.nodes if n.meta.get(LINEAR) == name and "dequantize_weight" in op_name(n)]
        shaped = [n for n in nodes if tuple(n.meta["val"].shape) == reader.shape]
        found.append(shaped[0] if shaped else None)
    return found


__all__ = ["GraphObserver", "Progress"]
