"""Run a model through the pass with eager execution and collect the facts. Inspecting changes nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from int8pass.errors import CaptureError, Int8PassError
from int8pass.inspect import timing
from int8pass.inspect.accounting import Accounts, linears_of
from int8pass.inspect.describe import alpha_of, describe, describe_scheme, how_smoothed
from int8pass.inspect.facts import Errors, RefusedLinear, SchemePoint, SiteRow
from int8pass.inspect.failures import break_reason, explain
from int8pass.inspect.numbers import Noise, SiteNumbers
from int8pass.inspect.observe import Progress
from int8pass.inspect.one_graph import OneGraph
from int8pass.inspect.report import Report
from int8pass.inspect.running import run
from int8pass.inspect.stages import Sources
from int8pass.inspect.variants import FINAL, FIXES, NAIVE, SMOOTHED, fix_code
from int8pass.match import Refusal, Site
from int8pass.recipe import Options, Recipe, Scheme


def inspect(
    model: nn.Module,
    args: Any,
    *,
    recipe: Recipe | str = "default",
    quantize_head: bool | None = None,
    data: Iterable[Any] | None = None,
    sensitivity: bool = True,
    schemes: bool = True,
    profile: bool = True,
    progress: Progress | None = None,
) -> Report:
    """What `torch.compile(model, backend="int8")` does to `model` on `args`, site by site, refusal by refusal.

    Args:
        model: any module. It runs in its own precision; nothing of it is changed or kept. On the meta device it is
            inspected without its weights.
        args: its inputs: a tensor, a tuple of positional or a dictionary of keyword arguments.
        recipe: preset name, `Recipe`, or path of a recipe file.
        quantize_head: overrides the recipe's.
        data: more inputs of the same kind, to measure activations, errors and times on; without it the report holds
            what follows from the graph and the weights. A few hundred tokens are enough.
        sensitivity: with data, quantize one site at a time and look at the output: half a run of the model per site.
        schemes: with data, error and time of every preset that needs no calibration.
        profile: with data, compile the graph with Inductor and profile what it runs; else its nodes are timed one by
            one, without Inductor's fusion.
        progress: called with (what is being done, steps done, steps in all).

    Raises:
        OptionError, RecipeError, CaptureError: as the backend would. A `CaptureError` names the line of the model and
            has the report of what could be seen as `partial`.
    """
    options: dict[str, Any] = {"recipe": recipe}
    if quantize_head is not None:
        options["quantize_head"] = quantize_head
    settings = Options.parse(options, None)
    collector = Collector(model, settings.recipe, (sensitivity, schemes, profile), progress or _silent)
    collector.run(args, "structure")
    if not collector.graphs:
        raise CaptureError("torch.compile found nothing to compile in this model (is compilation disabled for it?)")
    batches = list(data or ())
    for i, batch in enumerate(batches):
        collector.measuring, collector.first, collector.last = True, i == 0, i == len(batches) - 1
        collector.run(batch, f"batch {i + 1} of {len(batches)}")
    return collector.report()


def _silent(title: str, done: int, total: int) -> None:
    """No progress wanted."""


class Collector:
    """All graphs of one inspection."""

    def __init__(self, model: nn.Module, recipe: Recipe, wanted: tuple[bool, bool, bool], progress: Progress) -> None:
        self.model, self.recipe, self.progress = model, recipe, progress
        self.sensitivity, self.schemes, self.profile = wanted
        self.measuring = self.first = self.last = False
        self.numbers: dict[str, SiteNumbers] = {}
        self.graphs: list[OneGraph] = []
        self.breaks: dict[str, None] = {}
        self.sources = Sources()
        self.names = {id(m.weight): name for name, m in linears_of(model)}
        self.accounts = Accounts(model)
        self.own_failure: Exception | None = None

    def run(self, args: Any, title: str) -> None:
        """One call of the model."""
        try:
            run(self.model, args, self.backend)
        except Exception as failure:
            inner = failure if isinstance(failure, Int8PassError) else getattr(failure, "inner_exception", None)
            if failure is self.own_failure:
                raise
            if isinstance(inner, Int8PassError) and not isinstance(inner, CaptureError):
                raise inner from failure
            raise self._capture_error(failure, inner, args, title) from failure

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What Dynamo calls for every graph."""
        reason = getattr(gm, "compile_subgraph_reason", None)
        if reason is not None and getattr(reason, "graph_break", False):
            self.breaks[break_reason(reason)] = None
        self.progress("capture and quantize", len(self.graphs), len(self.graphs) + 1)
        graph = OneGraph(self, len(self.graphs), gm, inputs)
        self.graphs.append(graph)
        self.progress("capture and quantize", len(self.graphs), len(self.graphs))
        return graph

    def report(self) -> Report:
        """Everything found so far."""
        sites: dict[str, SiteRow] = {}
        refused: dict[str, RefusedLinear] = {}
        rules: Counter[str] = Counter()
        output = Noise()
        for graph in self.graphs:
            rules += graph.facts.normalized.hits + graph.facts.fused.hits
            for site, done in zip(graph.observer.sites, graph.facts.quantized):
                sites.setdefault(site.name, self._row(graph, site, done.scheme, done.columns))
            for refusal in graph.observer.matches.refusals:
                refused.setdefault(*_refused(refusal))
            output.signal += graph.observer.output.signal
            output.noise += graph.observer.output.noise
        for linear in self.accounts.missing():
            refused.setdefault(linear.linear, linear)
        notes = dict.fromkeys(g.runtime_note for g in self.graphs if g.runtime)
        slowest = sorted((r for g in self.graphs for r in g.runtime), key=lambda r: -r.seconds)
        return Report(
            describe(self.recipe), len(self.graphs), tuple(sites.values()), tuple(refused.values()), dict(rules),
            self._settings(), tuple(self.breaks), tuple(s for g in self.graphs for s in g.stages),
            tuple(self.sources.lines), self._schemes(), tuple(slowest), "; ".join(notes),
            output.sqnr if output.signal else None,
        )  # fmt: skip

    def _schemes(self) -> tuple[SchemePoint, ...]:
        """Of the largest graph: outputs of parts of a model cannot be added up."""
        largest = max(self.graphs, key=lambda g: len(g.observer.sites), default=None)
        return tuple(largest.schemes) if largest else ()

    def _row(self, graph: OneGraph, site: Site, scheme: Scheme, columns: int) -> SiteRow:
        numbers = self.numbers.get(site.name, SiteNumbers())
        settings = self.recipe.at(site.name)
        naive, smoothed, final = (numbers.noise(name).sqnr for name in (NAIVE, SMOOTHED, FINAL))
        errors = Errors(numbers.weight.sqnr, naive, smoothed, final, numbers.cumulative.sqnr, numbers.alone)
        made = graph.facts.smoothing
        smoothing = how_smoothed(settings, made.reasons.get(site.name, ""), site.name in made.vectors)
        linears = tuple(reader.path for reader in site.readers)
        blocks = graph.lowered.has_blocks(site)
        return SiteRow(
            site.name, site.producer, linears, (sum(r.shape[0] for r in site.readers), site.width),
            describe_scheme(scheme, blocks), 0 if blocks else columns, smoothing, graph.lowered.implementations(site),
            source=Refusal(site.name, "", site.readers[0].node).source,
            alpha=alpha_of(settings, scheme) if smoothing in ("folded", "multiply") else None,
            smoothed_channels=0 if numbers.smoothing is None else int((numbers.smoothing != 1).sum()),
            outlier_columns=tuple(settings.columns) if scheme.outliers == "static" else (),
            absmax=numbers.absmax(), spread=numbers.spread(),
            errors=errors,
            bytes=(timing.weight_bytes(site), graph.lowered.bytes_of(site)),
            seconds=graph.seconds.get(site.name), tokens=numbers.tokens, channels=numbers.channels(),
            histogram=numbers.histograms.facts(), curve=numbers.curve, graph=graph.index,
            fixes=self._fixes(site.name, blocks),
        )  # fmt: skip

    def _fixes(self, site: str, blocks: bool) -> tuple[tuple[str, float, str], ...]:
        settings, found = self.recipe.at(site), self.numbers.get(site, SiteNumbers()).local
        assert settings.scheme is not None
        # More columns change nothing where blocks have taken their place.
        measured = ((n, found[n].sqnr) for n in (FIXES[1:] if blocks else FIXES) if n in found)
        return tuple((name, sqnr, fix_code(name, settings.scheme, settings)) for name, sqnr in measured if sqnr)

    def _settings(self) -> dict[str, str]:
        from int8pass import __version__

        parameters = list(self.model.parameters())
        first = parameters[0] if parameters else torch.empty(0)
        found = {
            "model": type(self.model).__name__,
            "parameters": f"{sum(p.numel() for p in parameters):,}",
            "device": str(first.device),
            "dtype": str(first.dtype).removeprefix("torch."),
            **{f"scheme.{k}": str(v) for k, v in dataclasses.asdict(self.recipe.scheme).items()},
            "quantize_head": str(self.recipe.quantize_head),
            **{f"recipe made with {k}": v for k, v in self.recipe.versions.items()},
            "torch": torch.__version__,
            "int8pass": __version__,
        }
        tokens = max((n.tokens for n in self.numbers.values()), default=0)
        if tokens:
            found["tokens measured on"] = str(tokens)
        seconds = sum(g.total_seconds for g in self.graphs)
        if seconds:
            found["seconds, original"] = f"{seconds:.6g}"
        return found

    def _capture_error(self, failure: Exception, inner: Int8PassError | None, args: Any, title: str) -> CaptureError:
        error = CaptureError(explain(self.model, failure, inner, args, title, self._seen()))
        error.partial = self.report()
        return error

    def _seen(self) -> str:
        total = sum(1 for _ in linears_of(self.model))
        taken = sum(len(g.observer.sites) for g in self.graphs)
        return f"{total} linears in the model; {len(self.graphs)} graphs with {taken} sites captured before it failed"


def _refused(refusal: Refusal) -> tuple[str, RefusedLinear]:
    return refusal.linear, RefusedLinear(refusal.linear, refusal.reason, refusal.source, refusal.asked)


__all__ = ["Collector", "inspect"]
