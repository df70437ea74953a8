"""What calibration remembers of a site: O(channels), streaming, no activation is kept."""

from __future__ import annotations

import torch
from torch import Tensor


class ChannelStatistics:
    """Energy of every channel of a site's input, and the largest weight that reads it.

    `energy[j]` = Σ over tokens of x_j², in fp64: what a channel costs when its step grows, and what rounding its weight
    column costs. Sums over tokens, not maxima: one massive token (arXiv 2402.17762) must not decide alone.
    """

    def __init__(self) -> None:
        self.energy: Tensor | None = None
        self.weight_absmax: Tensor | None = None
        self.tokens = 0
        self.finite = True

    def update(self, x: Tensor) -> None:
        """Add the tokens of `x[..., K]`."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.shape[0] == 0:
            return
        energy = rows.double().square().sum(0)
        self.finite = self.finite and bool(torch.isfinite(energy).all())
        self.energy = energy if self.energy is None else self.energy + energy
        self.tokens += rows.shape[0]

    def reads(self, weight: Tensor) -> None:
        """Take a weight `[N, K]` of the site into account."""
        absmax = weight.detach().float().abs().amax(0).double()
        self.weight_absmax = absmax if self.weight_absmax is None else torch.maximum(self.weight_absmax, absmax)

    def largest(self, count: int) -> tuple[int, ...]:
        """The `count` channels of most energy, in ascending order of index."""
        assert self.energy is not None
        chosen = torch.topk(self.energy, min(count, self.energy.numel())).indices
        return tuple(sorted(int(c) for c in chosen))

    def exponents(self) -> tuple[float, ...]:
        """log2 of s_j = (rms(X_j) / max|W_j|)^(1/2), relative to its median, in steps of 1/8.

        SmoothQuant's vector (arXiv 2211.10438, equation 4, α = 1/2) with the root mean square in the place of the
        maximum. A channel that is never active, or that no weight reads, stays as it is.
        """
        assert self.energy is not None
        assert self.weight_absmax is not None
        active = (self.energy > 0) & (self.weight_absmax > 0)
        if not bool(active.any()):
            return (0.0,) * self.energy.numel()
        ratio = (self.energy / self.tokens).sqrt() / self.weight_absmax.to(self.energy.device)
        logs = torch.where(active, ratio, torch.ones_like(ratio)).log2() / 2
        centred = torch.where(active, logs - logs[active].median(), torch.zeros_like(logs))
        return tuple(float(e) / 8 for e in (8 * centred).round().clamp(-128, 128))
