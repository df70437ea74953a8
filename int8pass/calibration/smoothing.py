"""Smoothing vectors from statistics: SmoothQuant's rule and AWQ's. Pure functions on arrays."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

STEPS = 8  # per octave: exponents are kept in eighths, which no measurement could tell from exact ones
LARGEST = 16


def exponents(activation: Tensor, weight: Tensor, alpha: float, beta: float | None = None) -> Tensor:
    """log2 of s_j = activation_j^α / weight_j^β, relative to its median, in steps of 1/8: fp64 [K].

    With β = 1 - α (the default) and maxima, SmoothQuant's vector (arXiv 2211.10438, equation 4). A channel that is
    never active, or that no weight reads, stays as it is.
    """
    activation, weight = activation.double(), weight.double().to(activation.device)
    active = (activation > 0) & (weight > 0)
    if not bool(active.any()):
        return torch.zeros_like(activation)
    one = torch.ones_like(activation)
    logs = alpha * torch.where(active, activation, one).log2()
    logs -= (1 - alpha if beta is None else beta) * torch.where(active, weight, one).log2()
    centred = torch.where(active, logs - logs[active].median(), torch.zeros_like(logs))
    return (STEPS * centred).round().clamp(-STEPS * LARGEST, STEPS * LARGEST) / STEPS


def outlier_exponents(absmax: Tensor, fraction: float) -> Tensor:
    """log2 of s_j = max(1, absmax_j / t), t being a fraction of the largest absmax, in steps of 1/8: fp64 [K].

    Only the channels that set a tensor's range are touched, and all others leave their weights alone (Outlier
    Suppression+, arXiv 2304.09145, section 4.2).
    """
    absmax = absmax.double()
    t = (fraction * absmax.max()).clamp_min(1e-30)
    return (STEPS * (absmax / t).clamp_min(1.0).log2()).ceil().clamp_max(STEPS * LARGEST) / STEPS


def grouped(values: Tensor, channels: tuple[int, ...] | None) -> Tensor:
    """Exponents [K] made equal where the same producer channel makes the inputs (grouped-query heads): the largest."""
    if channels is None or len(set(channels)) == len(channels):
        return values
    index = torch.tensor(channels, device=values.device)
    size = int(index.max()) + 1
    largest = torch.full((size,), -torch.inf, dtype=values.dtype, device=values.device)
    return largest.scatter_reduce(0, index, values, "amax")[index]


def column_absmax(weights: Iterable[Tensor]) -> Tensor:
    """max over all readers and outputs of |W[n, j]|: fp64 [K]."""
    return torch.stack([w.detach().float().abs().amax(0) for w in weights]).amax(0).double()


def column_mean(weights: Iterable[Tensor]) -> Tensor:
    """Mean over all readers and outputs of |W[n, j]|, each row relative to its absmax (as AWQ has it): fp64 [K]."""
    rows = torch.cat([w.detach().float().abs() for w in weights])
    return (rows / rows.amax(1, keepdim=True).clamp_min(1e-12)).mean(0).double()
