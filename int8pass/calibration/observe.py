"""Passes over calibration data: statistics, a small sample, histograms and Hessians of every site's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from int8pass.calibration.clipping import Histogram
from int8pass.calibration.rounding import hessian
from int8pass.calibration.session import Session, kept_rows
from int8pass.calibration.statistics import ChannelStatistics
from int8pass.errors import CalibrationError

SAMPLE, EXTREME = 256, 128
"""Tokens of a site that choices are tried on: evenly spaced ones, and those that leave their channels' ranges most."""


@dataclass(frozen=True)
class Sample:
    """Tokens of a site's input, each standing for as many as `weights` says."""

    rows: Tensor
    """fp32 [T, K]."""
    weights: Tensor
    """fp32 [T]."""
    sensitivities: Tensor | None = None
    """fp32 [T, readers]: ‖g‖² of every linear's output (`int8pass.calibration.sensitivity`)."""


Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


def over(
    session: Session, batches: Sequence[Any], title: str, progress: Progress, visit: Callable[[str, Tensor], None]
) -> None:
    """Show the unpadded tokens `[T, K]` of every site and batch to `visit`.

    Raises:
        CalibrationError: a batch that the model refuses.
    """
    progress(title, 0, len(batches))
    for done, batch in enumerate(batches):
        try:
            session.observe(batch, lambda name, x, batch=batch: visit(name, kept_rows(x, batch)))  # type: ignore[misc]
        except (TypeError, ValueError, RuntimeError) as error:
            raise CalibrationError(f"batch {done} of '{title}' does not run through the model: {error}") from error
        progress(title, done + 1, len(batches))


def statistics(session: Session, batches: Sequence[Any], progress: Progress) -> dict[str, ChannelStatistics]:
    """Statistics of every site over all batches, of all processes where torch.distributed runs.

    Raises:
        CalibrationError: NaN or Inf at a site, named with its batch.
    """
    found: dict[str, ChannelStatistics] = {}
    batch = [0]

    def visit(name: str, rows: Tensor) -> None:
        mine = found.setdefault(name, ChannelStatistics(rows.shape[1], rows.device))
        mine.update(rows)
        if not mine.finite:
            raise CalibrationError(f"batch {batch[0]}: the input of {name} holds NaN or Inf")

    def count(title: str, done: int, total: int) -> None:
        batch[0] = done
        progress(title, done, total)

    over(session, batches, "calibrate", count, visit)
    for name, info in session.sites.items():
        found.setdefault(name, ChannelStatistics(info.width))
    return _joined(found)


def _joined(own: dict[str, ChannelStatistics]) -> dict[str, ChannelStatistics]:
    """The statistics of all processes, merged in rank order."""
    merged: dict[str, ChannelStatistics] = {}
    for other in gathered({name: found.state() for name, found in own.items()}):
        for name, state in other.items():
            if name in merged:
                merged[name].merge(ChannelStatistics.from_state(state))
            else:
                merged[name] = ChannelStatistics.from_state(state)
    return merged if len(merged) and dist_size() > 1 else own


