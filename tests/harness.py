"""What the tests share: run a model through the pass up to a stage, and look at the graph and the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx, nn

from int8pass import pipeline
from int8pass.capture import Program, from_dynamo
from int8pass.graph.constants import Store
from int8pass.graph.pattern import op_name
from int8pass.graph.rewrite import RewriteLog, Rule, apply_rules
from int8pass.lower import Compiled, lift_constants
from int8pass.pipeline import Facts
from int8pass.recipe import Options, Recipe


@dataclass
class Run:
    """One model run under the harness: its output, and the program and facts of every graph Dynamo made."""

    output: Any = None
    programs: list[Program] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    ops: Counter[str] = field(default_factory=Counter)
    """Op name → nodes, over all graphs, at the stage asked for."""

    @property
    def taken(self) -> int:
        return sum(len(site.readers) for facts in self.facts for site in facts.matches.sites)

    @property
    def refused(self) -> dict[str, str]:
        return {r.linear: r.reason for facts in self.facts for r in facts.matches.refusals}


def count_ops(program: Program) -> Counter[str]:
    """Names of all calls of a graph."""
    return Counter(
        op_name(n) or getattr(n.target, "__name__", str(n.target))
        for n in program.graph.nodes
        if n.op == "call_function"
    )


def call(function: Callable[..., Any], inputs: Any) -> Any:
    """Call with a tensor, a tuple or a dictionary."""
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*((inputs,) if isinstance(inputs, Tensor) else inputs))


def run_pass(
    model: nn.Module,
    inputs: Any,
    recipe: Recipe | str = "default",
    stage: str = "lowered",
    fullgraph: bool = True,
    **options: Any,
) -> Run:
    """Run `model` through the pass without Inductor. `stage` is "portable" or "lowered"."""
    settings = Options.parse({"recipe": recipe, **options}, None)
    result, store = Run(), Store()

    def backend(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, example)
        facts = pipeline.to_portable(program, settings.recipe)
        if stage != "portable":
            pipeline.to_lowered(
                program, facts, lambda name, p: result.ops.update(count_ops(p)) if name == "fused" else None
            )
        else:
            result.ops.update(count_ops(program))
        result.programs.append(program)
        result.facts.append(facts)
        return executable(program, store, example)

    result.output = compile_and_call(model, inputs, backend, fullgraph)
    return result


def executable(program: Program, store: Store, example: Sequence[Any]) -> Compiled:
    """A program as a callable, run node by node in eager mode."""
    constants = lift_constants(program)
    program.gm.recompile()
    compiled = Compiled(program.placeholders, constants, store, example, False, None)
    compiled.function = program.gm.forward
    return compiled


def compile_and_call(model: nn.Module, inputs: Any, backend: Any, fullgraph: bool = True) -> Any:
    """One call under no_grad with a fresh Dynamo."""
    torch._dynamo.reset()
    with torch.no_grad():
        return call(torch.compile(model, backend=backend, fullgraph=fullgraph), inputs)


def check_rewrite(
    rules: Rule | Sequence[Rule],
    model: nn.Module,
    inputs: Any,
    *,
    before: Mapping[str, int],
    after: Mapping[str, int],
    hits: int,
    tolerance: float = 1e-6,
) -> RewriteLog:
    """Apply rules to a captured model: op counts before and after, hits, numbers, idempotence, parameters untouched."""
    rules = rules if isinstance(rules, Sequence) else (rules,)
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    logs: list[RewriteLog] = []

    def backend(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, example)
        assert_counts(count_ops(program), before)
        logs.append(apply_rules(program, rules))
        program.graph.lint()
        assert_counts(count_ops(program), after)
        second = apply_rules(program, rules)
        assert not second.hits, f"not idempotent: {second.hits}"
        return executable(program, Store(), example)

    with torch.no_grad():
        expected = call(model, inputs)
    found = compile_and_call(model, inputs, backend)
    assert logs[0].hits.total() == hits
    assert relative_error(found, expected) <= tolerance
    for name, p in model.named_parameters():
        assert torch.equal(p, originals[name]), f"{name} was changed"
    return logs[0]


def assert_counts(found: Counter[str], expected: Mapping[str, int]) -> None:
    """`expected` names some ops; the others may be anything."""
    assert {name: found[name] for name in expected} == dict(expected)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in fp64; NaN never passes a comparison."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


class Spy:
    """In the place of Inductor: notes the graph and the settings, and runs the graph node by node."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.ops: dict[str, int] = {}
        self.graphs = 0

    def __call__(
        self, program: Program, inputs: Sequence[Any], config: dict[str, Any], preparation: Any
    ) -> Callable[..., Any]:
        self.config, self.ops = config, count_ops(program)
        self.graphs += 1
        program.gm.recompile()
        return program.gm.forward


@contextmanager
def dynamo_counters() -> Any:
    """Dynamo's counters of what happens inside."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
