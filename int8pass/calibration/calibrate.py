"""`calibrate`: run batches, watch the sites, choose, and write what was chosen into a recipe."""

from __future__ import annotations

import dataclasses
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from int8pass.calibration import budget, clipping, observe
from int8pass.calibration.observe import Progress, Sample
from int8pass.calibration.rounding import gptq
from int8pass.calibration.search import Choice, Trial
from int8pass.calibration.sensitivity import NoGradient
from int8pass.calibration.session import Session, SiteInfo, divergence, first_tensor
from int8pass.calibration.statistics import ChannelStatistics
from int8pass.errors import CalibrationError, CalibrationWarning
from int8pass.quantize import some
from int8pass.recipe import PRESETS, Options, Recipe, Scheme, SiteSettings
from lowering import numerics

HISTOGRAMS = {"percentile", "mse", "entropy"}
AUTO_COST = 1.04  # counts products: with 1.08 a prefill of SmolLM2 took 1.13 times as long as plain int8 on a CPU
HESSIANS = 2**32  # bytes that they may take at a time: sites beyond that wait for another pass over the data


def _silent(title: str, done: int, total: int) -> None:
    """No progress."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe | str | os.PathLike[str] = "outlier-columns",
    *,
    columns: int | None = None,
    cost: float | None = None,
    error: float | None = None,
    progress: Progress = _silent,
) -> Recipe:
    """Find ranges, smoothing, outlier columns and rounded weights for every site from data.

    Args:
        model: the model in its own precision; it runs eagerly on every batch and is not changed.
        batches: inputs of the model, each a tensor, a tuple of positional or a dictionary of keyword arguments, of any
            lengths; padding is ignored where a dictionary has an attention mask. A few thousand tokens that look like
            the use of the model are enough. Where something is searched, the last quarter of the batches is held out:
            it measures the choices, and the others set the ranges. With torch.distributed, every process gives its own
            batches, and all get the same recipe.
        recipe: what to start from: a preset name, a `Recipe` or the path of one. Its schemes say what is done.
        columns: float columns per site with `outliers="static"` (default: the scheme's capacity, or a twelfth of the
            site's channels, 16 to 128). Where one range serves a whole tensor and α is searched: as many float weights
            as that many columns at every site would be (default 64), where the model's output depends on them most.
            "auto" with a number of columns has no budget: it smooths every site and gives it that many.
        cost: choose {leave, smooth, split, both, keep 16-bit} for every site such that all together cost at most this
            multiple of plain int8 (`int8pass.calibration.budget`); 1.04 for the preset "auto".
        error: or stop where the mean relative error of the sites' outputs is this small.
        progress: called with (what is being done, steps done, steps in all).

    Returns:
        The recipe with what was found for every site, and the versions that made it.

    Raises:
        CalibrationError: no batch, or too few to hold one out; a batch the model refuses; a site with NaN or Inf
            activations; no token at any site.
        OptionError, RecipeError, CaptureError: as the backend would.

    Warns:
        CalibrationWarning: sites that no token reached; they keep the data-free default.
    """
    start = Options.parse({"recipe": recipe}, None).recipe
    searched = cost is not None or error is not None or _searches(start)
    seen = Calibration(model, batches, start, hold_out=searched, progress=progress)
    return seen.recipe(start, columns=columns, cost=cost, error=error, progress=progress)


def _searches(recipe: Recipe) -> bool:
    """True when some choice is made by its error."""
    schemes = [recipe.scheme, *(s.scheme for s in recipe.sites.values() if s.scheme)]
    return any(s.smoothing == "calibrated" and s.alpha is None for s in schemes)


class Calibration:
    """What a model's sites saw of some data, from which any number of recipes can be made.

    Args: as of `calibrate`; `hold_out` keeps the last quarter of the batches from the ranges, for the choices.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        recipe: Recipe | str | os.PathLike[str] = "default",
        *,
        hold_out: bool = True,
        progress: Progress = _silent,
    ) -> None:
        self._data = list(batches)
        if not self._data:
            raise CalibrationError("no calibration batch was given")
        if hold_out and len(self._data) < 2:
            raise CalibrationError(
                "one calibration batch was given, and this recipe searches: ranges and choices must come from "
                "different data. Give at least two batches, or a fixed alpha."
            )
        held = max(1, len(self._data) // 4)
        self._ranging = self._data[:-held] if hold_out else self._data
        self._held, self._holds_out = self._data[-held:], hold_out
        self._session = Session(model, Options.parse({"recipe": recipe}, None).recipe)
        self._statistics = observe.statistics(self._session, self._ranging, progress)
        if not self._statistics:
            raise CalibrationError("no site was found: nothing in this model can be quantized (see int8pass.inspect)")
        self._samples = observe.samples(self._session, self._held, self._statistics, progress)
        self._sensitive: dict[str, Sample] | None = None
        self._sites = _reached(self._session.sites, self._statistics, self._samples)
        self._hessians: dict[str, Tensor] = {}

    def recipe(
        self,
        recipe: Recipe | str | os.PathLike[str],
        *,
        columns: int | None = None,
        cost: float | None = None,
        error: float | None = None,
        progress: Progress = _silent,
    ) -> Recipe:
        """The recipe with what was found for every site; see `calibrate`."""
        start = Options.parse({"recipe": recipe}, None).recipe
        if start.scheme == PRESETS["auto"] and cost is None and error is None and columns is None:
            cost = AUTO_COST
        budgeted = cost is not None or error is not None
        if (budgeted or _searches(start)) and not self._holds_out:
            raise CalibrationError("this recipe searches, and no batch was held out (hold_out=True)")
        work = _Work(
            self._session, start, self._statistics, self._samples, self._with_sensitivities, self._hessians, columns,
            progress,
        )  # fmt: skip
        if budgeted:
            settings = work.within(self._sites, self._held, cost, error)
        else:
            settings = work.each(self._sites)
        settings = work.ranges(settings, self._ranging)
        for name in self._session.sites:
            settings.setdefault(name, SiteSettings(scheme=PRESETS["default"]))
        ordered = {name: settings[name] for name in self._session.sites}
        others = {name: found for name, found in start.sites.items() if name not in ordered}
        made = dataclasses.replace(start, sites=MappingProxyType({**others, **ordered}), versions=_versions())
        return dataclasses.replace(made, tensors=MappingProxyType(work.codes(made, self._sites, self._ranging)))

    def _with_sensitivities(self, progress: Progress) -> dict[str, Sample]:
        """The sample, with what the model's output makes of an error at every token where that can be known."""
        if self._sensitive is None:
            try:
                self._sensitive = observe.samples(self._session, self._held, self._statistics, progress, sensitive=True)
            except NoGradient as reason:
                warnings.warn(
                    f"no gradient of the model's output ({reason}): columns go where they save most of a site's own "
                    "relative error", CalibrationWarning, stacklevel=4,
                )  # fmt: skip
                self._sensitive = self._samples
        return self._sensitive


def _reached(
    sites: Mapping[str, SiteInfo], statistics: Mapping[str, ChannelStatistics], samples: Mapping[str, Sample]
) -> dict[str, SiteInfo]:
    """The sites that tokens reached; the others are reported."""
    missed = [name for name in sites if name not in samples or statistics[name].tokens == 0]
    if len(missed) == len(sites):
        raise CalibrationError(f"no token reached {some(missed)}: calibration batches are empty there")
    if missed:
        warnings.warn(
            f"no calibration token reached {some(missed)}: they keep the data-free default", CalibrationWarning,
            stacklevel=4,
        )  # fmt: skip
    return {name: info for name, info in sites.items() if name not in missed}


class _Work:
    """The choices, site by site."""

    def __init__(
        self,
        session: Session,
        recipe: Recipe,
        statistics: Mapping[str, ChannelStatistics],
        samples: Mapping[str, Sample],
        sensitive: Callable[[Progress], Mapping[str, Sample]],
        hessians: dict[str, Tensor],
        columns: int | None,
        progress: Progress,
    ) -> None:
        self._session, self._recipe, self._progress = session, recipe, progress
        self._hessians, self._sensitive = hessians, sensitive
        self._statistics, self._samples, self._columns = statistics, samples, columns

    def _scheme(self, name: str) -> Scheme:
        scheme = self._recipe.at(name).scheme
        assert scheme is not None
        return scheme

    def _trial(self, info: SiteInfo, scheme: Scheme, sensitive: bool = False) -> Trial:
        samples = self._sensitive(self._progress) if sensitive else self._samples
        return Trial(samples[info.name], info.weights, scheme, self._statistics[info.name], info.channels)

    def _count(self, scheme: Scheme, width: int, default: int | None = None) -> int:
        """Columns of a site. By default a share of the channels: at equal cost, the inputs of wide sites, where most of
        the error is, get more of them than with one number for all."""
        if scheme.outliers != "static":
            return 0
        share = max(16, min(128, round(width / 12 / 8) * 8))
        return min(width, self._columns or scheme.capacity or default or share)

    def each(self, sites: Mapping[str, SiteInfo]) -> dict[str, SiteSettings]:
        """Every site by its own scheme; columns that are searched with ranges for whole tensors go where they save
        most."""
        settings = {}
        shared: dict[int, dict[str, list[tuple[Choice, float]]]] = {}
        for done, info in enumerate(sites.values()):
            self._progress("choose", done, len(sites))
            scheme = self._scheme(info.name)
            shares = scheme.alpha is None and scheme.activations in {"static", "per_tensor"}
            count = self._count(scheme, info.width, 64 if shares else None)
            if count and shares:
                trial = self._trial(info, scheme, sensitive=True)
                shared.setdefault(count, {})[info.name] = _by_count(trial, count)
            else:
                trial = self._trial(info, scheme)
                settings[info.name] = self._settings(info.name, trial.best(trial.smoothings(), count), scheme)
        for count, options in shared.items():
            outputs = {name: sum(sites[name].sizes) for name in options}
            for name, choice in budget.allotted(options, outputs, count).items():
                settings[name] = self._settings(name, choice, self._scheme(name))
        self._progress("choose", len(sites), len(sites))
        return settings

    def within(
        self, sites: Mapping[str, SiteInfo], held: Sequence[Any], cost: float | None, error: float | None
    ) -> dict[str, SiteSettings]:
        """Every site by what the budget allows, with the smoothing that is best end to end on the batches held out."""
        plans = {"searched": None, "one alpha": 0.5}
        made = {}
        for title, alpha in plans.items():
            options: dict[str, list[budget.Option]] = {}
            for done, info in enumerate(sites.values()):
                self._progress(f"choose, {title}", done, len(sites))
                options[info.name] = self._options(info, alpha)
            self._progress(f"choose, {title}", len(sites), len(sites))
            sizes = {name: info.width * sum(info.sizes) for name, info in sites.items()}
            chosen = budget.spend(options, sizes, cost, error)
            made[title] = {name: self._chosen(name, option) for name, option in chosen.items()}
        return self._end_to_end(made, held)

    def _options(self, info: SiteInfo, alpha: float | None) -> list[budget.Option]:
        scheme = self._scheme(info.name)
        trial = self._trial(info, scheme)
        plain = trial.tried(Choice(trial.exponents(scheme.statistic, None)))
        if alpha is None:
            smooth = trial.best([c for c in trial.smoothings() if c.alpha is not None])
        else:
            smooth = trial.tried(Choice(trial.exponents(scheme.statistic, alpha), alpha))
        found = [budget.kept()]
        for base in (plain, smooth):
            for count in budget.COLUMNS:
                if count <= info.width:
                    found.append(budget.option(trial.best([base], count), info.width))
        return found

    def _chosen(self, name: str, option: budget.Option) -> SiteSettings:
        if option.choice is None:
            return dataclasses.replace(self._recipe.sites.get(name, SiteSettings()), keep=True)
        return self._settings(name, option.choice, self._scheme(name))

    def _settings(self, name: str, choice: Choice, scheme: Scheme) -> SiteSettings:
        limits = choice.limits
        exponents = tuple(choice.exponents.tolist()) if scheme.smoothing == "calibrated" else ()
        return dataclasses.replace(
            self._recipe.sites.get(name, SiteSettings()),
            columns=choice.columns,
            exponents=exponents,
            limits=limits,
            alpha=choice.alpha,
            error=choice.error,
            tokens=self._statistics[name].tokens,
        )

    def _end_to_end(self, plans: Mapping[str, dict[str, SiteSettings]], held: Sequence[Any]) -> dict[str, SiteSettings]:
        """Errors of sites rank plans imperfectly: the one whose output is nearest to the model's own wins."""
        batches = held[:2]
        total = len(batches) * (len(plans) + 1)
        self._progress("check end to end", 0, total)
        exact = []
        for done, batch in enumerate(batches):
            exact.append(first_tensor(self._session.plain(batch)))
            self._progress("check end to end", done + 1, total)
        scores = []
        for i, (title, sites) in enumerate(plans.items()):
            recipe = dataclasses.replace(self._recipe, sites=MappingProxyType(sites))
            score = 0.0
            for done, (batch, expected) in enumerate(zip(batches, exact)):
                found = first_tensor(self._session.quantized(batch, recipe))
                score += divergence(found, expected) if found is not None and expected is not None else 0.0
                self._progress("check end to end", len(batches) * (i + 1) + done + 1, total)
            scores.append((score, title))
        return plans[min(scores)[1]]

    def ranges(self, settings: dict[str, SiteSettings], batches: Sequence[Any]) -> dict[str, SiteSettings]:
        """Ranges by histogram, where a scheme asks for it."""
        wanted = {}
        for name, found in settings.items():
            scheme = self._scheme(name)
            if scheme.ranged and scheme.clipping in HISTOGRAMS and found.limits is not None:
                s = torch.exp2(torch.tensor(found.exponents or (0.0,) * self._statistics[name].width))
                wanted[name] = (s, found.columns, found.limits)
        if not wanted:
            return settings
        histograms = observe.histograms(self._session, batches, wanted, self._progress)
        for name, histogram in histograms.items():
            scheme = self._scheme(name)
            limits = clipping.limits(histogram, scheme.clipping, scheme.symmetric)
            settings[name] = dataclasses.replace(settings[name], limits=limits)
        return settings

    def codes(self, recipe: Recipe, sites: Mapping[str, SiteInfo], batches: Sequence[Any]) -> dict[str, Tensor]:
        """GPTQ codes of the linears whose scheme asks for them, by path."""
        names = {n for n in sites if self._scheme(n).rounding == "gptq" and not recipe.at(n).keep}
        if not names:
            return {}
        made: dict[str, Tensor] = {}
        done = 0
        groups = observe.within_bytes({name: 4 * sites[name].width ** 2 for name in sorted(names)}, HESSIANS)
        for group in groups:
            seconds = self._seconds(set(group), batches, keep=len(groups) == 1)
            for name in group:
                self._progress("round weights", done, len(names))
                made |= _rounded(sites[name], seconds.pop(name), recipe.at(name), self._scheme(name))
                done += 1
        self._progress("round weights", done, len(names))
        return made

    def _seconds(self, names: set[str], batches: Sequence[Any], keep: bool) -> dict[str, Tensor]:
        """Hessians of sites, which no recipe changes: kept for the next one where all fit."""
        missing = names - set(self._hessians)
        found = observe.hessians(self._session, batches, missing, self._progress) if missing else {}
        known = {name: self._hessians[name] for name in names - missing}
        if keep:
            self._hessians.update(found)
        return known | found


def _by_count(trial: Trial, count: int) -> list[tuple[Choice, float]]:
    """A site's best choice without columns, with `count`, and with other counts, of the vectors that did well there;
    each with what it costs the model's output (its own relative error, where that is not known)."""
    found, good = [], []
    for n, kept in ((0, 1), (count, 2)):
        ranked = trial.ranked(trial.smoothings(), n)
        found.append(ranked[0])
        good += [dataclasses.replace(choice, columns=(), limits=None) for choice in ranked[:kept]]
    counts = {round(count * multiple) for multiple in budget.MULTIPLES}
    most = max(count, trial.x.shape[1] // 3)  # beyond a third of the channels no more is gained than by keeping a site
    found += [trial.best(good, n) for n in sorted(counts) if 0 < n <= min(most, trial.x.shape[1])]
    costs = [trial.impact(choice) for choice in found]
    return [(choice, choice.error if cost is None else cost) for choice, cost in zip(found, costs, strict=True)]


def _rounded(info: SiteInfo, second: Tensor, found: SiteSettings, scheme: Scheme) -> dict[str, Tensor]:
    """The codes of a site's weights under its smoothing and columns by path, on the CPU; all at once: they share the
    Hessian."""
    s = torch.exp2(torch.tensor(found.exponents or (0.0,) * info.width, dtype=torch.float32, device=second.device))
    weights, scales = [], []
    for weight in info.weights:
        scaled = weight.detach().float().to(s.device) * s
        scaled[:, list(found.columns)] = 0.0
        weights.append(scaled)
        scales.append(_scale(scaled, scheme))
    group = scheme.group_size if scheme.weights == "group" else None
    codes = gptq(torch.cat(weights), torch.cat(scales), second / (s[:, None] * s), group).cpu()
    return dict(zip(info.paths, (part.clone() for part in codes.split(info.sizes))))


def _scale(weight: Tensor, scheme: Scheme) -> Tensor:
    """The scales that packing gives `weight[N, K]` under a scheme."""
    if scheme.weights == "group":
        return numerics.quantize_weight_groups(weight, scheme.group_size)[1]
    per_channel = scheme.weights == "per_channel"
    return (numerics.quantize_weight if per_channel else numerics.quantize_weight_per_tensor)(weight)[1]


def _versions() -> MappingProxyType[str, str]:
    from int8pass import __version__

    return MappingProxyType({"int8pass": __version__, "torch": torch.__version__, "python": platform.python_version()})
