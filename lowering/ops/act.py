"""Activation products (gated MLPs) fused with the quantization of their result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lowering.ops.norm import _quantize
from lowering.registry import Sample, Tolerance, op, random_tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def _act_mul_samples(device: torch.device) -> Iterator[Sample]:
    for name in ACTIVATIONS:
        gate = random_tensor(3, 123, device=device)
        yield Sample(f"{name}-sym", (gate, random_tensor(3, 123, device=device, seed=1), name, None, True))
    both = random_tensor(2, 5, 2 * 192, device=device, dtype=torch.bfloat16)
    gate, up = both.chunk(2, -1)  # views with a row stride of 2K: what a merged gate/up linear gives
    columns = torch.tensor([1, 7], device=device)
    yield Sample("silu-affine-split-strided", (gate, up, "silu", columns, False))


@op(samples=_act_mul_samples, tolerance=Tolerance(codes=1, rtol=1e-2, atol=1e-5))
def act_mul_quantize(
    gate: Tensor, up: Tensor, act: str, columns: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize(act(gate) * up)` of `[..., K]` → codes, scale, zero point, outliers `[..., R]`.

    `act` is a key of `ACTIVATIONS`. Without `columns`, R = 0.
    """
    return _quantize(ACTIVATIONS[act](gate) * up, columns, symmetric)
