"""Attention: not quantized, but between the quantized linears of every block, and as long as they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lowering.registry import Sample, Tolerance, op, random_tensor


def _samples(device: torch.device) -> Iterator[Sample]:
    # batch, heads, heads of keys, queries, keys, channels, channels of values
    for label, shape, dtype, mask, causal in [
        ("f32", (2, 4, 2, 33, 47, 64, 64), torch.float32, None, False),
        ("causal-bf16", (1, 3, 1, 100, 100, 64, 64), torch.bfloat16, None, True),
        ("bool-mask-bf16", (2, 2, 2, 40, 70, 32, 48), torch.bfloat16, torch.bool, False),
        ("float-mask-bf16", (1, 4, 2, 17, 600, 80, 80), torch.bfloat16, torch.bfloat16, False),
        ("f16", (1, 2, 2, 20, 20, 16, 16), torch.float16, None, True),
    ]:
        b, h, g, t, s, d, e = shape
        query = random_tensor(b, h, t, d, device=device, dtype=dtype)
        key = random_tensor(b, g, s, d, device=device, dtype=dtype, seed=1)
        value = random_tensor(b, g, s, e, device=device, dtype=dtype, seed=2)
        seen = random_tensor(b, 1, t, s, device=device, seed=3) > -0.5 if mask else None
        if mask is not None and mask.is_floating_point:
            seen = torch.where(seen, 0.25, float("-inf")).to(mask)  # type: ignore[arg-type]
        yield Sample(label, (query, key, value, seen, causal, d**-0.5))


@op(samples=_samples, tolerance=Tolerance(rtol=1e-2, atol=2e-3))
def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`softmax(Q Kᵀ · scale + mask) V` (arXiv 1706.03762, section 3.2.1) → [B, H, T, E].

    Q [B, H, T, D], K [B, G, S, D], V [B, G, S, E]. H is a multiple of G: consecutive heads share keys and values
    (arXiv 2305.13245). `mask` broadcasts to [B, H, T, S]: bool, true where a key is seen, or floats that are added;
    `causal` shows query t the keys up to t. A query that sees no key is 0. Nothing but the mask is broadcast.
    What hidden keys hold, counts for nothing; where it is NaN or infinite, implementations may differ.
    """
    shared = query.shape[1] // key.shape[1]
    if shared != 1:
        key, value = (
            x[:, :, None].expand(-1, -1, shared, -1, -1).reshape(x.shape[0], query.shape[1], *x.shape[2:])
            for x in (key, value)
        )
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale)
