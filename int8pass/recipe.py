"""Settings: one frozen, JSON-serializable tree. Strings and option dictionaries stop here.

Recipe
├── scheme: Scheme               how every site is quantized unless it says otherwise
├── quantize_head                the output head too (default: it keeps its dtype)
├── sites: {name: SiteSettings}  per-site overrides and calibration results
└── versions                     what made it
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

from int8pass.errors import OptionError, RecipeError

FORMAT = 1  # of the JSON file; raised when a reader of this version could misread a file


@dataclass(frozen=True)
class Scheme:
    """How the input and the weights of a site become int8. Weights are always symmetric, one scale per output channel.

    The defaults are the data-free default; `docs/data-free-default.md` has the measurements behind them.
    """

    activations: Literal["per_token", "none"] = "per_token"
    """Dynamic int8, one scale per token; or "none": weight-only int8."""
    symmetric: bool = False
    """Symmetric codes, or (default) affine ones with a zero point, corrected exactly in int32."""
    outliers: Literal["none", "largest", "threshold", "static"] = "largest"
    """Columns that stay in float: none; the largest of every call; those above `threshold` in every call (LLM.int8(),
    arXiv 2208.07339); or the columns that calibration chose (with their weights in the original dtype)."""
    threshold: float = 6.0
    """Absolute activation above which a column is an outlier, for `outliers="threshold"`."""
    capacity: int | None = None
    """Columns reserved per call. None: K/32, rounded to a multiple of 8, within 16 and 64."""
    smoothing: Literal["none", "outliers", "calibrated"] = "outliers"
    """Move difficulty from activations to weights (`int8pass.smooth`): not at all; the extreme channels of a norm's
    gamma, found without data; or by the exponents that calibration found for every channel of every site."""
    smoothing_threshold: float = 8.0
    """Channels whose gamma-to-weight ratio exceeds this many medians are smoothed."""
    one_row: Literal["same", "weight_only"] = "weight_only"
    """A graph for a single token (decode; on GPUs for up to 16) is bound by reading weights: float activations cost
    nothing there."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Scheme).items():
            _check_value(name, getattr(self, name), kind)
        if self.threshold <= 0 or self.smoothing_threshold <= 0:
            raise OptionError("threshold and smoothing_threshold must be positive")
        if self.capacity is not None and self.capacity < 1:
            raise OptionError(f"capacity must be at least 1, got {self.capacity}")

    def columns_for(self, width: int) -> int:
        """Columns reserved per call for an input of `width` channels."""
        if self.capacity is not None:
            return min(self.capacity, width)
        return min(width, max(16, min(64, round(width / 32 / 8) * 8)))


def _check_value(name: str, value: Any, kind: Any) -> None:
    choices = get_args(kind)
    if choices and all(isinstance(c, str) for c in choices):
        if value not in choices:
            raise OptionError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        return
    allowed: tuple[type, ...] = tuple(c for c in choices if isinstance(c, type)) or (kind,)
    if float in allowed:
        allowed = (*allowed, int)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise OptionError(f"{name} must be {' or '.join(a.__name__ for a in allowed)}, got {value!r}")


@dataclass(frozen=True)
class SiteSettings:
    """What one site does differently, and what calibration found for it."""

    scheme: Scheme | None = None
    keep: bool = False
    """Leave the site's linears in their dtype."""
    columns: tuple[int, ...] = ()
    """Outlier columns chosen by calibration, for `outliers="static"`."""
    exponents: tuple[float, ...] = ()
    """log2 of the smoothing vector, one per channel, for `smoothing="calibrated"`, in steps of 1/8."""


_DEFAULT = Scheme()
_PLAIN = Scheme(symmetric=True, outliers="none", smoothing="none", one_row="same")

PRESETS: Mapping[str, Scheme] = MappingProxyType(
    {
        "default": _DEFAULT,
        "w8a8": _PLAIN,
        "w8a8-asymmetric": dataclasses.replace(_PLAIN, symmetric=False),
        "w8a16": dataclasses.replace(_PLAIN, activations="none"),
        "llm.int8": dataclasses.replace(_PLAIN, outliers="threshold", capacity=64),
        "outlier-columns": Scheme(outliers="static", smoothing="calibrated", capacity=64),
    }
)


def presets() -> tuple[str, ...]:
    """Names of the presets."""
    return tuple(PRESETS)


