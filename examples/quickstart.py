"""int8 in one line, and what it does: a transformer's MLP block in plain torch."""

import torch
from torch import nn

import int8pass  # for inspect alone: torch.compile finds the backend by itself


class Block(nn.Module):
    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


model, x = Block().eval(), torch.randn(1, 64, 512)
fast = torch.compile(model, backend="int8")
with torch.no_grad():
    error = (fast(x) - model(x)).norm() / model(x).norm()
print(f"relative error of int8: {error:.4f}")
print(int8pass.inspect(model, (x,)))
