"""Measure one graph: the captured program and its quantized variants, run side by side on the arguments of a call.

The captured program walks node by node. Where it comes to the input of a site, every variant's part of that site runs
on the same input (local error), and the quantized program follows to the same linears (cumulative error).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from int8pass.capture import Program, mutated_values
from int8pass.graph.pattern import op_name
from int8pass.graph.rewrite import LINEAR, RewriteLog
from int8pass.inspect.numbers import Noise, SiteNumbers, alpha_curve
from int8pass.inspect.replay import Arguments, Part, Replay, linear_names, results
from int8pass.match import Site, match
from int8pass.pipeline import Facts, Watch, to_portable
from int8pass.recipe import Recipe

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all), with 0 done when it begins."""

FINAL = "final"
NAIVE = "naive"
SMOOTHED = "smoothed"
FIXES = ("64 columns", "float activations")
"""Variants that an override may use: what they would make of a site."""


def with_schemes(recipe: Recipe, **fields: Any) -> Recipe:
    """The recipe with these fields in the scheme of every site."""
    sites = {
        name: settings if settings.scheme is None else dataclasses.replace(
            settings, scheme=dataclasses.replace(settings.scheme, **fields)
        )
        for name, settings in recipe.sites.items()
    }  # fmt: skip
    return dataclasses.replace(recipe, scheme=dataclasses.replace(recipe.scheme, **fields), sites=sites)


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe, what it is made of, and what could be changed, by name."""
    plain = with_schemes(recipe, smoothing="none", outliers="none", one_row="same")
    return {
        FINAL: recipe,
        NAIVE: plain,
        SMOOTHED: with_schemes(recipe, outliers="none", one_row="same"),
        FIXES[0]: with_schemes(recipe, outliers="largest", capacity=64, one_row="same"),
        FIXES[1]: with_schemes(recipe, activations="none"),
    }


@dataclass
class Variant:
    """One recipe's portable program of a graph."""

    program: Program
    facts: Facts
    ends: dict[str, fx.Node] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    """By site name."""

    @staticmethod
    def of(normalized: Program, log: RewriteLog, recipe: Recipe, watch: Watch = lambda stage, program: None) -> Variant:
        """Quantize a copy of a normalized program."""
        program = normalized.copy()
        made = Variant(program, to_portable(program, recipe, watch, normalized=log))
        made.ends = results(program)
        for site in made.facts.matches.sites:
            made.parts[site.name] = Part(program, linear_names(site), made.ends)
        return made

    def multiplies(self, site: str) -> bool:
        """True when the site multiplies its input by 1/s itself: nothing before it was changed."""
        return site in self.facts.smoothing.reasons


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
        self._variants = {_key(recipe): Variant.of(captured, log, recipe, watch)}
        self.output = Noise()

    def variant(self, name: str) -> Variant:
        """A variant by name, made when it is first asked for; equal recipes share one."""
        return self.made(self._by_name[name])

    def made(self, recipe: Recipe) -> Variant:
        """The variant of a recipe."""
        key = _key(recipe)
        if key not in self._variants:
            self._variants[key] = Variant.of(self.captured, self._log, recipe)
        return self._variants[key]

    def forget_variants(self) -> None:
        """Let go of all variants but the recipe's own: their graphs are large."""
        self._variants = {_key(self.recipe): self.variant(FINAL)}

    def see_weights(self, arguments: Arguments, names: Mapping[int, str]) -> None:
        """Weights alone: their channels, their error, the smoothing; `names` are the model's, by id of the tensor."""
        final = self.variant(FINAL)
        replay, quantized = Replay(self.captured, arguments), Replay(final.program, arguments)
        for site in self.sites:
            numbers = self.numbers.setdefault(site.name, SiteNumbers())
            for reader in site.readers:
                tensors = [arguments[p.position] for p in reader.weight.parameters() if p.position is not None]
                numbers.linears.update(dict.fromkeys(names[id(t)] for t in tensors if id(t) in names))
            if numbers.weights_seen:
                continue
            numbers.weights_seen = True
            vector = final.facts.smoothing.vectors.get(site.name)
            numbers.smoothing = None if vector is None else replay.value(vector)
            weights = [replay.value(reader.weight) for reader in site.readers]
            for weight in weights:
                numbers.see_weight(weight)
            columns = self.recipe.at(site.name).columns
            for weight, node in zip(weights, _weights(final.parts[site.name], site)):
                if node is None:
                    continue
                expected = weight.float() if numbers.smoothing is None else weight.float() * numbers.smoothing
                found = quantized.constant_result(node)
                if columns:
                    kept = torch.ones_like(expected[0]).index_fill(0, torch.tensor(columns, device=weight.device), 0)
                    expected, found = expected * kept, found.float() * kept
                numbers.weight.add(expected, found)

    def measure(self, arguments: Arguments, last: bool, alone: bool, progress: Progress) -> None:
        """All numbers of one call. `last` adds what is measured once, `alone` the one-site-at-a-time sensitivity."""
        expected = Replay(self.captured, arguments).finish()
        alone = alone and not mutated_values(self.captured.graph)
        walk = _Walk(self, arguments, last, expected if alone else None)
        walk.run(progress)
        for one, other in zip(tensors_of(expected), tensors_of(walk.quantized.finish())):
            self.output.add(one, other)


