"""Static ranges: where to clip a tensor whose histogram is known. Pure functions on arrays.

The histogram of a site's smoothed inliers has fixed bins between extremes that the first pass over the data found, so
that counts add up across batches and processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowering import numerics

BINS = 2048
FRACTIONS = torch.arange(1.0, 0.199, -0.02).tolist()  # of the full range, tried as clipping ranges


class Histogram:
    """Counts of the values of a tensor in `BINS` equal bins of `low`…`high`."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = min(low, 0.0), max(high, 0.0)
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Count values; what is outside (NaN never gets here) goes into the last bins."""
        if self.high > self.low and x.numel():
            position = (x.detach().float() - self.low) * (BINS / (self.high - self.low))
            index = position.clamp(0, BINS - 1).to(torch.int64)
            self.counts += torch.bincount(index.flatten(), minlength=BINS).double().cpu()

    def merge(self, other: Histogram) -> None:
        """Add the counts of a histogram over the same bins."""
        assert (self.low, self.high) == (other.low, other.high)
        self.counts += other.counts

    @property
    def centres(self) -> Tensor:
        """The middle of every bin."""
        return self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * ((self.high - self.low) / BINS)


def percentile_limits(histogram: Histogram, percent: float = 99.99) -> tuple[float, float]:
    """The range that `percent` of the magnitudes do not exceed, never beyond what was seen."""
    order = histogram.centres.abs().argsort()
    total = histogram.counts[order].cumsum(0)
    index = int((total < percent / 100 * total[-1]).sum())
    bound = float(histogram.centres[order][min(index, BINS - 1)].abs()) + (histogram.high - histogram.low) / BINS / 2
    return max(histogram.low, -bound), min(histogram.high, bound)


def mse_limits(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    """The fraction of the range of least Σ counts · (x - Q(x))²."""
    x, best = histogram.centres.float(), (torch.inf, histogram.low, histogram.high)
    for fraction in FRACTIONS:
        low, high = fraction * histogram.low, fraction * histogram.high
        codes, scale, zero = numerics.quantize_to_range(x, torch.tensor(low), torch.tensor(high), symmetric)
        error = float((histogram.counts * ((codes.float() - zero) * scale - x).double().square()).sum())
        best = min(best, (error, low, high))
    return best[1], best[2]


def entropy_limits(histogram: Histogram) -> tuple[float, float]:
    """The range of |x| of least KL divergence between the clipped distribution and its 128 levels (TensorRT's rule)."""
    bound = max(-histogram.low, histogram.high)
    if bound <= 0:
        return histogram.low, histogram.high
    index = (histogram.centres.abs() * (BINS / bound)).clamp(0, BINS - 1).to(torch.int64)
    counts = torch.zeros(BINS, dtype=torch.float64).scatter_add(0, index, histogram.counts)
    counts[0] = counts[1]  # zeros are exact under any range; masked inputs and ReLUs would drown everything else
    best = (torch.inf, BINS)
    for kept in range(128, BINS + 1, 16):
        clipped = counts[:kept].clone()
        clipped[-1] += counts[kept:].sum()
        level = torch.arange(kept) * 128 // kept
        filled = (counts[:kept] > 0).double()
        mass = torch.zeros(128, dtype=torch.float64).scatter_add(0, level, counts[:kept])
        spread = torch.zeros(128, dtype=torch.float64).scatter_add(0, level, filled)
        coarse = (mass / spread.clamp_min(1))[level] * filled
        best = min(best, (_divergence(clipped, coarse), kept))
    clip = bound * best[1] / BINS
    return max(histogram.low, -clip), min(histogram.high, clip)


def _divergence(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) of two unnormalized distributions; infinite where q misses mass of p."""
    if float(p.sum()) <= 0 or float(q.sum()) <= 0:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    # Mass that was clipped into an empty bin has no level of its own: smoothed, as TensorRT does.
    q = q.clamp_min(1e-9)
    return float((p * (p.clamp_min(1e-30) / q).log()).sum())


def limits(histogram: Histogram, clipping: str, symmetric: bool) -> tuple[float, float]:
    """By the name that `Scheme.clipping` has for it."""
    if clipping == "percentile":
        return percentile_limits(histogram)
    if clipping == "mse":
        return mse_limits(histogram, symmetric)
    assert clipping == "entropy"
    return entropy_limits(histogram)
