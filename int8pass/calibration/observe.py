"""Passes over calibration data: statistics, a small sample, histograms and Hessians of every site's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from int8pass.calibration.clipping import Histogram
from int8pass.calibration.rounding import hessian
from int8pass.calibration.session import Session, kept_rows
from int8pass.calibration.statistics import ChannelStatistics
from int8pass.errors import CalibrationError

SAMPLE = 256
"""Tokens of a site that choices are tried on."""

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


def samples(session: Session, batches: Sequence[Any], progress: Progress) -> dict[str, Tensor]:
    """At most `SAMPLE` evenly spaced tokens `[T, K]` of every site, from all batches alike."""
    each = max(1, SAMPLE // len(batches))
    found: dict[str, list[Tensor]] = {}

    def visit(name: str, rows: Tensor) -> None:
        if rows.shape[0]:
            index = torch.linspace(0, rows.shape[0] - 1, min(each, rows.shape[0])).round().to(torch.int64)
            found.setdefault(name, []).append(rows[index.to(rows.device)].float())

    over(session, batches, "sample", progress, visit)
    joined: dict[str, list[Tensor]] = {}
    for other in gathered({name: torch.cat(parts).cpu() for name, parts in found.items()}):
        for name, part in other.items():
            joined.setdefault(name, []).append(part)
    devices = {name: parts[0].device for name, parts in found.items()}
    return {name: torch.cat(parts).to(devices.get(name, "cpu")) for name, parts in joined.items()}


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
