"""What calibration remembers of a site: O(channels), streaming, mergeable; no activation is kept.

One massive token (arXiv 2402.17762) must not decide alone: the smoothing of all other tokens would suffer for it. So
beside the extremes, which a static range may need, there are sums and a histogram of magnitudes per channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from int8pass.errors import CalibrationError

# Magnitudes from 2^-12 to 2^12 in quarters of an octave; what is beyond goes into the first or last bin. A bin is the
# exponent and the first two bits of the mantissa of a float32.
BINS, LOWEST = 96, -12
_SHIFT, _FIRST = 21, (127 + LOWEST) << 2
DECAY = 0.9  # of the moving averages, per batch
ROBUST = 99.5  # percent of the tokens that decide: in 512, two massive ones do not


class ChannelStatistics:
    """Statistics of a site's input `x[..., K]`, per channel, in fp64 and int64.

    `merge` gives what one process would have found on all data: extremes and counts bit for bit, in any order; sums up
    to fp64 rounding; moving averages as of the other's batches after this one's.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        def full(value: float) -> Tensor:
            return torch.full((width,), value, dtype=torch.float64, device=device)

        self.width = width
        self.low, self.high = full(torch.inf), full(-torch.inf)
        self.energy, self.magnitude = full(0.0), full(0.0)
        """Σ x² and Σ |x| over tokens."""
        self.counts = torch.zeros(width, BINS, dtype=torch.int64, device=device)
        self.moving_low, self.moving_high, self.moving_weight = full(0.0), full(0.0), 0.0
        self.tokens = self.batches = 0
        self.finite = True

    def update(self, rows: Tensor) -> None:
        """Add the tokens `rows[T, K]` of one batch."""
        if rows.shape[0] == 0:
            return
        rows = rows.detach().float()
        low, high = rows.amin(0).double(), rows.amax(0).double()
        self.finite = self.finite and bool(torch.isfinite(low).all() and torch.isfinite(high).all())
        if not self.finite:
            return
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.energy += rows.square().sum(0, dtype=torch.float64)
        self.magnitude += rows.abs().sum(0, dtype=torch.float64)
        self.counts += _histogram(rows)
        self.moving_low = DECAY * self.moving_low + (1 - DECAY) * low
        self.moving_high = DECAY * self.moving_high + (1 - DECAY) * high
        self.moving_weight = DECAY * self.moving_weight + 1 - DECAY
        self.tokens += rows.shape[0]
        self.batches += 1

    def merge(self, other: ChannelStatistics) -> None:
        """Add what another process found on other batches.

        Raises:
            CalibrationError: it is of another width.
        """
        if other.width != self.width:
            raise CalibrationError(f"statistics of {other.width} channels cannot be merged into {self.width}")
        device = self.low.device
        self.low = torch.minimum(self.low, other.low.to(device))
        self.high = torch.maximum(self.high, other.high.to(device))
        self.energy += other.energy.to(device)
        self.magnitude += other.magnitude.to(device)
        self.counts += other.counts.to(device)
        kept = DECAY**other.batches
        self.moving_low = kept * self.moving_low + other.moving_low.to(device)
        self.moving_high = kept * self.moving_high + other.moving_high.to(device)
        self.moving_weight = kept * self.moving_weight + other.moving_weight
        self.tokens += other.tokens
        self.batches += other.batches
        self.finite = self.finite and other.finite

    @property
    def absmax(self) -> Tensor:
        """max |x| [K]."""
        return torch.maximum(-self.low, self.high)

    @property
    def rms(self) -> Tensor:
        """Root mean square [K], with magnitudes above the robust percentile counted as that percentile."""
        bound = self.percentile()
        edges = _edges().to(bound.device)
        centres = torch.minimum(0.9 * edges, bound[:, None])  # 0.9: the middle of a bin, to a few percent
        robust = (self.counts * centres.square()).sum(1)
        return (torch.minimum(robust, self.energy) / max(self.tokens, 1)).sqrt()

    @property
    def mean(self) -> Tensor:
        """Mean of |x| [K]."""
        return self.magnitude / max(self.tokens, 1)

    def percentile(self, percent: float = ROBUST) -> Tensor:
        """The magnitude [K] that `percent` of the tokens do not exceed, to a quarter of an octave upwards."""
        needed = torch.ceil(torch.tensor(percent / 100 * self.tokens, dtype=torch.float64)).to(torch.int64)
        index = (self.counts.cumsum(1) < needed.to(self.counts.device)).sum(1)
        edge = _edges().to(index.device)[index.clamp_max(BINS - 1)]
        return torch.where(index >= BINS - 1, self.absmax, torch.minimum(edge, self.absmax))

    def of(self, statistic: str) -> Tensor:
        """By the name that `Scheme.statistic` has for it."""
        if statistic == "percentile":
            return self.percentile()
        return {"absmax": self.absmax, "rms": self.rms, "mean": self.mean}[statistic]

    def limits(self, s: Tensor, columns: tuple[int, ...], moving_average: bool = False) -> tuple[float, float]:
        """(low, high) of `x / s` without `columns`, over all tokens or as a moving average over batches."""
        low, high = self.low, self.high
        if moving_average:
            low, high = self.moving_low / self.moving_weight, self.moving_high / self.moving_weight
        if len(set(columns)) == self.width:
            return (0.0, 0.0)
        low, high = low / s.to(low), high / s.to(high)
        low[list(columns)], high[list(columns)] = torch.inf, -torch.inf
        least, most = torch.stack([low.min(), high.max()]).tolist()
        return least, most

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers, for another process."""
        return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in vars(self).items()}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> ChannelStatistics:
        """The statistics that `state` wrote."""
        made = ChannelStatistics(int(state["width"]))
        vars(made).update(state)
        return made


def _edges() -> Tensor:
    """The upper end of every bin, fp64 [BINS]."""
    index = torch.arange(1, BINS + 1)
    return torch.exp2((index // 4 + LOWEST).double()) * (1 + (index % 4).double() / 4)


def _histogram(rows: Tensor) -> Tensor:
    """Tokens per channel and magnitude bin, int64 [K, BINS]."""
    width = rows.shape[1]
    bins = ((rows.abs().view(torch.int32) >> _SHIFT) - _FIRST).clamp_(0, BINS - 1)
    bins += torch.arange(width, device=rows.device, dtype=torch.int32) * BINS
    return torch.bincount(bins.flatten(), minlength=width * BINS).view(width, BINS)
