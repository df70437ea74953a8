"""Variants of a recipe: what it is made of, what could be changed, and other schemes on the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from int8pass.capture import Program
from int8pass.folds import group_maximum
from int8pass.graph.rewrite import LINEAR, RewriteLog
from int8pass.inspect.replay import Part, Replay, linear_names, results
from int8pass.pipeline import Facts, Watch, to_portable
from int8pass.recipe import CALIBRATED, PRESETS, Recipe, Scheme, SiteSettings

FINAL = "final"
NAIVE = "naive"
SMOOTHED = "smoothed"
FIXES = ("64 columns", "float activations")
"""Variants that an override may use: what they would make of a site."""

Change = Callable[[Scheme, SiteSettings], dict[str, Any]]
"""A site's scheme and settings → the fields of the scheme to change."""


def changed(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with the scheme of every site changed."""
    sites = {}
    for name, settings in recipe.sites.items():
        scheme = settings.scheme or recipe.scheme
        sites[name] = dataclasses.replace(settings, scheme=dataclasses.replace(scheme, **change(scheme, settings)))
    scheme = dataclasses.replace(recipe.scheme, **change(recipe.scheme, SiteSettings()))
    return dataclasses.replace(recipe, scheme=scheme, sites=sites)


def _naive(scheme: Scheme, settings: SiteSettings) -> dict[str, Any]:
    """Int8 alone. A calibrated range is one of the smoothed input: the naive one is that of the call."""
    return {
        "smoothing": "none", "outliers": "none", "rounding": "nearest", "one_row": "same", **_own_range(scheme)
    }  # fmt: skip


def _smoothed(scheme: Scheme, settings: SiteSettings) -> dict[str, Any]:
    """Without outlier columns. Ranges and rounded codes that were found beside such columns do not hold for it."""
    split = scheme.outliers == "static" and bool(settings.columns)
    beside = {"rounding": "nearest", **_own_range(scheme)} if split else {}
    return {"outliers": "none", "one_row": "same", **beside}


def _own_range(scheme: Scheme) -> dict[str, Any]:
    return {"activations": "per_tensor", "clipping": "minmax"} if scheme.ranged else {}


def _with_columns(scheme: Scheme, settings: SiteSettings) -> dict[str, Any]:
    """64 columns a call, with the other changes without which there can be none."""
    fields: dict[str, Any] = {}
    if scheme.activations == "static":
        fields["activations"] = "per_token"
    if scheme.weights == "group":
        fields["weights"] = "per_channel"
    if scheme.rounding == "gptq":  # its codes are zero in the columns of calibration, and made for its scales
        fields["rounding"] = "nearest"
    return {**fields, "outliers": "largest", "capacity": 64}


def _float_activations(scheme: Scheme, settings: SiteSettings) -> dict[str, Any]:
    return {"activations": "none"}


_CHANGES: Mapping[str, Change] = dict(zip(FIXES, (_with_columns, _float_activations)))


def fix_code(name: str, scheme: Scheme, settings: SiteSettings) -> str:
    """The fields of the scheme that make a fix, as Python's keyword arguments."""
    fields = _CHANGES[name](scheme, settings)
    return ", ".join(f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in fields.items())


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe, what it is made of, and what could be changed, by name."""

    def many_rows(change: Change) -> Change:
        return lambda scheme, settings: {**change(scheme, settings), "one_row": "same"}

    return {
        FINAL: recipe,
        NAIVE: changed(recipe, _naive),
        SMOOTHED: changed(recipe, _smoothed),
        FIXES[0]: changed(recipe, many_rows(_with_columns)),
        FIXES[1]: changed(recipe, _float_activations),
    }


def comparable(recipe: Recipe, sites: Iterable[str]) -> dict[str, Recipe]:
    """The recipe in force, the presets that need no calibration, and those that its own calibration is enough for."""
    found, seen = {"this recipe": recipe}, {key_of(recipe)}
    names = list(sites)
    for name, scheme in PRESETS.items():
        title = f"{name}, with these vectors" if name in CALIBRATED else name
        if name in CALIBRATED and not _enough_for(scheme, recipe, names):
            continue
        kept = {n: SiteSettings(keep=True) for n, s in recipe.sites.items() if s.keep}
        found_here = {n: dataclasses.replace(s, scheme=None) for n, s in recipe.sites.items()}
        other = Recipe(scheme, recipe.quantize_head, found_here if name in CALIBRATED else kept)
        if key_of(other) not in seen:
            seen.add(key_of(other))
            found[title] = other
    return found


def _enough_for(scheme: Scheme, recipe: Recipe, names: list[str]) -> bool:
    """True when the recipe holds for every site what a calibrated preset needs."""
    settings = [dataclasses.replace(recipe.at(name), scheme=scheme) for name in names]
    if not settings or any(s.lacks() for s in settings):
        return False
    splits = any(s.columns for s in settings)
    # A range beside outlier columns is too narrow without them.
    return splits if scheme.outliers == "static" else not (splits and scheme.ranged)


@dataclass
class Variant:
    """One recipe's portable program of a graph."""

    program: Program
    facts: Facts
    ends: dict[str, fx.Node] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    """By site name."""

    @staticmethod
    def of(normalized: Program, log: RewriteLog, recipe: Recipe, watch: Watch = lambda stage, program: None) -> Variant:
        """Quantize a copy of a normalized program."""
        program = normalized.copy()
        made = Variant(program, to_portable(program, recipe, watch, normalized=log))
        made.ends = results(program)
        for site in made.facts.matches.sites:
            made.parts[site.name] = Part(program, linear_names(site), made.ends)
        return made

    def multiplies(self, site: str) -> bool:
        """True when the site multiplies its input by 1/s itself: nothing before it was changed."""
        return site in self.facts.smoothing.reasons

    def divisors(self, replay: Replay) -> dict[str, Tensor]:
        """Linear → what its rows were divided by [N], fp32, because a later site's smoothing is folded into them."""
        found, smoothing = {}, self.facts.smoothing
        for site, vector in smoothing.vectors.items():
            fold = smoothing.folds[site]
            if fold.kind == "linear" and fold.channels is not None:
                s = group_maximum(replay.value(vector), fold.channels.channels, fold.channels.width)
                found[fold.channels.producer.meta[LINEAR]] = s
        return found


def key_of(recipe: Recipe) -> tuple[object, ...]:
    """Hashable; equal for recipes that give equal graphs."""
    sites = {name: _graph_settings(recipe.at(name)) for name in recipe.sites}
    return _graph_fields(recipe.scheme), recipe.quantize_head, frozenset(sites.items())


def _graph_settings(settings: SiteSettings) -> SiteSettings:
    assert settings.scheme is not None
    return dataclasses.replace(settings, scheme=_graph_fields(settings.scheme), alpha=None, error=None)


def _graph_fields(scheme: Scheme) -> Scheme:
    """Without what calibration alone reads."""
    dynamic = scheme.outliers in {"largest", "threshold"}
    return dataclasses.replace(
        scheme, alpha=None, statistic="rms", clipping="minmax", capacity=scheme.capacity if dynamic else None
    )


__all__ = [
    "FINAL", "FIXES", "NAIVE", "SMOOTHED", "Variant", "changed", "comparable", "fix_code", "key_of", "variants",
]  # fmt: skip
