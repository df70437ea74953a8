"""Settings: one frozen, JSON-serializable tree. Strings and option dictionaries stop here.

Recipe
├── scheme: Scheme               how every site is quantized unless it says otherwise
├── quantize_head                the output head too (default: it keeps its dtype)
├── sites: {name: SiteSettings}  per-site overrides and calibration results
└── versions                     what made it
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

from torch import Tensor

from int8pass.errors import OptionError


@dataclass(frozen=True)
class Scheme:
    """How the input and the weights of a site become int8. Weights are always symmetric.

    The defaults are the data-free default; `docs/data-free-default.md` has the measurements behind them. What is
    marked (c) is read by `int8pass.calibrate` alone, which writes what it found into the sites.
    """

    activations: Literal["per_token", "per_tensor", "static", "none"] = "per_token"
    """Dynamic int8 with one scale per token, or one per tensor; static int8 with a calibrated range per tensor; or
    "none": weight-only int8."""
    symmetric: bool = False
    """Symmetric codes, or (default) affine ones with a zero point, corrected exactly in int32."""
    weights: Literal["per_channel", "per_tensor", "group"] = "per_channel"
    """One scale per output channel, one in all, or one per `group_size` adjacent columns of each output channel, whose
    products accumulate in int32 group by group (ZeroQuant, arXiv 2206.01861)."""
    group_size: int = 128
    """32 to 256, for `weights="group"`."""
    outliers: Literal["none", "largest", "threshold", "static"] = "largest"
    """Columns that stay in float: none; the largest of every call; those above `threshold` in every call (LLM.int8(),
    arXiv 2208.07339); or the columns that calibration chose (with their weights in the original dtype). On a GPU,
    "largest" and "threshold" keep blocks of outliers in codes of 16 bits, row by row (`int8pass.hilo`)."""
    threshold: float = 6.0
    """Absolute activation above which a column is an outlier, for `outliers="threshold"`."""
    capacity: int | None = None
    """Columns reserved per call, where columns are found per call (blocks need none). None: K/32, rounded to a multiple
    of 8, within 16 and 64."""
    smoothing: Literal["none", "outliers", "calibrated"] = "outliers"
    """Move difficulty from activations to weights (`int8pass.smooth`): not at all; the extreme channels of a norm's
    gamma, found without data; or by the exponents that calibration found for every channel of every site."""
    smoothing_threshold: float = 8.0
    """Channels whose gamma-to-weight ratio exceeds this many medians are smoothed, for `smoothing="outliers"`."""
    alpha: float | None = 0.5
    """(c) α of s = X^α / W^(1-α) (SmoothQuant, arXiv 2211.10438, equation 4). None: searched per site, by the output
    error on batches that did not set the ranges; where one range serves a whole tensor, vectors that touch its outlier
    channels alone are tried too."""
    statistic: Literal["absmax", "percentile", "rms", "mean"] = "rms"
    """(c) What X is: the absmax of a channel over tokens, as published; its 99.9th percentile; its root mean square,
    which one massive token cannot move far; or its mean magnitude, with that of W (AWQ, arXiv 2306.00978)."""
    clipping: Literal["minmax", "moving_average", "percentile", "mse", "entropy", "output"] = "minmax"
    """(c) How a static range is found: extremes; their moving average over batches; the 99.99th percentile of |x|; the
    least squared error; the least KL divergence; or the fraction of the extremes that leaves least error in the site's
    output. With "per_tensor" activations it is a cap: the range is that of the call, but never wider, so that a rare
    token does not take all others' resolution. "minmax" sets none there."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """(c) Weights to the nearest code, or column by column with the error fed forward (GPTQ, arXiv 2210.17323)."""
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
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha must be within 0 and 1 (or None: searched), got {self.alpha}")
        if not 32 <= self.group_size <= 256:
            raise OptionError(f"group_size must be within 32 and 256, got {self.group_size}")
        dynamic = self.outliers in {"largest", "threshold"} and self.activations != "none"
        if dynamic and (self.weights == "group" or self.activations == "static"):
            what = "group-wise weights" if self.weights == "group" else "static activations"
            raise OptionError(f"{what} take outliers 'none' or 'static' (calibrated), not {self.outliers!r}")

    @property
    def ranged(self) -> bool:
        """True when calibration finds a range for the input: the static one, or what caps that of a call."""
        return self.activations == "static" or (self.activations == "per_tensor" and self.clipping != "minmax")

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
    limits: tuple[float, float] | None = None
    """(low, high) of the input, smoothed and without its outlier columns: the range for `activations="static"`, the
    widest that a call may have for "per_tensor"."""
    alpha: float | None = None
    """The α that calibration used or chose; for the reader of a file."""
    error: float | None = None
    """Relative error of the site's output on calibration data held out for it; for the reader of a file."""
    tokens: int = 0
    """Tokens that calibration saw here; 0: none, or not calibrated."""

    @property
    def calibrated(self) -> bool:
        """True when calibration saw this site."""
        return bool(self.columns or self.exponents or self.limits or self.tokens)

    def lacks(self) -> str:
        """What the scheme needs from calibration and is not there; "" when nothing is."""
        assert self.scheme is not None
        if self.keep:
            return ""
        if self.scheme.activations == "static" and self.limits is None:
            return "range"
        if self.scheme.smoothing == "calibrated" and not self.exponents:
            return "smoothing vector"
        if self.scheme.outliers == "static" and not self.columns and not self.calibrated:
            return "outlier columns"
        return ""


