"""What differs between two reports: totals, sites and linears, as text."""

from __future__ import annotations

from collections.abc import Callable

from int8pass.inspect.facts import Facts, SiteRow
from int8pass.inspect.text_parts import aligned, decibels

_FIELDS: tuple[tuple[str, Callable[[SiteRow], str]], ...] = (
    ("scheme", lambda s: s.scheme),
    ("smoothing", lambda s: s.smoothing or "-"),
    ("columns", lambda s: str(s.columns)),
    ("W dB", lambda s: decibels(s.errors.weight)),
    ("local dB", lambda s: decibels(s.errors.final)),
    ("cumulative dB", lambda s: decibels(s.errors.cumulative)),
    ("MB", lambda s: f"{s.bytes[1] / 1e6:.3g}"),
    ("implementation", lambda s: " ".join(s.implementations) or "-"),
)
"""Compared as they are shown: what rounds to the same is the same. Times are noise and not compared."""


def diff(a: Facts, b: Facts, names: tuple[str, str] = ("A", "B")) -> str:
    """Lines of what differs; says so when nothing does."""
    lines = [f"{names[0]}: {a.recipe}", f"{names[1]}: {b.recipe}", ""]
    rows = [("", *names)]
    for title, value in _TOTALS:
        if value(a) != value(b):
            rows.append((title, value(a), value(b)))
    if len(rows) > 1:
        lines += [*aligned(rows), ""]
    old, new = {s.name: s for s in a.sites}, {s.name: s for s in b.sites}
    changed = [("site", "", *names)]
    for name in old.keys() & new.keys():
        changed += [(name, f, v(old[name]), v(new[name])) for f, v in _FIELDS if v(old[name]) != v(new[name])]
    if len(changed) > 1:
        order = {name: i for i, name in enumerate(old)}
        lines += [*aligned([changed[0], *sorted(changed[1:], key=lambda row: order[row[0]])]), ""]
    lines += [f"only in {names[0]}: site {name}" for name in old if name not in new]
    lines += [f"only in {names[1]}: site {name}" for name in new if name not in old]
    lines += _refusals(a, b, names)
    while lines[-1] == "":
        lines.pop()
    return "\n".join(lines) if len(lines) > 2 else "\n".join([*lines, "", "no difference"])


def _refusals(a: Facts, b: Facts, names: tuple[str, str]) -> list[str]:
    old, new = ({r.linear: r.reason for r in facts.refused} for facts in (a, b))
    lines = []
    for one, other, name in ((old, new, names[0]), (new, old, names[1])):
        lines += [f"not taken in {name}: {linear}: {reason}" for linear, reason in one.items() if linear not in other]
    return lines


_TOTALS: tuple[tuple[str, Callable[[Facts], str]], ...] = (
    ("sites", lambda f: str(len(f.sites))),
    ("linears taken", lambda f: str(sum(len(s.linears) for s in f.sites))),
    ("not taken", lambda f: str(len(f.refused))),
    ("MB of weights", lambda f: f"{sum(s.bytes[1] for s in f.sites) / 1e6:.2f}"),
    ("output dB", lambda f: decibels(f.output_sqnr)),
)

__all__ = ["diff"]
