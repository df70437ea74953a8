"""The terminal form of a report: plain text with aligned columns, or the same in colour where rich draws it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from int8pass.inspect.facts import Facts, SiteRow
from int8pass.inspect.text_parts import aligned, decibels, tail
from int8pass.inspect.worst import ENOUGH, worst_sites

GOOD, FAIR = ENOUGH, 25.0
"""dB: above GOOD is green, above FAIR yellow, else red."""


@dataclass(frozen=True)
class Column:
    """One column of the table of sites."""

    title: str
    cells: tuple[str, ...]
    keep: int
    """The narrower the terminal, the larger this must be for the column to stay."""
    levels: tuple[float | None, ...] = ()
    """dB that colour the cells."""

    @property
    def width(self) -> int:
        return max(map(len, (self.title, *self.cells)))


def render(report: Facts, top_k: int | None = None) -> str:
    """Settings, one row per site, every linear not taken, the worst sites and an override that would fix them."""
    lines = _head(report)
    columns = columns_of(_shown(report.sites, top_k))
    if report.sites:
        rows = zip(*((c.title, *c.cells) for c in columns))
        lines += ["", *aligned([tuple(row) for row in rows])]
        lines += _left_out(report, top_k)
    else:
        lines += ["", "no site: no linear of this model was taken"]
    for title, items in tail(report):
        lines += ["", title, *items]
    return "\n".join(lines)


def coloured(report: Facts, top_k: int | None = None, width: int | None = None) -> str:
    """The same for a terminal: columns that have no room are left out and named."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = width or shutil.get_terminal_size().columns
    console = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False)
    for line in _head(report):
        key, _, value = line.partition("  ")
        console.print(Text.assemble((key, "bold"), "  " + value), soft_wrap=True)
    columns = columns_of(_shown(report.sites, top_k))
    fitting = _fitting(columns, width)
    if report.sites:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for column in fitting:
            table.add_column(column.title, no_wrap=True)
        for i in range(len(columns[0].cells)):
            table.add_row(*(Text(c.cells[i], _colour(c.levels[i] if c.levels else None)) for c in fitting))
        console.print("", table)
        if len(fitting) < len(columns):
            hidden = ", ".join(c.title for c in columns if c not in fitting)
            console.print(Text(f"no room for: {hidden}", "dim"))
        for line in _left_out(report, top_k):
            console.print(line)
    else:
        console.print("\nno site: no linear of this model was taken")
    for title, items in tail(report):
        console.print(Text(f"\n{title}", "bold"))
        for item in items:
            console.print(Text(item), soft_wrap=True)
    shown = console.file
    assert isinstance(shown, io.StringIO)
    return shown.getvalue().rstrip("\n")


def columns_of(sites: Sequence[SiteRow]) -> list[Column]:
    """The columns of these sites; those in which nothing was measured are left out."""
    found = [
        Column("site", tuple(s.name for s in sites), 99),
        Column("pattern", tuple(s.producer for s in sites), 6),
        Column("linears", tuple(" ".join(_short_names(s.linears)) for s in sites), 4),
        Column("K×N", tuple(f"{s.shape[1]}×{s.shape[0]}" for s in sites), 5),
        Column("scheme", tuple(s.scheme for s in sites), 3),
        Column("smoothing", tuple(_smoothing(s) for s in sites), 5),
        Column("columns", tuple(str(s.columns) if s.columns else "-" for s in sites), 5),
        Column("absmax", tuple(_pair(s.absmax) for s in sites), 6),
        Column("max/median", tuple(_pair(s.spread) for s in sites), 7),
        _decibels("W dB", [s.errors.weight for s in sites], 7),
        _path("local dB", sites),
        _decibels("cumulative dB", [s.errors.cumulative for s in sites], 7),
        _decibels("alone dB", [s.errors.alone for s in sites], 7),
        Column("MB", tuple(f"{s.bytes[0] / 1e6:.3g} → {s.bytes[1] / 1e6:.3g}" for s in sites), 2),
        Column("ms", tuple(_times(s) for s in sites), 4),
        Column("implementation", tuple(" ".join(s.implementations) for s in sites), 1),
    ]
    return [c for c in found if any(cell not in ("", "-") for cell in c.cells)]


def _decibels(title: str, values: list[float | None], keep: int) -> Column:
    return Column(title, tuple(map(decibels, values)), keep, tuple(values))


def _path(title: str, sites: Sequence[SiteRow]) -> Column:
    cells = []
    for site in sites:
        errors = site.errors
        if errors.final is None:
            cells.append("-")
            continue
        cells.append(" → ".join(map(decibels, (errors.naive, errors.smoothed, errors.final))))
    return Column(title, tuple(cells), 8, tuple(s.errors.final for s in sites))


def _short_names(linears: Sequence[str]) -> list[str]:
    return [name.rsplit(".", 1)[-1] for name in linears]


def _smoothing(site: SiteRow) -> str:
    if site.smoothing not in ("folded", "multiply"):
        return "no" if site.smoothing else "-"
    return site.smoothing if site.alpha is None else f"{site.smoothing} α={site.alpha:g}"


def _pair(values: tuple[float, float] | None) -> str:
    return "-" if values is None else f"{values[0]:.3g} → {values[1]:.3g}"


def _times(site: SiteRow) -> str:
    return "-" if site.seconds is None else f"{site.seconds[0] * 1e3:.2f} → {site.seconds[1] * 1e3:.2f}"


def _head(report: Facts) -> list[str]:
    taken = sum(len(site.linears) for site in report.sites)
    lines = [
        f"recipe    {report.recipe}",
        f"graphs    {report.graphs}    sites {len(report.sites)}    "
        f"linears taken {taken}, not taken {len(report.refused)}",
    ]
    before, after = sum(s.bytes[0] for s in report.sites), sum(s.bytes[1] for s in report.sites)
    if before:
        lines.append(f"weights   {before / 1e6:.1f} MB → {after / 1e6:.1f} MB ({after / before:.3f})")
    if report.output_sqnr is not None:
        tokens = report.settings.get("tokens measured on", "?")
        lines.append(f"output    {report.output_sqnr:.1f} dB against the original, on {tokens} tokens")
    scheme = [f"{k.removeprefix('scheme.')}={v}" for k, v in report.settings.items() if k.startswith("scheme.")]
    if scheme:
        lines.insert(1, f"scheme    {' '.join(scheme)}")
    return lines


def _shown(sites: Sequence[SiteRow], top_k: int | None) -> Sequence[SiteRow]:
    """All sites in the model's order; with `top_k`, the worst ones, worst first."""
    return sites if top_k is None else worst_sites(sites, top_k)


def _left_out(report: Facts, top_k: int | None) -> list[str]:
    hidden = len(report.sites) - (len(report.sites) if top_k is None else min(top_k, len(report.sites)))
    return [f"… and {hidden} sites with less error"] if hidden else []


def _fitting(columns: list[Column], width: int) -> list[Column]:
    """The columns that fit, the least wanted dropped first."""
    fitting = list(columns)
    while len(fitting) > 2 and sum(c.width + 2 for c in fitting) > width + 2:
        fitting.remove(min(fitting, key=lambda c: c.keep))
    return fitting


def _colour(level: float | None) -> str:
    if level is None:
        return ""
    return "green" if level >= GOOD else "yellow" if level >= FAIR else "red"


__all__ = ["Column", "coloured", "columns_of", "render"]