def samples(
    session: Session,
    batches: Sequence[Any],
    seen: Mapping[str, ChannelStatistics],
    progress: Progress,
    sensitive: bool = False,
) -> dict[str, Sample]:
    """A sample of every site in two strata, from all batches alike.

    At most `EXTREME` tokens are those that reach furthest beyond what their channels did in `seen`, and stand for
    themselves; at most `SAMPLE` evenly spaced ones stand for all others. A range that clips one token in a hundred may
    lose more by it than by the resolution of all, and evenly spaced tokens alone hardly ever show that.

    With `sensitive` the sample knows how much the model's output depends on every token, by a backward pass a batch.

    Raises:
        NoGradient: the model has no gradients.
    """
    each, extreme = max(1, SAMPLE // len(batches)), max(1, EXTREME // len(batches))
    found: dict[str, list[Sample]] = {}

    def visit(name: str, rows: Tensor, squares: Tensor | None = None) -> None:
        if rows.shape[0]:
            absmax = seen[name].absmax.to(rows.device, torch.float32).clamp_min(1e-30)
            found.setdefault(name, []).append(_sample(rows.float(), absmax, each, extreme, squares))

    if sensitive:
        progress("differentiate", 0, len(batches))
        for done, batch in enumerate(batches):

            def seen_by(name: str, x: Tensor, squares: Tensor, batch: Any = batch) -> None:
                visit(name, kept_rows(x, batch), kept_rows(squares, batch))

            session.differentiated(batch, done, seen_by)
            progress("differentiate", done + 1, len(batches))
    else:
        over(session, batches, "sample", progress, visit)
    joined: dict[str, list[Sample]] = {}
    for other in gathered({name: _merged(parts, "cpu") for name, parts in found.items()}):
        for name, part in other.items():
            joined.setdefault(name, []).append(part)
    devices = {name: parts[0].rows.device for name, parts in found.items()}
    return {name: _merged(parts, devices.get(name, "cpu")) for name, parts in joined.items()}


def _merged(parts: Sequence[Sample], device: torch.device | str) -> Sample:
    rows, weights = torch.cat([part.rows for part in parts]), torch.cat([part.weights for part in parts])
    each = [part.sensitivities for part in parts if part.sensitivities is not None]
    return Sample(rows.to(device), weights.to(device), torch.cat(each).to(device) if each else None)


def _sample(rows: Tensor, absmax: Tensor, each: int, extreme: int, squares: Tensor | None = None) -> Sample:
    """Of `rows[T, K]`: the `extreme` that exceed `absmax[K]` most, and `each` evenly spaced ones of the others."""
    count = rows.shape[0]
    extreme = min(extreme, count // 4)
    order = (rows.abs() / absmax).amax(1).argsort(descending=True)
    others = order[extreme:].sort().values
    index = torch.linspace(0, len(others) - 1, min(each, len(others))).round().to(torch.int64)
    chosen = torch.cat([order[:extreme], others[index.to(rows.device)]])
    weights = torch.full((len(chosen),), len(others) / len(index), device=rows.device)
    weights[:extreme] = 1.0
    return Sample(rows[chosen], weights, None if squares is None else squares[chosen])


def histograms(
    session: Session,
    batches: Sequence[Any],
    ranges: Mapping[str, tuple[Tensor, tuple[int, ...], tuple[float, float]]],
    progress: Progress,
) -> dict[str, Histogram]:
    """Histograms of smoothed inliers: `ranges` has s [K], outlier columns and extremes by site."""
    found = {name: Histogram(*limits) for name, (_, _, limits) in ranges.items()}

    def visit(name: str, rows: Tensor) -> None:
        if name in found:
            s, columns, _ = ranges[name]
            inner = rows.float() / s.to(rows.device).float()
            inner[:, list(columns)] = 0.0
            found[name].update(inner)

    over(session, batches, "histograms", progress, visit)
    first, *others = gathered(found)
    for other in others:
        for name, histogram in other.items():
            first[name].merge(histogram)
    return first


def hessians(session: Session, batches: Sequence[Any], names: set[str], progress: Progress) -> dict[str, Tensor]:
    """Σ 2·xᵀx [K, K] of the named sites' inputs: O(K²), for second-order rounding only."""
    found: dict[str, Tensor] = {}

    def visit(name: str, rows: Tensor) -> None:
        if name in names and rows.shape[0]:
            found[name] = found[name] + hessian(rows) if name in found else hessian(rows)

    over(session, batches, "second order", progress, visit)
    first, *others = gathered(found)
    for other in others:
        for name, part in other.items():
            first[name] = first[name] + part.to(first[name].device) if name in first else part
    return first


def within_bytes(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, in groups of at most `most` bytes, or of one."""
    groups: list[list[str]] = []
    free = 0
    for name, size in sizes.items():
        if not groups or size > free:
            groups.append([])
            free = most
        groups[-1].append(name)
        free -= size
    return groups


def dist_size() -> int:
    """Processes that calibrate together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(own: Any) -> list[Any]:
    """`own` of every process, in rank order."""
    if dist_size() == 1:
        return [own]
    every: list[Any] = [None] * dist_size()
    dist.all_gather_object(every, own)
    return every