_DEFAULT = Scheme()
_PLAIN = Scheme(symmetric=True, outliers="none", smoothing="none", one_row="same")
_SMOOTHQUANT = Scheme(outliers="none", smoothing="calibrated", alpha=None)
# A range for all tokens must hold the largest of them; one per token need not care. Smoothing for it is strong, and
# leaves weights that are hard to round.
_PER_TENSOR = dataclasses.replace(_SMOOTHQUANT, statistic="absmax", clipping="output", rounding="gptq")

PRESETS: Mapping[str, Scheme] = MappingProxyType(
    {
        "default": _DEFAULT,
        "w8a8": _PLAIN,
        "w8a8-asymmetric": dataclasses.replace(_PLAIN, symmetric=False),
        "w8a16": dataclasses.replace(_PLAIN, activations="none"),
        # Smoothed by gamma: the weights of columns found per call are read from int8 codes, not from a float copy as in
        # the paper, and those that a large gamma made small would round to nothing.
        "llm.int8": dataclasses.replace(
            _PLAIN, symmetric=False, outliers="threshold", capacity=64, smoothing="outliers", one_row="weight_only"
        ),
        "zeroquant": dataclasses.replace(_PLAIN, weights="group"),
        "smoothquant-o1": _SMOOTHQUANT,
        "smoothquant-o2": dataclasses.replace(_PER_TENSOR, activations="per_tensor"),
        "smoothquant-o3": dataclasses.replace(_PER_TENSOR, activations="static"),
        "outlier-columns": Scheme(outliers="static", smoothing="calibrated"),
        "auto": Scheme(outliers="static", smoothing="calibrated", alpha=None),
    }
)

CALIBRATED = tuple(
    name for name, s in PRESETS.items()
    if "calibrated" in (s.smoothing,) or s.outliers == "static" or s.activations == "static"
)  # fmt: skip
"""Presets that need `int8pass.calibrate` before they can be compiled."""


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
    tensors: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}), compare=False, repr=False)
    """Codes rounded by calibration, int8 [N, K] by linear: too large for JSON, `save` writes them beside it."""

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

    def override(self, sites: str | Iterable[str] | None = None, **fields: Any) -> Recipe:
        """This recipe with fields of `Scheme` changed, for the whole model or for some sites (by name); `keep=True`
        leaves sites in their dtype.

        Raises:
            OptionError: a field that does not exist, or a wrong value.
        """
        unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(Scheme)} - {"keep"})
        if unknown:
            raise OptionError(f"Scheme has no field {', '.join(map(repr, unknown))}")
        if sites is None:
            if "keep" in fields:
                raise OptionError("keep is a setting of single sites")
            changed = {n: dataclasses.replace(s, scheme=dataclasses.replace(s.scheme, **fields)) if s.scheme else s
                       for n, s in self.sites.items()}  # fmt: skip
            scheme = dataclasses.replace(self.scheme, **fields)
            return dataclasses.replace(self, scheme=scheme, sites=MappingProxyType(changed))
        own = dict(self.sites)
        for name in [sites] if isinstance(sites, str) else sites:
            settings = self.at(name)
            keep = bool(fields.get("keep", settings.keep))
            assert settings.scheme is not None
            scheme = dataclasses.replace(settings.scheme, **{k: v for k, v in fields.items() if k != "keep"})
            own[name] = dataclasses.replace(settings, scheme=scheme, keep=keep)
        return dataclasses.replace(self, sites=MappingProxyType(own))

    def diff(self, other: Recipe) -> list[str]:
        """What differs from `other`, one line each, for people; empty when the two give the same graphs."""
        from int8pass import recipe_file

        return recipe_file.differences(self, other)

    def to_json(self) -> str:
        """Readable JSON, a vector a line; defaults are written too: a file keeps its meaning when they change."""
        from int8pass import recipe_file

        return recipe_file.to_json(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path` (and rounded codes, if there are, to `path` + ".pt"); a failure leaves no half-written
        file."""
        from int8pass import recipe_file

        recipe_file.save(self, Path(path))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: the file is missing, truncated, no recipe, or of a newer format, or its codes are not there.
        """
        from int8pass import recipe_file

        return recipe_file.load(Path(path))

    @staticmethod
    def from_dict(content: Any) -> Recipe:
        """The recipe that `to_json` wrote."""
        from int8pass import recipe_file

        return recipe_file.from_dict(content)


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
    if value.get("triton.enable_pdl"):
        raise OptionError(
            "triton.enable_pdl cannot be set: Inductor's kernels would read what those of int8pass still write. "
            "Where it pays int8pass lets launches overlap by itself."
        )
    return dict(value)
