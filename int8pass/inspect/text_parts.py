"""What the text says after the table of sites, part by part, and how its numbers and lines are written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from int8pass.inspect.facts import Facts, Ran, RefusedLinear, SiteRow
from int8pass.inspect.worst import override, worst_sites

MOST_OPS = 8
MOST_LETTERS = 48
"""Ops listed by the time they took; the page has all of them."""


def tail(report: Facts) -> list[tuple[str, list[str]]]:
    """What follows the table: title and lines of every part that has something to say."""
    parts = []
    notes = Counter(site.smoothing for site in report.sites if site.smoothing not in {"", "folded", "multiply"})
    if notes:
        parts.append(("smoothing not folded:", [f"  {n} sites: {reason}" for reason, n in notes.items()]))
    if report.breaks:
        parts.append(("graph breaks:", [f"  {shorten(reason)}" for reason in report.breaks]))
    if report.refused:
        parts.append(("linears not taken:", [line for refused in report.refused for line in _refused(refused)]))
    worst = worst_sites(report.sites, 5)
    if worst:
        parts.append(("worst sites:", aligned([("", *_worst(site)) for site in worst])))
    fix = override(report)
    if fix:
        parts.append(("an override for them, to paste:", [f"  {line}".rstrip() for line in fix.splitlines()]))
    if report.schemes:
        parts.append(("schemes on this model:", _schemes(report)))
    if report.runtime:
        parts.append(("what ran:", _ran(report)))
    return parts


def _worst(site: SiteRow) -> tuple[str, ...]:
    errors = site.errors
    shown = (("local", errors.final), ("cumulative", errors.cumulative), ("alone", errors.alone), ("W", errors.weight))
    return (site.name, *(f"{name} {decibels(value)} dB" for name, value in shown if value is not None))


def _schemes(report: Facts) -> list[str]:
    original = float(report.settings.get("seconds, original", "nan"))
    rows = [("", "scheme", "output dB", "ms, node by node", "of original", "MB")]
    for point in report.schemes:
        ratio = f"{point.seconds / original:.2f}"
        cells = (point.name, f"{point.sqnr:.1f}", f"{point.seconds * 1e3:.1f}", ratio, f"{point.bytes / 1e6:.1f}")
        rows.append(("", *cells))
    return aligned(rows)


def _ran(report: Facts) -> list[str]:
    """Ops by implementation, those of most time first."""
    groups: dict[tuple[str, str], list[Ran]] = {}
    for row in report.runtime:
        groups.setdefault((row.op, row.implementation), []).append(row)
    spent = {key: sum(row.seconds for row in found) for key, found in groups.items()}
    order = sorted(groups, key=lambda key: -spent[key])
    rows = [("", "op", "implementation", "calls", "ms", "MB")]
    for key in order[:MOST_OPS]:
        calls, size = sum(r.calls for r in groups[key]), sum(r.bytes for r in groups[key])
        rows.append(("", _clipped(key[0]), key[1], str(calls), f"{spent[key] * 1e3:.2f}", f"{size / 1e6:.3g}"))
    rest = order[MOST_OPS:]
    more = [f"  … and {len(rest)} ops that took {sum(spent[key] for key in rest) * 1e3:.2f} ms"] if rest else []
    return [*aligned(rows), *more, f"  ({report.runtime_note})"]


def _clipped(op: str) -> str:
    """Inductor's names list everything it fused: their beginning and their number."""
    return op if len(op) <= MOST_LETTERS else f"{op[: MOST_LETTERS - 9]}…{op[-8:]}"


def _refused(refused: RefusedLinear) -> list[str]:
    lines = [f"  {refused.linear}: {refused.reason}"]
    return [*lines, f"      {shorten(refused.source)}"] if refused.source else lines


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, every column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def decibels(value: float | None) -> str:
    """`34.5`, "-" when not measured."""
    return "-" if value is None else f"{value:.1f}"


def shorten(source: str) -> str:
    """Paths relative to the working directory or from the package on, as far as that is shorter."""
    folder = os.getcwd() + os.sep
    marker = "site-packages" + os.sep
    if marker in source:
        head, _, tail = source.partition(marker)
        return head[: head.rfind("(") + 1] + tail
    return source.replace(folder, "")


__all__ = ["aligned", "decibels", "shorten", "tail"]
