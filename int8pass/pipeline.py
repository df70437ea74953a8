"""The project, in order.

    torch.compile ─┐                                                       ┌─ fuse ─ lower ─ Inductor      (run)
                   ├ capture ─ normalize ─ match ─ smooth ─ quantize ──────┤
    torch.export  ─┘                                                       └─ inspect ─ text               (see)

Every stage says in its module what it requires and ensures; `dialect.check` asserts it after each.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import fx

from int8pass import hilo
from int8pass.capture import Program
from int8pass.fuse import fuse
from int8pass.graph import dialect
from int8pass.graph.rewrite import RewriteLog
from int8pass.lower import choose_implementations
from int8pass.match import Matches, match
from int8pass.normalize import normalize
from int8pass.quantize import Quantized, quantize
from int8pass.recipe import Recipe
from int8pass.residual import residuals_into_linears
from int8pass.smooth import Smoothing, smooth

log = logging.getLogger(__name__)
"""Every refusal, at INFO: `TORCH_LOGS="+int8pass"`, or logging.getLogger("int8pass").setLevel(...)."""


@dataclass
class Facts:
    """What happened to one graph, stage by stage; the report is made from these."""

    normalized: RewriteLog = field(default_factory=RewriteLog)
    matches: Matches = field(default_factory=lambda: Matches((), ()))
    smoothing: Smoothing = field(default_factory=lambda: Smoothing({}, {}))
    quantized: list[Quantized] = field(default_factory=list)
    overflows: list[fx.Node] = field(default_factory=list)
    fused: RewriteLog = field(default_factory=RewriteLog)
    implementations: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(op, implementation) → nodes"""

    def implementations_of(self, op: str) -> tuple[str, ...]:
        """Names of the implementations chosen for an op in this graph."""
        return tuple(sorted(name for kind, name in self.implementations if kind == op))


Watch = Callable[[str, Program], None]


def to_normalized(program: Program, watch: Watch = lambda stage, program: None) -> RewriteLog:
    """Capture's program → normalized form, in place."""
    dialect.check(program, "captured")
    watch("captured", program)
    rewrites = normalize(program)
    dialect.check(program, "normalized")
    watch("normalized", program)
    return rewrites


def to_portable(
    program: Program,
    recipe: Recipe,
    watch: Watch = lambda stage, program: None,
    normalized: RewriteLog | None = None,
) -> Facts:
    """Capture's program → portable form, in place. `watch` sees the program after every stage.

    A program that is normalized already comes with the log of that.
    """
    facts = Facts(normalized=to_normalized(program, watch) if normalized is None else normalized)
    facts.matches = match(program, recipe)
    for refusal in facts.matches.refusals:
        log.info("not taken: %s: %s (%s)", refusal.linear, refusal.reason, refusal.source or "source unknown")
    facts.smoothing = smooth(program, facts.matches.sites, recipe)
    watch("smoothed", program)
    facts.quantized, facts.overflows = quantize(program, facts.matches, recipe)
    dialect.check(program, "portable")
    watch("portable", program)
    return facts


def to_fused(
    program: Program,
    facts: Facts,
    watch: Watch = lambda stage, program: None,
    blocks_on: Collection[str] | None = None,
    to_run: bool = False,
) -> None:
    """Portable form → fused ops, in place; `to_run`: also those that only some kernel of the device is there for.
    `blocks_on`: devices with outlier blocks in place of the usual ones."""
    facts.fused = fuse(program)
    devices = hilo.DEVICES if blocks_on is None else blocks_on
    facts.fused.hits["columns_to_blocks"] += hilo.columns_to_blocks(program, devices)
    if to_run:
        facts.fused.hits["residuals_into_linears"] += residuals_into_linears(program)
    dialect.check(program, "fused")
    watch("fused", program)


def to_lowered(program: Program, facts: Facts, watch: Watch = lambda stage, program: None) -> None:
    """Portable form → implementations for the device of its tensors, in place."""
    to_fused(program, facts, watch, to_run=True)
    facts.implementations = choose_implementations(program)
    watch("lowered", program)


__all__ = ["Facts", "to_fused", "to_lowered", "to_normalized", "to_portable"]