@dataclass(frozen=True)
class Recipe:
    """Everything the pass needs to know beside the model. Immutable; equal recipes give equal graphs."""

    scheme: Scheme = _DEFAULT
    quantize_head: bool = False
    sites: Mapping[str, SiteSettings] = field(default_factory=lambda: MappingProxyType({}))
    versions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), compare=False)

    @staticmethod
    def preset(name: str) -> Recipe:
        """The recipe of a preset.

        Raises:
            OptionError: there is no such preset; the message lists them.
        """
        if name not in PRESETS:
            raise OptionError(f"unknown preset {name!r}; presets are {', '.join(PRESETS)}")
        return Recipe(PRESETS[name])

    def at(self, site: str) -> SiteSettings:
        """Settings of a site, with the scheme filled in."""
        settings = self.sites.get(site, SiteSettings())
        return settings if settings.scheme is not None else dataclasses.replace(settings, scheme=self.scheme)

    def to_json(self) -> str:
        """Readable JSON; defaults are written too, so that a file keeps its meaning when defaults change."""
        content = {
            "int8pass_recipe": FORMAT,
            "versions": dict(self.versions),
            "quantize_head": self.quantize_head,
            "scheme": dataclasses.asdict(self.scheme),
            "sites": {name: dataclasses.asdict(settings) for name, settings in self.sites.items()},
        }
        return json.dumps(content, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path`; a failure leaves no half-written file."""
        target = Path(path)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, suffix=".part") as file:
            file.write(self.to_json() + "\n")
        os.replace(file.name, target)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: the file is missing, truncated, no recipe, or of a newer format.
        """
        try:
            content = json.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read recipe {path}: {error}") from error
        except json.JSONDecodeError as error:
            raise RecipeError(f"{path} is not valid JSON (truncated?): {error}") from error
        try:
            return Recipe.from_dict(content)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    @staticmethod
    def from_dict(content: Any) -> Recipe:
        """The recipe that `to_json` wrote."""
        if not isinstance(content, dict) or "int8pass_recipe" not in content:
            raise RecipeError("not an int8pass recipe (no 'int8pass_recipe' key)")
        if content["int8pass_recipe"] != FORMAT:
            raise RecipeError(f"format {content['int8pass_recipe']!r}; this version of int8pass reads {FORMAT}")
        try:
            sites = {name: _site_from_dict(settings) for name, settings in content["sites"].items()}
            return Recipe(
                Scheme(**content["scheme"]),
                bool(content["quantize_head"]),
                MappingProxyType(sites),
                MappingProxyType(dict(content["versions"])),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RecipeError(f"malformed recipe: {error}") from error


def _site_from_dict(content: Mapping[str, Any]) -> SiteSettings:
    scheme = Scheme(**content["scheme"]) if content["scheme"] is not None else None
    columns = tuple(int(c) for c in content["columns"])
    return SiteSettings(scheme, bool(content["keep"]), columns, tuple(float(e) for e in content["exponents"]))


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options={...}, mode=...)` said, checked."""

    recipe: Recipe = field(default_factory=Recipe)
    free_weights: bool = False
    """Release the original weights after the first run."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Inductor configuration for this compilation only."""

    @staticmethod
    def parse(options: Mapping[str, Any] | None, mode: str | None) -> Options:
        """Turn option dictionaries into settings.

        Raises:
            OptionError: an unknown option, preset, mode or value; the message lists the valid ones.
        """
        given = dict(options or {})
        recipe = _recipe_option(given.pop("recipe", "default"))
        free_weights = given.pop("free_weights", False)
        mode = given.pop("mode", mode)  # torch.compile takes its own mode only without options
        quantize_head = given.pop("quantize_head", recipe.quantize_head)
        for name, value in (("free_weights", free_weights), ("quantize_head", quantize_head)):
            if not isinstance(value, bool):
                raise OptionError(f"{name} must be True or False, got {value!r}")
        inductor = {**_mode_settings(mode), **_inductor_option(given.pop("inductor", {}))}
        scheme_fields = {f.name for f in dataclasses.fields(Scheme)}
        unknown = sorted(set(given) - scheme_fields)
        if unknown:
            valid = ["recipe", "free_weights", "quantize_head", "mode", "inductor", *sorted(scheme_fields)]
            raise OptionError(f"unknown option {', '.join(map(repr, unknown))}; options are {', '.join(valid)}")
        scheme = dataclasses.replace(recipe.scheme, **given)
        recipe = dataclasses.replace(recipe, scheme=scheme, quantize_head=quantize_head)
        return Options(recipe, free_weights, inductor)


def _recipe_option(value: Any) -> Recipe:
    if isinstance(value, Recipe):
        return value
    if isinstance(value, str) and value in PRESETS:
        return Recipe.preset(value)
    if isinstance(value, (str, os.PathLike)):
        if str(value).endswith(".json"):
            return Recipe.load(value)
        return Recipe.preset(str(value))
    raise OptionError(f"recipe must be a Recipe, a preset ({', '.join(PRESETS)}) or the path of a .json, got {value!r}")


def _mode_settings(mode: str | None) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    if mode is None or mode == "default":
        return {}
    modes = list_mode_options()
    if mode not in modes:
        raise OptionError(f"unknown mode {mode!r}; modes are {', '.join(['default', *sorted(modes)])}")
    return dict(modes[mode])


def _inductor_option(value: Any) -> dict[str, Any]:
    from torch._inductor import list_options

    if not isinstance(value, Mapping):
        raise OptionError(f"inductor must be a dictionary of Inductor settings, got {value!r}")
    known: Iterable[str] = list_options()
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise OptionError(f"Inductor has no setting {', '.join(map(repr, unknown))} (torch._inductor.list_options())")
    return dict(value)
