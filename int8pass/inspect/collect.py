"""Run a model through the pass with eager execution and collect the facts. Inspecting changes nothing."""

from __future__ import annotations

import dataclasses
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from int8pass import pipeline
from int8pass.capture import Program, from_dynamo
from int8pass.errors import CaptureError, Int8PassError
from int8pass.graph.pattern import CASTS
from int8pass.inspect import timing
from int8pass.inspect.facts import Errors, Ran, RefusedLinear, SchemePoint, SiteRow, Stage
from int8pass.inspect.numbers import Noise, SiteNumbers
from int8pass.inspect.observe import FINAL, FIXES, NAIVE, SMOOTHED, GraphObserver, Progress, tensors_of
from int8pass.inspect.replay import Arguments, Replay, linear_names, mark_linears
from int8pass.inspect.report import Report
from int8pass.inspect.stages import NAMES, Sources, kind_of, stage
from int8pass.match import VIEWS, Refusal, Site
from int8pass.recipe import PRESETS, Options, Recipe, Scheme


def inspect(
    model: nn.Module,
    args: Any,
    *,
    recipe: Recipe | str = "default",
    quantize_head: bool | None = None,
    data: Iterable[Any] | None = None,
    sensitivity: bool = True,
    schemes: bool = True,
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
        progress: called with (what is being done, steps done, steps in all).

    Raises:
        OptionError, RecipeError, CaptureError: as the backend would. A `CaptureError` names the line of the model and
            has the report of what could be seen as `partial`.
    """
    options: dict[str, Any] = {"recipe": recipe}
    if quantize_head is not None:
        options["quantize_head"] = quantize_head
    settings = Options.parse(options, None)
    collector = _Collector(model, settings.recipe, sensitivity, schemes, progress or _silent)
    collector.run(args, "structure")
    if not collector.graphs:
        raise CaptureError("torch.compile found nothing to compile in this model (is compilation disabled for it?)")
    batches = list(data or ())
    for i, batch in enumerate(batches):
        collector.measuring, collector.first, collector.last = True, i == 0, i == len(batches) - 1
        collector.run(batch, f"batch {i + 1} of {len(batches)}")
    return collector.report()


def run(model: nn.Module, args: Any, backend: Callable[..., Any]) -> Any:
    """Call `model` once under a backend, without gradients and without touching what is compiled already."""
    compiled = torch.compile(model, backend=backend)
    # Past its limit of graphs per code object Dynamo runs eagerly without a word, and would show an empty model; many
    # models share code objects. Patched for this call only.
    limits = torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)
    with torch.no_grad(), limits:
        return _call(compiled, args)


def _call(function: Callable[..., Any], args: Any) -> Any:
    if isinstance(args, Mapping):
        return function(**args)
    return function(*((args,) if isinstance(args, Tensor) else args))


def _silent(title: str, done: int, total: int) -> None:
    """No progress wanted."""


class _Graph:
    """One graph of Dynamo's, and everything known of it."""

    def __init__(self, collector: _Collector, index: int, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.collector, self.index, self.forward = collector, index, gm.forward
        program = from_dynamo(gm, inputs)
        self.meta = any(isinstance(v, Tensor) and v.device.type == "meta" for v in inputs)
        self.shown: dict[str, Program] = {}
        self.stages: list[Stage] = []
        log = pipeline.to_normalized(program, self._watch)
        mark_linears(program)
        self.observer = GraphObserver(program, log, collector.recipe, collector.numbers, self._watch)
        self.facts = self.observer.variant(FINAL).facts
        self.lowered, self.sites = self._lower(self.observer.variant(FINAL).program, self.facts), self.site_of_linear()
        self._show_fused()
        self.runtime: list[Ran] = []
        self.seconds: dict[str, tuple[float, float]] = {}
        self.schemes: list[SchemePoint] = []
        self.total_seconds = 0.0

    def site_of_linear(self) -> dict[str, str]:
        """Name of a captured linear → its site."""
        return {name: site.name for site in self.observer.sites for name in linear_names(site)}

    def _watch(self, name: str, program: Program) -> None:
        if name in NAMES:
            self.stages.append(stage(name, self.index, program, self.collector.sources, {}))

    def _lower(self, portable: Program, facts: pipeline.Facts | None = None) -> timing.Lowered:
        """The lowered form of a copy of a portable program."""
        program, ops = portable.copy(), dict[str, str]()

        def watch(name: str, program: Program) -> None:
            if name == "fused":
                ops.update({n.name: kind_of(n) for n in program.graph.nodes})
                if facts is not None:
                    self.fused = program.copy()

        # The meta device runs nothing, so there is nothing to choose for it.
        lower = pipeline.to_fused if self.meta else pipeline.to_lowered
        lower(program, facts or pipeline.Facts(), watch)
        return timing.Lowered(program, ops)

    def _show_fused(self) -> None:
        """The sites of all nodes are known now, and the implementations of the fused ones."""
        chosen = {n.name: n.meta.get("int8pass.implementation", "") for n in self.lowered.program.graph.nodes}
        programs = {"quantized": self.observer.variant(FINAL).program}
        for i, shown in enumerate(self.stages):
            if shown.name in ("normalized", "quantized"):
                program = programs.get(shown.name, self.observer.captured)
                key = {"quantized": "portable"}.get(shown.name, shown.name)
                self.stages[i] = stage(key, self.index, program, self.collector.sources, self.sites)
        fused = stage("fused", self.index, self.fused, self.collector.sources, self.sites)
        nodes = tuple(dataclasses.replace(n, implementation=chosen.get(n.name, "")) for n in fused.nodes)
        self.stages.append(dataclasses.replace(fused, nodes=nodes))
        del self.fused

    def __call__(self, *arguments: Any) -> Any:
        collector = self.collector
        try:
            self._observe(arguments)
        except Exception as failure:
            collector.own_failure = failure  # not the model's: to be raised as it is
            raise
        return self.forward(*arguments)

    def _observe(self, arguments: Arguments) -> None:
        collector = self.collector
        collector.account(self.observer, arguments)
        if not self.meta:
            self.observer.see_weights(arguments, collector.names)
        if collector.measuring and not self.meta:
            alone = collector.sensitivity and collector.first
            self.observer.measure(arguments, collector.last, alone, collector.progress)
            if collector.last:
                self.time(arguments)

    def time(self, arguments: Arguments) -> None:
        """Times of all nodes, and what every scheme would cost and lose."""
        self.observer.forget_variants()
        self.collector.progress("time nodes", 0, 1)
        before = timing.measured(self.observer.captured, arguments)
        after = timing.measured(self.lowered.program, arguments)
        self.collector.progress("time nodes", 1, 1)
        self.runtime = timing.rows(self.lowered, after, self.sites)
        for site in self.observer.sites:
            nodes = self.lowered.nodes_of(site)
            fused = {self.lowered.ops[n.name] for n in nodes}
            old = sum(before[n] for n in timing.originals(site, fused) if n in before)
            self.seconds[site.name] = (old, sum(after[n] for n in nodes if n in after))
        self.total_seconds = sum(before.values())
        if self.collector.schemes:
            self._compare_schemes(arguments)

    def _compare_schemes(self, arguments: Arguments) -> None:
        expected = tensors_of(Replay(self.observer.captured, arguments).finish())
        chosen = _comparable(self.collector.recipe)
        for done, (name, recipe) in enumerate(chosen.items()):
            self.collector.progress("compare schemes", done, len(chosen))
            variant = self.observer.made(recipe)
            noise = Noise()
            for one, other in zip(expected, tensors_of(Replay(variant.program, arguments).finish())):
                noise.add(one, other)
            self.observer.forget_variants()
            lowered = self._lower(variant.program)
            seconds = sum(timing.measured(lowered.program, arguments, rounds=2).values())
            size = sum(lowered.bytes_of(site) for site in self.observer.sites)
            if noise.sqnr is not None:
                self.schemes.append(SchemePoint(name, noise.sqnr, seconds, size))
        self.collector.progress("compare schemes", len(chosen), len(chosen))


def _comparable(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe in force and the presets that need no calibration."""
    found = {"this recipe": recipe}
    for name, scheme in PRESETS.items():
        other = dataclasses.replace(Recipe(scheme), quantize_head=recipe.quantize_head)
        if scheme.outliers != "static" and scheme.smoothing != "calibrated" and other != recipe:
            found[name] = other
    return found


class _Collector:
    """All graphs of one inspection."""

    def __init__(self, model: nn.Module, recipe: Recipe, sensitivity: bool, schemes: bool, progress: Progress) -> None:
        self.model, self.recipe, self.sensitivity, self.schemes = model, recipe, sensitivity, schemes
        self.progress = progress
        self.measuring = self.first = self.last = False
        self.numbers: dict[str, SiteNumbers] = {}
        self.graphs: list[_Graph] = []
        self.breaks: dict[str, None] = {}
        self.sources = Sources()
        self.names = {id(m.weight): name for name, m in linears_of(model)}
        self.own_failure: Exception | None = None
        self._explained: set[int] = set()
        self._read: set[int] = set()

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
            self.breaks[_break(reason)] = None
        self.progress("capture and quantize", len(self.graphs), len(self.graphs) + 1)
        graph = _Graph(self, len(self.graphs), gm, inputs)
        self.graphs.append(graph)
        self.progress("capture and quantize", len(self.graphs), len(self.graphs))
        return graph

    def account(self, observer: GraphObserver, arguments: Arguments) -> None:
        """Remember whose weights a call of a graph reads, and which of them a site or a refusal speaks of."""
        self._read |= {id(v) for v in arguments if isinstance(v, Tensor)}
        for site in observer.sites:
            for reader in site.readers:
                positions = [p.position for p in reader.weight.parameters()]
                self._explained |= {id(arguments[i]) for i in positions if i is not None}
        for refusal in observer.matches.refusals:
            for node in _weights_behind(refusal.node):
                constant = observer.captured.constants.get(node)
                positions = [p.position for p in constant.parameters()] if constant else []
                self._explained |= {id(arguments[i]) for i in positions if i is not None}

    def _unaccounted(self) -> list[RefusedLinear]:
        """Linears of the model that no graph speaks of."""
        found = []
        for name, module in linears_of(self.model):
            if id(module.weight) in self._explained:
                continue
            reason = "no graph reads its weight: on these inputs it did not run"
            if id(module.weight) in self._read:
                reason = "a graph reads its weight, but in no linear"
            found.append(RefusedLinear(name, reason, ""))
        return found

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
        for linear in self._unaccounted():
            refused.setdefault(linear.linear, linear)
        slowest = sorted((r for g in self.graphs for r in g.runtime), key=lambda r: -r.seconds)
        return Report(
            describe(self.recipe), len(self.graphs), tuple(sites.values()), tuple(refused.values()), dict(rules),
            self._settings(), tuple(self.breaks), tuple(s for g in self.graphs for s in g.stages),
            tuple(self.sources.lines), self._schemes(), tuple(slowest), timing.NOTE if slowest else "",
            output.sqnr if output.signal else None,
        )  # fmt: skip

    def _schemes(self) -> tuple[SchemePoint, ...]:
        """Of the largest graph: outputs of parts of a model cannot be added up."""
        largest = max(self.graphs, key=lambda g: len(g.observer.sites), default=None)
        return tuple(largest.schemes) if largest else ()

    def _row(self, graph: _Graph, site: Site, scheme: Scheme, columns: int) -> SiteRow:
        numbers = self.numbers.get(site.name, SiteNumbers())
        settings = self.recipe.at(site.name)
        naive, smoothed, final = (numbers.noise(name).sqnr for name in (NAIVE, SMOOTHED, FINAL))
        errors = Errors(numbers.weight.sqnr, naive, smoothed, final, numbers.cumulative.sqnr, numbers.alone)
        smoothing = graph.facts.smoothing.reasons.get(site.name, "")
        if site.name in graph.facts.smoothing.vectors:
            smoothing = "multiply" if smoothing else "folded"
        linears = tuple(reader.path for reader in site.readers)
        return SiteRow(
            site.name, site.producer, linears, (sum(r.shape[0] for r in site.readers), site.width),
            describe_scheme(scheme), columns, smoothing, graph.lowered.implementations(site),
            source=Refusal(site.name, "", site.readers[0].node).source,
            alpha=_alpha(settings, scheme, smoothing),
            smoothed_channels=0 if numbers.smoothing is None else int((numbers.smoothing != 1).sum()),
            outlier_columns=tuple(settings.columns) if scheme.outliers == "static" else (),
            absmax=numbers.absmax(), spread=numbers.spread(),
            errors=errors,
            bytes=(timing.weight_bytes(site), graph.lowered.bytes_of(site)),
            seconds=graph.seconds.get(site.name), tokens=numbers.tokens, channels=numbers.channels(),
            histogram=numbers.histograms.facts(), curve=numbers.curve, graph=graph.index,
            fixes=tuple((name, noise.sqnr) for name, noise in numbers.local.items() if name in FIXES and noise.sqnr),
        )  # fmt: skip

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
        """What failed, where in the model, what to do, and what could be seen."""
        error = CaptureError(
            f"{type(self.model).__name__} could not be captured ({title}): {inner or _first_lines(failure)}\n"
            f"  at      {_failing_line(failure)}\n  to do   {self._advice(args)}\n  seen    {self._seen()}"
        )
        error.partial = self.report()
        return error

    def _advice(self, args: Any) -> str:
        try:
            with torch.no_grad():
                _call(self.model, args)
        except Exception as eager:  # noqa: BLE001  a model may raise anything
            return f"the model itself fails on these inputs ({type(eager).__name__}): give inputs it runs with"
        return (
            "the model runs eagerly, but torch.compile cannot trace this line: take it out of the graph with "
            "@torch._dynamo.disable on its function, or inspect the part of the model without it"
        )

    def _seen(self) -> str:
        total = sum(1 for _ in linears_of(self.model))
        taken = sum(len(g.observer.sites) for g in self.graphs)
        return f"{total} linears in the model; {len(self.graphs)} graphs with {taken} sites captured before it failed"


def linears_of(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Modules with a 2-D weight that multiplies (tables of embeddings are looked up): name and module."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            yield name, module


def _weights_behind(node: fx.Node) -> list[fx.Node]:
    """The constants among a refused call's operands, through views, casts and whatever computes a weight."""
    found, seen = [], set[fx.Node]()
    todo = list(node.all_input_nodes)
    for i, start in enumerate(list(todo)):
        # Only the weight of a linear may be computed in any way; other operands are seen through views and casts.
        anything = kind_of(node) == "linear" and i == 1
        stack = [start]
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current.op == "get_attr":
                found.append(current)
            elif anything or kind_of(current) in VIEWS | CASTS | {"index"}:
                stack += current.all_input_nodes
    return found


def _refused(refusal: Refusal) -> tuple[str, RefusedLinear]:
    return refusal.linear, RefusedLinear(refusal.linear, refusal.reason, refusal.source, refusal.asked)


def _break(reason: Any) -> str:
    where = f"{reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}" if reason.user_stack else ""
    return f"{str(reason.reason).strip().splitlines()[0]} ({where})"


def _first_lines(failure: Exception) -> str:
    lines = [line for line in str(failure).strip().splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"


def _failing_line(failure: BaseException) -> str:
    """The innermost line of the user's code that an error came from."""
    stack = list(getattr(failure, "real_stack", None) or ()) or traceback.extract_tb(failure.__traceback__)
    own = [f for f in stack if "/torch/" not in f.filename and "/int8pass/" not in f.filename and "<" not in f.filename]
    if not own:
        return "a line that is not known"
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}"


def _alpha(settings: Any, scheme: Scheme, smoothing: str) -> float | None:
    """α of a site's smoothing, where its settings or its scheme name one."""
    if smoothing not in ("folded", "multiply"):
        return None
    for holder in (settings, scheme):
        value = getattr(holder, "alpha", None)
        if isinstance(value, (int, float)):
            return float(value)
    return 0.5  # both the data-free form and calibrated exponents balance evenly (`int8pass.smooth`)


def describe_scheme(scheme: Scheme) -> str:
    """One or two words per choice: `w8a8 affine, largest columns`."""
    if scheme.activations == "none":
        return "w8a16"
    columns = {"none": "", "largest": ", largest columns", "static": ", static columns"}
    outliers = columns.get(scheme.outliers, f", columns > {scheme.threshold:g}")
    ranges = {"per_tensor": ", per tensor", "static": ", static range"}.get(scheme.activations, "")
    weights = {"group": f", groups of {scheme.group_size}", "per_tensor": ", one weight scale"}.get(scheme.weights, "")
    return f"w8a8 {'symmetric' if scheme.symmetric else 'affine'}{ranges}{weights}{outliers}"


def describe(recipe: Recipe) -> str:
    """The recipe in one line: its preset if it is one, and the fields."""
    name = next((name for name, scheme in PRESETS.items() if scheme == recipe.scheme), "custom")
    extra = f", {len(recipe.sites)} sites with settings of their own" if recipe.sites else ""
    head = ", head quantized" if recipe.quantize_head else ""
    return f"{name} ({describe_scheme(recipe.scheme)}{head}{extra})"


__all__ = ["describe", "describe_scheme", "inspect", "linears_of", "run"]
