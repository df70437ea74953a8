"""What is measured of one site: sums over tokens and channels, never an activation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from int8pass.inspect.facts import Channels, Histogram
from int8pass.quantize import pack_weight
from int8pass.recipe import Scheme
from lowering import numerics

THRESHOLD = 6.0
"""Above it an activation counts as an outlier (LLM.int8(), arXiv 2208.07339, section 4.1)."""
ALPHAS = tuple(i / 10 for i in range(11))
EXACT = 200.0
"""SQNR of a result without error, dB."""
MAX_CHANNELS = 2048
"""Of one site in a report; wider ones pool neighbours."""
_BINS = 128
_SAMPLE, _OUTPUTS = 64, 256


@dataclass
class Noise:
    """Energies of a signal and of what was added to it."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Count in two tensors of one shape."""
        signal = expected.detach().float().flatten()
        noise = found.detach().float().flatten() - signal
        self.signal += float(signal.dot(signal))
        self.noise += float(noise.dot(noise))

    @property
    def sqnr(self) -> float | None:
        """10·log10(signal / noise) in dB, at most `EXACT`; None when nothing was counted or a value was not finite."""
        if not math.isfinite(self.signal + self.noise) or self.signal == 0:
            return None
        if self.noise == 0:
            return EXACT
        return round(min(EXACT, 10 * math.log10(self.signal / self.noise)), 2)


