"""The smallest model with two sites, and its inputs: for tests of `torch.compile(model, backend="int8")`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 32
INT8_WEIGHTS = 3 * 64 * WIDTH  # of Gated


class Gated(nn.Module):
    """The smallest model with a norm, a merge, a product and a residual: two sites, three linears."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, 64), nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def made(model: type[nn.Module] | Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))


def gated() -> tuple[nn.Module, Tensor]:
    return made(Gated), tokens(2, 9)
