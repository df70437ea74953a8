"""Choices of one site, by the error they leave in its output on data that did not set its ranges. Mostly arrays.

The error of a choice is the mean of ‖ŷ_t - y_t‖² / (‖y_t‖² + e) over tokens, as a sample knows it: neither a massive
token nor one that is nearly zero decides alone. Where one range serves all tokens, e is the median of ‖y‖²: with the
mean, one massive token would make the errors of all others vanish. With a range per token it has no part in them, and e
is the mean: the median doubled the divergence of O1 on SmolLM2 (5.7 to 11.7 thousandths of a nat).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8pass.calibration.observe import Sample
from int8pass.calibration.smoothing import column_absmax, column_mean, exponents, grouped, outlier_exponents
from int8pass.calibration.statistics import ChannelStatistics
from int8pass.recipe import Scheme
from lowering import numerics

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
OUTLIER_FRACTIONS = tuple(2 ** (-i / 2) for i in range(1, 15))  # down to 1/128 of the largest channel
AWQ_ALPHAS = tuple(i / 20 for i in range(1, 20))
MOST_OUTPUTS = 1024  # per linear: of a larger one, evenly spaced rows stand for the rest
# Fractions of a range: beyond it, because unseen tokens reach further, and within it.
CLIPS = (2.0, 1.5, 1.25, 1.1, 1.0, 0.9, 0.8, 0.7, 0.55, 0.4)
# What a clipped value's error counts, in squared errors of rounding. Rounding errors of many channels have no direction
# in common; a clipped value takes away a part of what its token says. In SmolLM2's down_proj the tokens that a range
# clips diverge 15 to 80 times as far as others with an error of that size; but with 16 for all of them ranges become
# too wide: 4 left the least divergence, without columns and with them (18.1, 18.3 with 8, 19.4 with 16 thousandths of
# a nat of O3; 4.0 and 4.9 with 64 columns).
CLIPPED = 4.0
WORTH = 1.1  # what is seen is clipped only where that saves a tenth of the error
FINALISTS = 3  # smoothing vectors for which every fraction is tried
REFINED = 2  # vectors whose largest channels are smoothed further


@dataclass(frozen=True)
class Choice:
    """One way to quantize a site."""

    exponents: Tensor
    """log2 s, fp64 [K]."""
    alpha: float | None = None
    columns: tuple[int, ...] = ()
    limits: tuple[float, float] | None = None
    error: float = float("inf")


class Trial:
    """A site's weights and sample, on which choices are tried."""

    def __init__(
        self,
        sample: Sample,
        weights: Sequence[Tensor],
        scheme: Scheme,
        statistics: ChannelStatistics,
        channels: tuple[int, ...] | None,
    ) -> None:
        self.x = sample.rows
        self.weights = [_some_rows(w).to(self.x.device) for w in weights]
        self.scheme, self.statistics, self.channels = scheme, statistics, channels
        self._weight_statistic = column_mean(weights) if scheme.statistic == "mean" else column_absmax(weights)
        self._exact = [self.x @ w.t() for w in self.weights]
        energy = sum(y.square().sum(1) for y in self._exact)
        assert isinstance(energy, Tensor)
        share = sample.weights / sample.weights.sum()
        mean = (energy * share).sum()
        one_range = scheme.activations != "per_token"
        # Where most outputs are zero (after a ReLU, say) the median says nothing.
        typical = torch.maximum(_median(energy, share), 1e-3 * mean) if one_range else mean
        self._token = share / (energy + typical.clamp_min(1e-30))  # what an error counts
        self._sensitivities = sample.sensitivities
        self._share = share
        self._taken: dict[int, tuple[Tensor, list[int]]] = {}  # by a vector's identity, with the vector

    def exponents(self, statistic: str, alpha: float | None) -> Tensor:
        """Smoothing exponents of one α (None: no smoothing), equal within a head group."""
        if alpha is None:
            return torch.zeros(self.x.shape[1], dtype=torch.float64, device=self.x.device)
        found = exponents(self.statistics.of(statistic), self._weight_statistic, alpha)
        return grouped(found.to(self.x.device), self.channels)

    def limits(self, choice: Choice) -> tuple[float, float]:
        """The range of a choice, from the data that set the ranges: what is calibrated, or the widest that a batch had
        (a sample of its tokens lacks the few that decide). Averages over batches would not do for that: the largest of
        the channels' averages is less than the average of their largest, the more so the better they are smoothed.
        """
        moving = self.scheme.clipping == "moving_average"
        return self.statistics.limits(torch.exp2(choice.exponents), choice.columns, moving)

    def error(self, choice: Choice) -> float:
        """What `choice` costs on the sample."""
        return self._errors(choice, [choice.limits], [self._token] * len(self.weights))[0]

    def impact(self, choice: Choice) -> float | None:
        """What `choice` costs the output of the whole model, in nats per token where that is a prediction; None where
        the sample does not know. Comparable between sites, as `error` is not."""
        if self._sensitivities is None:
            return None
        outputs = [w.shape[0] for w in self.weights]  # the mean over some stands for that over all
        tokens = [self._share * g / (2 * n) for g, n in zip(self._sensitivities.unbind(1), outputs, strict=True)]
        return self._errors(choice, [choice.limits], tokens)[0]

    def _errors(
        self, choice: Choice, ranges: Sequence[tuple[float, float] | None], tokens: Sequence[Tensor]
    ) -> list[float]:
        """What `choice` costs on the sample with each of some ranges; its weights are rounded once for all. `tokens`
        has for every linear what a squared error of a token counts."""
        s = torch.exp2(choice.exponents).float()
        x, columns = self.x / s, list(choice.columns)
        outliers, x[:, columns] = x[:, columns], 0.0
        products = []
        for weight, exact in zip(self.weights, self._exact):
            scaled = weight * s
            wanted = exact - outliers @ scaled[:, columns].t() if columns else exact
            scaled[:, columns] = 0.0
            products.append((fake_quantize_weight(scaled, self.scheme).t(), wanted))
        found = []
        for limits in ranges:
            inner = fake_quantize(x, self.scheme, limits)
            each = [(inner @ weight - wanted).square().sum(1) for weight, wanted in products]
            error = torch.stack([e @ token for e, token in zip(each, tokens)]).sum()
            if limits is not None and self.scheme.ranged:
                beyond = x - _clipped(x, self.scheme, limits)
                rows = beyond.any(1)
                lost = [(beyond[rows] @ weight).square().sum(1) for weight, _ in products]
                error += (CLIPPED - 1) * torch.stack([e @ token[rows] for e, token in zip(lost, tokens)]).sum()
            found.append(error)
        errors: list[float] = torch.stack(found).tolist()
        return errors

    def tried(self, choice: Choice) -> Choice:
        """`choice` with its range and its error."""
        if self.scheme.activations in {"static", "per_tensor"} and choice.limits is None:
            choice = replace(choice, limits=self.limits(choice))
        error = self.error(choice)
        return replace(choice, error=error) if self.scheme.ranged else replace(choice, error=error, limits=None)

    def smoothings(self) -> list[Choice]:
        """The smoothing vectors that the scheme allows, unmeasured."""
        scheme = self.scheme
        if scheme.smoothing != "calibrated":
            return [Choice(self.exponents(scheme.statistic, None))]
        if scheme.alpha is not None:
            return [Choice(self.exponents(scheme.statistic, scheme.alpha), scheme.alpha)]
        alphas = AWQ_ALPHAS if scheme.statistic == "mean" else ALPHAS
        found = [
            Choice(self.exponents(scheme.statistic, None)),
            *(Choice(self.exponents(scheme.statistic, a), a) for a in alphas),
        ]
        if scheme.activations in {"static", "per_tensor"}:
            absmax = self.statistics.absmax.to(self.x.device)
            every = (outlier_exponents(absmax, f) for f in OUTLIER_FRACTIONS)
            found += [Choice(grouped(e, self.channels)) for e in every]
        return found

    def columns(self, choice: Choice, count: int) -> tuple[int, ...]:
        """The `count` columns that cause most error under a smoothing vector, in ascending order.

        With one range per token these are the columns of most energy, whatever the vector: there, rounding the weights
        costs most and ranges are set; shares of a sample's error rank them worse. Where a range serves all tokens, a
        column costs what rounding its weights costs under its activations, what rounding its activations costs under
        its weights, and the resolution of every token whose range it sets: taken a few at a time, because the next
        largest sets the range once the largest is gone. More columns hold all of fewer.
        """
        if self.scheme.activations == "per_token":
            energy = self.statistics.energy
            return tuple(sorted(torch.topk(energy, min(count, energy.numel())).indices.tolist()))
        _, taken = self._taken.setdefault(id(choice.exponents), (choice.exponents, []))
        if len(taken) < min(count, self.x.shape[1]):
            self._take(torch.exp2(choice.exponents).float(), taken, count)
        return tuple(sorted(taken[:count]))

    def _take(self, s: Tensor, taken: list[int], count: int) -> None:
        """Add columns to `taken`, in the order of the error they cause, until there are `count` or all."""
        x, weight = self.x / s, torch.cat(self.weights) * s
        absmax = self.statistics.absmax.to(s.device).float() / s
        active = (x.square() * self._token[:, None]).sum(0)  # of each column
        norms = weight.square().sum(0)
        magnitudes = weight.abs_()
        unit = self._token.sum() / (12 * 127**2)
        while len(taken) < min(count, absmax.numel()):
            for gone in (absmax, active, norms):
                gone[taken] = 0.0
            magnitudes[:, taken] = 0.0
            from_weights = active * (magnitudes.amax(1).square().sum() / (12 * 127**2))
            noise = absmax.amax().square() * unit * norms
            relief = absmax.square() * unit * norms.sum()
            score = from_weights + noise + relief
            score[taken] = -torch.inf
            step = min(max(2, len(taken) // 4), absmax.numel() - len(taken))
            taken += torch.topk(score, step).indices.tolist()

    def best(self, candidates: Sequence[Choice], count: int = 0) -> Choice:
        """The candidate of least error, with `count` columns each."""
        return self.ranked(candidates, count)[0]

    def ranked(self, candidates: Sequence[Choice], count: int = 0) -> list[Choice]:
        """Candidates with `count` columns each, by their error; of static ones a few, each with its best range.

        Where one range serves all tokens and vectors are searched, the channels that still set it are smoothed
        further.
        """
        tried = self._with_columns(candidates, count)
        if self.scheme.activations in {"static", "per_tensor"} and len(candidates) > FINALISTS:
            finer = [f for choice in tried[:REFINED] for f in self._finer(choice)]
            tried = sorted([*tried, *self._with_columns(finer, count)], key=lambda c: c.error)
        if self.scheme.ranged and self.scheme.clipping == "output":
            tried = sorted((self.clipped(choice) for choice in tried[:FINALISTS]), key=lambda c: c.error)
        return tried

    def _with_columns(self, candidates: Sequence[Choice], count: int) -> list[Choice]:
        tried = []
        for candidate in candidates:
            if count and len(candidate.columns) != count:
                candidate = replace(candidate, columns=self.columns(candidate, count))
            tried.append(self.tried(candidate))
        return sorted(tried, key=lambda c: c.error)

    def _finer(self, choice: Choice) -> list[Choice]:
        """`choice` with its largest channels brought down to fractions of the range."""
        absmax = self.statistics.absmax.to(choice.exponents.device) / torch.exp2(choice.exponents)
        absmax[list(choice.columns)] = 0.0
        more = (outlier_exponents(absmax, f) for f in OUTLIER_FRACTIONS[:8])
        return [Choice(grouped(choice.exponents + e, self.channels), choice.alpha) for e in more]

    def clipped(self, choice: Choice) -> Choice:
        """A choice with the fraction of its range that leaves least error; all of it where clipping saves little.

        What calibration saw once is seen again, first tokens above all, and what is lost there lasts: other tokens
        attend to them.
        """
        assert choice.limits is not None
        low, high = choice.limits
        tokens = [self._token] * len(self.weights)
        errors = dict(zip(CLIPS, self._errors(choice, [(f * low, f * high) for f in CLIPS], tokens)))
        best = min(errors, key=lambda f: errors[f])
        if best < 1.0 and errors[1.0] <= WORTH * errors[best]:
            best = 1.0
        return replace(choice, error=errors[best], limits=(best * low, best * high))


def fake_quantize(x: Tensor, scheme: Scheme, limits: tuple[float, float] | None) -> Tensor:
    """`x[T, K]` as its int8 codes say it, by the activations of a scheme."""
    if scheme.activations == "none":
        return x
    if scheme.activations == "per_token":
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    elif limits is not None:
        low, high = x.new_tensor(limits[0]), x.new_tensor(limits[1])
    else:
        low, high = x.amin(), x.amax()
    codes, scale, zero_point = numerics.quantize_to_range(x, low, high, scheme.symmetric)
    return (codes.float() - zero_point) * scale


def _clipped(x: Tensor, scheme: Scheme, limits: tuple[float, float]) -> Tensor:
    """`x` within what codes of a range can say."""
    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    most = max(-low, high)
    return x.clamp(-most, most) if scheme.symmetric else x.clamp(low, high)


def fake_quantize_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """`weight[N, K]` as its int8 codes say it, by the weights of a scheme."""
    if scheme.weights == "group":
        codes, scale = numerics.quantize_weight_groups(weight, scheme.group_size)
        return codes.float() * scale.repeat_interleave(scheme.group_size, 1)[:, : weight.shape[1]]
    quantize = numerics.quantize_weight if scheme.weights == "per_channel" else numerics.quantize_weight_per_tensor
    codes, scale = quantize(weight)
    return codes.float() * scale[:, None]


def _median(values: Tensor, share: Tensor) -> Tensor:
    """The value that half of the weight does not exceed."""
    order = values.argsort()
    return values[order[(share[order].cumsum(0) < 0.5).sum().clamp_max(len(order) - 1)]]


def _some_rows(weight: Tensor) -> Tensor:
    step = -(-weight.shape[0] // MOST_OUTPUTS)
    return weight.detach()[::step].float()
