"""Which sites lose most, and a change of the recipe that would mend them."""

from __future__ import annotations

from collections.abc import Sequence

from int8pass.inspect.facts import Facts, SiteRow

UNKNOWN = 1e9
"""`loss` of a site that nothing was measured of."""
ENOUGH = 35.0
"""dB of local SQNR above which nothing needs to be mended: an error of 1.8%."""
WORTH = 3.0
"""dB that a fix must gain to be proposed instead of keeping the site in its dtype."""


def loss(site: SiteRow) -> float:
    """What sites are ranked by, dB, the smaller the worse: the local error, without data the weights'."""
    for value in (site.errors.final, site.errors.weight):
        if value is not None:
            return value
    return UNKNOWN


def worst_sites(sites: Sequence[SiteRow], count: int) -> list[SiteRow]:
    """The sites of most error, worst first; none when nothing was measured."""
    measured = [s for s in sites if loss(s) < UNKNOWN]
    return sorted(measured, key=loss)[:count]


def fix_for(site: SiteRow) -> tuple[str, float] | None:
    """The fields of the first measured fix that gains `WORTH`, and the SQNR it gives; None when none does."""
    now = loss(site)
    return next(((code, sqnr) for _, sqnr, code in site.fixes if sqnr >= now + WORTH), None)


def override(report: Facts, count: int = 5) -> str:
    """Python that gives the worst sites settings of their own; "" when none was measured below `ENOUGH`."""
    sites = [s for s in worst_sites(report.sites, count) if s.errors.final is not None and s.errors.final < ENOUGH]
    if not sites:
        return ""
    lines = ["from dataclasses import replace", "recipe = replace(recipe, sites={**recipe.sites,"]
    for site in sites:
        settings, found = f'recipe.at("{site.name}")', fix_for(site)
        if found is None:
            change, note = "keep=True", "stays in its dtype"
        else:
            change, note = f"scheme=replace({settings}.scheme, {found[0]})", f"{found[1]:.1f} dB"
        lines.append(f'    "{site.name}": replace({settings}, {change}),  # {site.errors.final:.1f} dB → {note}')
    return "\n".join([*lines, "})"])
