"""What calibration remembers of a site: O(channels), streaming, no activation is kept."""

from __future__ import annotations

import torch
from torch import Tensor


class ChannelScores:
    """How much each channel of a site's input costs the others, as Σ over tokens of (x / ‖x‖)⁴.

    The int8 step of a token is set by its largest entries, so a channel matters by how far it stands out *within its
    token*. The fourth power picks those that do; dividing by the token's norm keeps one massive token (a BOS spike of
    a thousand times the others, arXiv 2402.17762) from deciding alone.
    """

    def __init__(self) -> None:
        self.scores: Tensor | None = None
        self.tokens = 0
        self.finite = True

    def update(self, x: Tensor) -> None:
        """Add the tokens of `x[..., K]`."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if rows.shape[0] == 0:
            return
        unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        # fp64: sums over many tokens of values that differ by many orders of magnitude.
        scores = unit.double().pow(4).sum(0)
        self.finite = self.finite and bool(torch.isfinite(rows).all())
        self.scores = scores if self.scores is None else self.scores + scores
        self.tokens += rows.shape[0]

    def largest(self, count: int) -> tuple[int, ...]:
        """The `count` channels of highest score, in ascending order of index."""
        assert self.scores is not None
        chosen = torch.topk(self.scores, min(count, self.scores.numel())).indices
        return tuple(sorted(int(c) for c in chosen))
