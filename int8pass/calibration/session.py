"""A model captured once and run many times: as it is, watched at its sites, or quantized by one recipe after another.

Capturing a model takes longer than running it. A session keeps every graph that Dynamo makes, unquantized, and decides
at each call what to run in its place, node by node: nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from int8pass.calibration.execute import Execute, divergence, first_tensor, kept_rows
from int8pass.calibration.sensitivity import Differentiated, NoGradient, surrogate
from int8pass.capture import Program, from_dynamo
from int8pass.folds import Folds
from int8pass.graph.constants import Constant, Store
from int8pass.inspect.running import run
from int8pass.match import Matches, Site, match
from int8pass.normalize import normalize
from int8pass.pipeline import Facts, to_fused, to_portable
from int8pass.recipe import Recipe

Visit = Callable[[str, Tensor], None]
"""Called with a site's name and its input `[..., K]`."""


@dataclass
class SiteInfo:
    """What a session knows of a site, over all graphs that have it."""

    name: str
    width: int
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    """Output channels of each linear."""
    weights: tuple[Tensor, ...]
    """[N, K] of each linear."""
    channels: tuple[int, ...] | None
    """Which producer channel makes each input, where a fold into a producer is legal: equal ones share a scale."""
    fold: str
    """"norm", "linear", or why there is none."""


class Session:
    """Runs `model` on batches through its captured graphs. The model is not changed."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._model, self._recipe = model, recipe
        self._graphs: list[_Graph] = []
        self._make: Callable[[_Graph], Callable[..., Any]] = _Float
        self._calls = 0  # of graphs, in the last run

    @property
    def sites(self) -> dict[str, SiteInfo]:
        """Every site of every graph seen so far; empty before the first batch."""
        found: dict[str, SiteInfo] = {}
        for graph in self._graphs:
            for info in graph.infos():
                found.setdefault(info.name, info)
        return found

    def observe(self, batch: Any, visit: Visit) -> Any:
        """Run a batch through the unquantized model, showing the inputs of its sites."""
        return self._run(batch, lambda graph: _Float(graph, visit))

    def differentiated(self, batch: Any, seed: int, visit: Callable[[str, Tensor, Tensor], None]) -> None:
        """Run a batch and show, of every site, its input `[..., K]` and `‖g‖² [..., readers]` of its outputs' gradients
        g (`int8pass.calibration.sensitivity`). No gradient reaches the parameters.

        Raises:
            NoGradient: the output cannot be differentiated, or more than one graph made it.
        """
        if not self._calls:
            self.plain(batch)
        if self._calls != 1:  # what one graph makes is an input of the next, where Dynamo expects no gradient
            raise NoGradient(f"{self._calls} graphs made the output")
        runs: list[Differentiated] = []

        def make(graph: _Graph) -> Callable[..., Any]:
            runs.append(Differentiated(graph.program, graph.matches.sites))
            return runs[-1]

        output = self._run(batch, make)
        for name, x, squares in runs[0].sensitivities(surrogate(output, batch, seed)):
            visit(name, x, squares)

    def quantized(self, batch: Any, recipe: Recipe, blocks_on: tuple[str, ...] = ()) -> Any:
        """Run a batch through the portable form of the model under `recipe`; with `blocks_on` through its fused form,
        by the ops' references, with outlier blocks (`int8pass.hilo`) on these devices: as on a GPU."""
        return self._run(batch, lambda graph: graph.portable(recipe, blocks_on))

    def plain(self, batch: Any) -> Any:
        """Run a batch through the model as captured."""
        return self._run(batch, _Float)

    def facts(self, recipe: Recipe) -> list[Facts]:
        """What the pass did to every graph under a recipe that `quantized` ran."""
        return [graph.facts[id(recipe)] for graph in self._graphs if id(recipe) in graph.facts]

    def _run(self, batch: Any, make: Callable[[_Graph], Callable[..., Any]]) -> Any:
        self._make, self._calls = make, 0
        return run(self._model, batch, self._backend)

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, inputs)
        graph = _Graph(program, self._recipe)
        self._graphs.append(graph)

        def call(*arguments: Any) -> Any:
            self._calls += 1
            graph.arguments = arguments
            return self._make(graph)(*arguments)

        return call


class _Graph:
    """One captured graph: pristine, normalized with its sites, and quantized by the last recipe."""

    def __init__(self, program: Program, recipe: Recipe) -> None:
        self.captured = program
        self.program = program.copy()
        normalize(self.program)
        self.matches: Matches = match(self.program, recipe)
        self._folds = Folds(self.program, self.matches.sites)
        self.arguments: tuple[Any, ...] = ()
        self.facts: dict[int, Facts] = {}
        self._recipe: Recipe | None = None
        self._blocks_on: tuple[str, ...] = ()
        self._portable: Execute | None = None
        self._infos: list[SiteInfo] = []

    def infos(self) -> list[SiteInfo]:
        if not self._infos and self.arguments:
            self._infos = [self._info(site) for site in self.matches.sites]
        return self._infos

    def _info(self, site: Site) -> SiteInfo:
        fold = self._folds.of(site)
        return SiteInfo(
            site.name,
            site.width,
            tuple(r.path for r in site.readers),
            tuple(r.shape[0] for r in site.readers),
            tuple(self.value(r.weight) for r in site.readers),
            fold.channels.channels if fold.channels else None,
            fold.reason or fold.kind,
        )

    def value(self, constant: Constant) -> Tensor:
        """The real tensor of a constant, for the parameters of the last call."""
        return Store().value(constant, lambda p: self.arguments[p.position])  # type: ignore[index]

    def portable(self, recipe: Recipe, blocks_on: tuple[str, ...] = ()) -> Callable[..., Any]:
        """The graph under a recipe; the last one is kept."""
        if self._portable is None or self._recipe is not recipe or self._blocks_on != blocks_on:
            program = self.captured.copy()
            self.facts = {id(recipe): to_portable(program, recipe)}
            if blocks_on:
                to_fused(program, self.facts[id(recipe)], blocks_on=blocks_on)
            self._recipe, self._blocks_on, self._portable = recipe, blocks_on, Execute(program)
        return self._portable


class _Float(Execute):
    """The normalized graph in its own precision, with the sites' inputs shown as they are computed."""

    def __init__(self, graph: _Graph, visit: Visit | None = None) -> None:
        super().__init__(graph.program)
        self._visit = visit
        self._sources: dict[fx.Node, str] = {site.source: site.name for site in graph.matches.sites} if visit else {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; if a site reads its value, show it."""
        result = super().run_node(n)
        if self._visit is not None and n in self._sources and isinstance(result, Tensor):
            self._visit(self._sources[n], result)
        return result


__all__ = ["Session", "SiteInfo", "divergence", "first_tensor", "kept_rows"]
