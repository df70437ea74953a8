"""`auto`: what each site does, {leave, smooth, split, both, keep 16-bit}, under a budget of cost or error.

Costs are in products of int8 numbers: a site's linears cost N·K, a float column N times `FLOAT`, a site kept in its
dtype N·K times `KEPT`. They are ratios of throughput, coarse on purpose: a budget ranks choices, it predicts no time.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from int8pass.calibration.search import Choice

FLOAT, KEPT = 6.0, 4.0
COLUMNS = (0, 16, 32, 64)
MULTIPLES = (0.5, 2.0, 4.0, 8.0, 12.0)  # of the average, that one site may have


@dataclass(frozen=True)
class Option:
    """One thing to do with a site, and what it costs (in units of the site's plain int8 cost: 1 + extra)."""

    choice: Choice | None
    """None: keep the site in its dtype."""
    error: float
    extra: float


def option(choice: Choice, width: int) -> Option:
    """A quantized option of a site with `width` input channels."""
    return Option(choice, choice.error, FLOAT * len(choice.columns) / width)


def allotted(
    options: Mapping[str, Sequence[tuple[Choice, float]]], outputs: Mapping[str, int], columns: int
) -> dict[str, Choice]:
    """A choice for every site such that all together have no more float weights than `columns` at every site would be.

    They go where they save most: a range that all tokens share has more to gain from them than one per token, and a
    column costs as many weights as a site has outputs.

    Args:
        options: of each site, with what each costs the model's output, in any unit that all sites share.
        outputs: N of each site, over all its linears.
    """
    offered = {
        name: [Option(choice, error, len(choice.columns) / columns) for choice, error in found]
        for name, found in options.items()
    }
    chosen = spend(offered, outputs, cost=2.0)
    return {name: option.choice for name, option in chosen.items() if option.choice is not None}


def kept() -> Option:
    """The option to leave a site in its dtype."""
    return Option(None, 0.0, KEPT - 1)


def spend(
    options: Mapping[str, Sequence[Option]],
    sizes: Mapping[str, int],
    cost: float | None,
    error: float | None = None,
) -> dict[str, Option]:
    """An option for every site: the cheapest, then upgrades by error saved per cost, until a budget is reached.

    Args:
        options: of each site, in any order.
        sizes: N·K of each site, the unit of its costs.
        cost: all sites together may cost this multiple of plain int8; None: no limit.
        error: stop when the mean error of the sites is at most this; None: spend all of `cost`.
    """
    total = sum(sizes[name] for name in options)
    chosen = {name: min(o, key=lambda x: (x.extra, x.error)) for name, o in options.items()}
    free = (cost - 1) * total if cost is not None else float("inf")
    current = sum(c.error for c in chosen.values())
    queue: list[tuple[float, str, int]] = []
    for name in options:
        _offer(queue, name, options[name], chosen[name], sizes[name])
    while queue and (error is None or current > error * len(options)):
        gain, name, index = heapq.heappop(queue)
        new, old = options[name][index], chosen[name]
        price = (new.extra - old.extra) * sizes[name]
        if gain >= 0 or price > free:
            continue
        free -= price
        current += new.error - old.error
        chosen[name] = new
        _offer(queue, name, options[name], new, sizes[name])
    return chosen


def _offer(queue: list[tuple[float, str, int]], name: str, options: Sequence[Option], now: Option, size: int) -> None:
    """Queue every upgrade of a site from where it is now, replacing what was offered from where it was."""
    queue[:] = [entry for entry in queue if entry[1] != name]
    for index, other in enumerate(options):
        if other.error < now.error and other.extra > now.extra:
            saved = (now.error - other.error) / ((other.extra - now.extra) * size)
            queue.append((-saved, name, index))
    heapq.heapify(queue)
