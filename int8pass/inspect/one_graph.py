"""One graph of Dynamo's, and everything known of it: what Dynamo calls in place of the compiled graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch._guards import TracingContext

from int8pass import pipeline
from int8pass.capture import Program, from_dynamo
from int8pass.graph.constants import Store
from int8pass.inspect import profiled, timing
from int8pass.inspect.facts import Ran, SchemePoint, Stage
from int8pass.inspect.numbers import Noise
from int8pass.inspect.observe import GraphObserver
from int8pass.inspect.replay import Arguments, Replay, linear_names, mark_linears, tensors_of
from int8pass.inspect.stages import NAMES, kind_of, stage
from int8pass.inspect.variants import FINAL, comparable

if TYPE_CHECKING:
    from int8pass.inspect.collect import Collector


class OneGraph:
    """Quantized once when Dynamo hands it over, observed in every call; it computes what the original does."""

    def __init__(self, collector: Collector, index: int, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.collector, self.index, self.gm, self.forward = collector, index, gm, gm.forward
        self.context = TracingContext.get()
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
        self.runtime_note = ""
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
        collector.accounts.see(self.observer, arguments)
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
        packed = Store()
        before = timing.measured(self.observer.captured, arguments, packed).seconds
        after = timing.measured(self.lowered.program, arguments, packed).seconds
        self.collector.progress("time nodes", 1, 1)
        self.runtime, self.runtime_note = timing.rows(self.lowered, after, self.sites), timing.NOTE
        for site in self.observer.sites:
            nodes = self.lowered.nodes_of(site)
            fused = {self.lowered.ops[n.name] for n in nodes}
            old = sum(before[n] for n in timing.originals(site, fused) if n in before)
            self.seconds[site.name] = (old, sum(after[n] for n in nodes if n in after))
        self.total_seconds = sum(before.values())
        if self.collector.profile:
            self._profile(arguments, packed)
        del packed
        if self.collector.schemes:
            self._compare_schemes(arguments)

    def _profile(self, arguments: Arguments, packed: Store) -> None:
        """What the compiled graph runs. Where nothing can be compiled, the times of single nodes stay."""
        self.collector.progress("compile and profile", 0, 1)
        try:
            function, kernels = profiled.compile_observed(
                self.lowered.program, self.gm, self.context, arguments, packed
            )
            found = profiled.events(function, arguments)
        except Exception as failure:  # noqa: BLE001  Inductor, a C++ compiler and a driver each have their own
            reason = str(failure).strip().splitlines()[:1] or [""]
            self.runtime_note = f"{timing.NOTE}; Inductor failed: {type(failure).__name__}: {reason[0][:200]}"
        else:
            self.runtime = profiled.rows(self.lowered, kernels, found, self.sites)
            self.runtime_note = profiled.NOTE
        self.collector.progress("compile and profile", 1, 1)

    def _compare_schemes(self, arguments: Arguments) -> None:
        expected = tensors_of(Replay(self.observer.captured, arguments).finish())
        chosen = comparable(self.collector.recipe, (site.name for site in self.observer.sites))
        for done, (name, recipe) in enumerate(chosen.items()):
            self.collector.progress("compare schemes", done, len(chosen))
            lowered = self._lower(self.observer.made(recipe).program)
            self.observer.forget_variants()
            ran, noise = timing.measured(lowered.program, arguments, Store(), rounds=2), Noise()
            for one, other in zip(expected, tensors_of(ran.output)):
                noise.add(one, other)
            size = sum(lowered.bytes_of(site) for site in self.observer.sites)
            if noise.sqnr is not None:
                self.schemes.append(SchemePoint(name, noise.sqnr, ran.total, size))
        self.collector.progress("compare schemes", len(chosen), len(chosen))


__all__ = ["OneGraph"]
