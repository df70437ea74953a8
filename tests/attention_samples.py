"""Arguments of `attention` that its own samples leave out: what the kernel for few queries takes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lowering.registry import Sample, random_tensor


def samples(device: torch.device) -> Iterator[Sample]:
    """Few queries: keys of one program and of several, masks, views of a merged projection.

    Not what PyTorch's own kernels fail on or give wrong results for: no batch, masks of another dtype or with one
    value for all keys. Our kernel takes them (test_few_queries.py).
    """
    for label, (b, h, g, t, s, d, e), dtype in [
        ("one_key", (3, 4, 2, 1, 1, 64, 64), torch.bfloat16),
        ("one_query", (1, 6, 2, 1, 37, 80, 48), torch.float16),
        ("parts", (1, 4, 1, 3, 600, 16, 24), torch.bfloat16),
        ("no_keys_shared", (2, 2, 2, 17, 270, 8, 8), torch.bfloat16),
    ]:
        sizes = ((b, h, t, d), (b, g, s, d), (b, g, s, e))
        q, k, v = (random_tensor(*n, device=device, dtype=dtype, seed=i) for i, n in enumerate(sizes))
        given = (q, k, v)
        yield Sample(label, (*given, None, False, d**-0.5))
        yield Sample(f"{label}-causal", (*given, None, True, 0.3))
        for i, shape in enumerate([(1, s), (b, 1, 1, s), (1, h, t, s)]):
            seen = random_tensor(*shape, device=device, seed=3) > -0.5
            seen[..., 0] = True
            yield Sample(f"{label}-seen{i}", (*given, seen, False, d**-0.5))
        added = torch.where(seen, random_tensor(1, h, t, s, device=device, seed=4), -math.inf)
        yield Sample(f"{label}-added", (*given, added.to(dtype).mT.contiguous().mT, False, d**-0.5))
    merged = random_tensor(2, 3, 4 * 16 + 2 * 32, device=device, dtype=torch.bfloat16)
    q, k, v = (x.unflatten(-1, (-1, 16)).transpose(1, 2) for x in merged.split([64, 32, 32], -1))
    yield Sample("merged", (q, k, v, None, True, 0.25))
    yield Sample("strided", (q[..., ::2], k[..., ::2], v.mT.contiguous().mT, None, False, 0.25))
    yield Sample("expanded", (q, k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1), None, False, 0.25))
    yield Sample("large_scores", (q * 100, k * 100, v, None, False, 1.0))
