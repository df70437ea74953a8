"""Second-order rounding of int8 weights (GPTQ, arXiv 2210.17323). Pure functions on arrays."""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.numerics import INT8_MAX

BLOCK = 128


def hessian(x: Tensor) -> Tensor:
    """`2 · Σ x xᵀ / (‖x‖² + median ‖x‖²)` of tokens `x[T, K]`: fp32 [K, K]. Sums over batches add up.

    Weighed, because one massive token would decide the rounding for all the others.
    """
    x = x.float()
    energy = x.square().sum(1)
    x = x * (energy + energy.median()).clamp_min(1e-30).rsqrt()[:, None]
    return 2.0 * (x.t() @ x)


def gptq(weight: Tensor, scale: Tensor, second: Tensor, group: int | None = None, damping: float = 0.01) -> Tensor:
    """Codes int8 [N, K] for `weight[N, K]` that minimize `‖(W - Q)x‖²` greedily, column by column.

    The columns of most energy come first (GPTQ's "act-order"): their own rounding is what costs most, and what comes
    early has most columns left to make up for it. It matters most after smoothing, where a few columns set the scales.

    Args:
        weight: fp32; columns of zeros get code 0.
        scale: [N], or [N, ceil(K / group)] with `group` columns a scale: given, and not changed.
        second: the Hessian [K, K] of the layer's inputs.
        damping: added to its diagonal, as a fraction of the mean.

    The rounding error of a column is spread over the columns not rounded yet by the inverse Hessian's Cholesky factor.
    """
    n, k = weight.shape
    order = second.diagonal().argsort(descending=True, stable=True)
    work, spread = weight.detach().float()[:, order], _per_column(scale, k, group)[:, order]
    second = second[order][:, order]
    factor = _inverse_factor(second, work, damping)
    codes = torch.zeros(n, k, dtype=torch.int8, device=weight.device)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.zeros(n, stop - start, device=weight.device)
        for j in range(start, stop):
            column, step = work[:, j], spread[:, j]
            code = torch.round(column / step).clamp(-INT8_MAX, INT8_MAX)
            codes[:, j] = code.to(torch.int8)
            error = (column - code * step) / factor[j, j]
            work[:, j:stop] -= error[:, None] * factor[j, j:stop][None]
            errors[:, j - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    codes = codes[:, order.argsort()]
    codes[:, (weight == 0).all(0)] = 0
    return codes


def _per_column(scale: Tensor, k: int, group: int | None) -> Tensor:
    if group is None:
        return scale.float().reshape(-1, 1).expand(-1, k)
    return scale.float().repeat_interleave(group, 1)[:, :k]


def _inverse_factor(second: Tensor, weight: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse Hessian; inputs that are never active, and columns of zeros, decouple."""
    second = second.double().clone()
    idle = (second.diagonal() <= 0) | (weight == 0).all(0)
    second[idle], second[:, idle] = 0.0, 0.0
    diagonal = second.diagonal()
    mean = float(diagonal[~idle].mean()) if bool((~idle).any()) else 1.0
    diagonal.add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
    return torch.linalg.cholesky(inverse, upper=True).float()