class _Walk:
    """One pass over the captured program, the quantized one beside it."""

    def __init__(self, observer: GraphObserver, arguments: Arguments, last: bool, expected: Any) -> None:
        self.observer, self.last, self.expected = observer, last, expected
        self.float = Replay(observer.captured, arguments)
        final = observer.variant(FINAL)
        self.quantized = Replay(final.program, arguments)
        self.names = [FINAL, NAIVE, SMOOTHED, *(FIXES if last else ())]
        others = {name: Replay(observer.variant(name).program, arguments) for name in self.names[1:]}
        self.replays = {FINAL: self.quantized, **others}
        self.ends = {node: linear for linear, node in final.ends.items()}
        self.ready: dict[str, Tensor] = {}
        self.pending: dict[fx.Node, dict[str, Tensor]] = {}
        self.site_of = {reader.node: site for site in observer.sites for reader in site.readers}

    def run(self, progress: Progress) -> None:
        """To the end of the graph."""
        sources: dict[fx.Node, list[Site]] = {}
        for site in self.observer.sites:
            sources.setdefault(site.source, []).append(site)
        for node in self.quantized.nodes:
            if node.op not in ("placeholder", "get_attr"):
                break
            self.quantized.step()  # the packed weights, which its parts read too
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
        found: dict[str, list[Tensor]] = {}
        for name in self.names:
            variant = self.observer.variant(name)
            smooths = name in (FINAL, SMOOTHED, FIXES[0], FIXES[1]) and not variant.multiplies(site.name)
            see = _codes_into(numbers) if name == FINAL else _nothing
            found[name] = variant.parts[site.name].run(numbers.smooth(x) if smooths else x, self.replays[name], see)
        for i, reader in enumerate(site.readers):
            self.pending[reader.node] = {name: values[i] for name, values in found.items()}
        if self.expected is not None:
            self._sensitivity(numbers, dict(zip((r.node for r in site.readers), found[FINAL])))
        if self.last:
            assert numbers.x is not None
            assert numbers.w is not None
            weights = [self.float.value(reader.weight) for reader in site.readers]
            scheme = self.observer.recipe.at(site.name).scheme
            numbers.curve = alpha_curve(x, weights, numbers.x, numbers.w, scheme is not None and scheme.symmetric)

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
        numbers.cumulative.add(expected, self.ready.pop(node.name))


def _nothing(node: fx.Node, value: Any) -> None:
    """See nothing."""


def _codes_into(numbers: SiteNumbers) -> Callable[[fx.Node, Any], None]:
    """Counts the activation codes that a part makes: the int8 element of a quantize op, with its scale and zero."""
    elements: dict[int, Tensor] = {}

    def see(node: fx.Node, value: Any) -> None:
        source = node.args[0] if node.args else None
        if node.target is not operator.getitem or not op_name(source).startswith("quantize"):
            return
        index = node.args[1]
        assert isinstance(index, int)
        elements[index] = value
        if len(elements) == 3:
            numbers.histograms.quantized(elements[0], elements[1], elements[2])
            elements.clear()

    return see


def _weights(part: Part, site: Site) -> list[fx.Node | None]:
    """For every linear of a site, the node of its dequantized weight in a portable program."""
    found = []
    for name, reader in zip(linear_names(site), site.readers):
        nodes = [n for n in part.nodes if n.meta.get(LINEAR) == name and "dequantize_weight" in op_name(n)]
        shaped = [n for n in nodes if tuple(n.meta["val"].shape) == reader.shape]
        found.append(shaped[0] if shaped else None)
    return found


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]


def _key(recipe: Recipe) -> tuple[object, ...]:
    """Hashable; equal for recipes that give equal graphs."""
    return recipe.scheme, recipe.quantize_head, frozenset(recipe.sites.items())


__all__ = ["FINAL", "FIXES", "NAIVE", "SMOOTHED", "GraphObserver", "Progress", "Variant", "tensors_of", "with_schemes"]