class Histograms:
    """Values in even bins that double their width when a value falls outside, and the codes made of them."""

    def __init__(self) -> None:
        self.bound = 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.codes = torch.zeros(256, dtype=torch.int64)
        self._clip = [0.0, 0.0]
        self._tokens = 0

    def values(self, x: Tensor) -> None:
        """Count the values of `x`."""
        largest = float(x.abs().max()) if x.numel() else 0.0
        if not math.isfinite(largest) or not (self.bound or largest):
            return
        self.bound = self.bound or largest
        while largest > self.bound:
            self.bound *= 2
            inner = self.counts.view(-1, 2).sum(1)
            self.counts = F.pad(inner, (_BINS // 4, _BINS // 4))
        self.counts += torch.histc(x.float().cpu(), _BINS, -self.bound, self.bound).long()

    def quantized(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Count int8 codes, and what −128 and 127 stand for."""
        self.codes += torch.bincount(codes.flatten().long().cpu() + 128, minlength=256)
        for i, code in enumerate((-128, 127)):
            self._clip[i] += float(((code - zero_point.double()) * scale.double()).sum())
        self._tokens += scale.numel()

    def facts(self) -> Histogram | None:
        """None when no value was seen."""
        if not self.bound:
            return None
        clip = None
        if self._tokens:
            clip = (_short(self._clip[0] / self._tokens), _short(self._clip[1] / self._tokens))
        codes = tuple(self.codes.tolist()) if self._tokens else ()
        return Histogram(_short(self.bound), tuple(self.counts.tolist()), codes, clip)


@dataclass
class SiteNumbers:
    """Everything measured of one site, over all calls."""

    smoothing: Tensor | None = None
    """s [K], fp32"""
    x: Tensor | None = None
    """max over tokens of |X_j| [K], fp32"""
    above: Tensor | None = None
    """Tokens with |X_j| ≥ THRESHOLD [K]"""
    tokens: int = 0
    weight: Noise = field(default_factory=Noise)
    weights_seen: bool = False
    w: Tensor | None = None
    """max over linears and rows of |W_j| [K], fp32"""
    w_smoothed: Tensor | None = None
    """The same of what is quantized."""
    local: dict[str, Noise] = field(default_factory=dict)
    """By variant of the recipe."""
    cumulative: Noise = field(default_factory=Noise)
    alone: float | None = None
    histograms: Histograms = field(default_factory=Histograms)
    curve: tuple[tuple[float, float], ...] = ()
    linears: dict[str, None] = field(default_factory=dict)
    """Names that its weights have in the model."""

    def see_input(self, x: Tensor) -> None:
        """Count the tokens of `x[..., K]`."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.shape[0] == 0:
            return
        magnitude = rows.abs()
        absmax, above = magnitude.amax(0).float(), (magnitude >= THRESHOLD).sum(0)
        self.x = absmax if self.x is None else torch.maximum(self.x, absmax)
        self.above = above if self.above is None else self.above + above
        self.tokens += rows.shape[0]
        self.histograms.values(self.smooth(rows))

    def see_weight(self, weight: Tensor, smoothed: Tensor) -> None:
        """Take a weight `[N, K]` into account, as it is and as it is quantized."""
        self.w = _largest(self.w, weight)
        self.w_smoothed = _largest(self.w_smoothed, smoothed)

    def smooth(self, x: Tensor) -> Tensor:
        """`x / s` in the dtype of `x`."""
        return x if self.smoothing is None else (x.float() / self.smoothing.to(x.device)).to(x.dtype)

    def noise(self, variant: str) -> Noise:
        """The noise of one variant."""
        return self.local.setdefault(variant, Noise())

    def absmax(self) -> tuple[float, float] | None:
        """max |X| before and after smoothing."""
        return None if self.x is None else (_short(self.x.max()), _short(self.smooth(self.x).max()))

    def spread(self) -> tuple[float, float] | None:
        """Largest over median channel, before and after smoothing."""
        if self.x is None:
            return None
        return _spread(self.x), _spread(self.smooth(self.x))

    def channels(self) -> Channels | None:
        """The channels, pooled to at most `MAX_CHANNELS`; None when not even weights were seen."""
        if self.w is None or self.w_smoothed is None:
            return None
        width = self.w.numel()
        pool = -(-width // MAX_CHANNELS)
        above: tuple[tuple[int, float], ...] = ()
        if self.above is not None and self.tokens:
            share = (self.above / self.tokens).tolist()
            above = tuple((j, round(value, 4)) for j, value in enumerate(share) if value > 0)
        before, after = (None, None) if self.x is None else (self.x, self.smooth(self.x))
        return Channels(
            pool, _pooled(before, pool), _pooled(after, pool), _pooled(self.w, pool), _pooled(self.w_smoothed, pool),
            above,
        )  # fmt: skip


def alpha_curve(
    x: Tensor, weights: Sequence[Tensor], x_absmax: Tensor, w_absmax: Tensor, scheme: Scheme
) -> tuple[tuple[float, float], ...]:
    """(α, SQNR in dB) of the linears' results, for the smoothing s_j = max|X_j|^α / max|W_j|^(1−α).

    SmoothQuant (arXiv 2211.10438, equation 4 and figure 10), on at most 64 of the tokens `x[..., K]` and 256 of every
    linear's outputs; activations and weights `[N, K]` as the scheme has them, but without outlier columns, and a static
    range is that of these tokens.
    """
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    rows = rows[:: max(1, rows.shape[0] // _SAMPLE)][:_SAMPLE]
    tiny = torch.finfo(torch.float32).tiny
    points = []
    active = (x_absmax > 0) & (w_absmax > 0)
    if scheme.weights != "per_tensor":  # whose one scale is of all rows
        weights = [w[:: -(-w.shape[0] // _OUTPUTS)] for w in weights]
    for alpha in ALPHAS:
        s = x_absmax.clamp_min(tiny) ** alpha / w_absmax.clamp_min(tiny) ** (1 - alpha)
        s = torch.where(active, s, torch.ones_like(s)).clamp(1e-5, 1e5)
        read, noise = _read_back(rows / s, scheme), Noise()
        for weight in weights:
            noise.add(F.linear(rows, weight.float()), F.linear(read, _weight_back(weight.float() * s, scheme)))
        points.append((alpha, noise.sqnr))
    return tuple((alpha, found) for alpha, found in points if found is not None)


def _read_back(x: Tensor, scheme: Scheme) -> Tensor:
    """The rows `x[T, K]`, quantized and dequantized."""
    if scheme.activations == "none":
        return x
    if scheme.activations != "per_token":
        codes, scale, zero = numerics.quantize_to_range(x, x.amin(), x.amax(), scheme.symmetric)
    elif scheme.symmetric:
        codes, scale = numerics.quantize_symmetric(x)
        return codes.float() * scale
    else:
        codes, scale, zero = numerics.quantize_affine(x)
    return (codes.float() - zero) * scale


def _weight_back(weight: Tensor, scheme: Scheme) -> Tensor:
    """A weight `[N, K]`, quantized and dequantized."""
    group = {"per_channel": None, "per_tensor": 0, "group": scheme.group_size}[scheme.weights]
    codes, scale = pack_weight(weight, (), group)
    step = scale.repeat_interleave(group, 1)[:, : weight.shape[1]] if group else scale[:, None]
    return codes.float() * step


def _largest(known: Tensor | None, weight: Tensor) -> Tensor:
    absmax = weight.detach().abs().amax(0).float()
    return absmax if known is None else torch.maximum(known, absmax)


def _spread(absmax: Tensor) -> float:
    return _short(absmax.max() / absmax.median().clamp_min(torch.finfo(torch.float32).tiny))


def _pooled(values: Tensor | None, pool: int) -> tuple[float, ...]:
    if values is None:
        return ()
    if pool > 1:
        values = F.max_pool1d(values[None], pool, ceil_mode=True)[0]
    return tuple(_short(v) for v in values.tolist())


def _short(value: float | Tensor) -> float:
    """Four significant digits."""
    return float(f"{float(value):.4g}")


__all__ = ["ALPHAS", "EXACT", "THRESHOLD", "Histograms", "Noise", "SiteNumbers", "alpha_curve"]
