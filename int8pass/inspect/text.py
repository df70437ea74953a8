"""The terminal form of a report: plain text, aligned columns, no dependency."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from int8pass.inspect.report import Report, SiteRow


def render(report: Report) -> str:
    """Settings, one row per site, then every linear not taken with its reason and source line."""
    counts = report.counts
    lines = [f"recipe    {report.recipe}"]
    lines.append(
        f"graphs    {counts['graphs']}    sites {counts['sites']}    "
        f"linears taken {counts['taken']}, not taken {counts['refused']}"
    )
    if report.sites:
        lines += ["", *_table([_HEADER, *(_cells(site) for site in report.sites)])]
    else:
        lines += ["", "no site: no linear of this model was taken"]
    notes = Counter(site.smoothing for site in report.sites if site.smoothing not in {"", "folded", "multiply"})
    if notes:
        lines += ["", "smoothing not folded:", *(f"  {n} sites: {reason}" for reason, n in notes.items())]
    if report.refused:
        lines += ["", "linears not taken:"]
        for refused in report.refused:
            lines.append(f"  {refused.linear}: {refused.reason}")
            if refused.source:
                lines.append(f"      {_shorten(refused.source)}")
    return "\n".join(lines)


_HEADER = ("site", "producer", "linears", "N×K", "scheme", "columns", "smoothing", "implementation")


def _cells(site: SiteRow) -> tuple[str, ...]:
    names = [name.rsplit(".", 1)[-1] for name in site.linears]
    n, k = site.shape
    columns = str(site.columns) if site.columns else "-"
    smoothing = {"folded": "folded", "multiply": "multiply", "": "-"}.get(site.smoothing, "no")
    return (
        site.name, site.producer, " ".join(names), f"{n}×{k}", site.scheme, columns, smoothing,
        " ".join(site.implementations),
    )  # fmt: skip


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _shorten(source: str) -> str:
    """Paths relative to the working directory or from the package on, as far as that is shorter."""
    path, _, rest = source.partition(":")
    if "site-packages" + os.sep in path:
        path = path.split("site-packages" + os.sep)[1]
    elif path.startswith(os.getcwd() + os.sep):
        path = os.path.relpath(path)
    return f"{path}:{rest}"
