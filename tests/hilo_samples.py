"""Hard samples of the linears that read codes in two planes (`lowering.ops.hilo`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lowering.ops.hilo import linear_arguments
from lowering.registry import Sample, random_tensor


def linear_samples(device: torch.device) -> Iterator[Sample]:
    """Of `linear_w8a8_hilo`: odd sizes, many blocks, strided rows; on a GPU enough tiles for every kernel."""
    index = 0
    for m in (0, 1, 17, 123):
        for n, k in [(2, 7), (8, 123), (124, 1), (124, 123), (40, 96)]:
            dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
            x = random_tensor(m, k, device=device)
            if m and index % 4:
                x[m // 2, k // 2] = 200.0
            yield Sample(f"{m}x{n}x{k}", linear_arguments(x, n, dtype, symmetric=index % 2 == 0, threshold=2.0))
            index += 1
    # At most 32 blocks of columns: from 4097 channels on they are wider. Nothing but outliers in one row.
    x = random_tensor(40, 4500, device=device)
    x[7] = 150.0
    yield Sample("deep", linear_arguments(x, 24, torch.bfloat16, symmetric=False, threshold=6.0))
    # Blocks of several steps each, of which the last ends with the row; the sign bit among the marks.
    for label, k, at in [
        ("last_block", 4160, [(3, 4150), (4, 5), (4, 4100), (0, 700)]),
        ("sign_bit", 4096, [(2, 4000)]),
    ]:
        x = random_tensor(7, k, device=device)
        for row, column in at:
            x[row, column] = 150.0
        yield Sample(label, linear_arguments(x, 24, torch.float32, symmetric=True, threshold=6.0))
    x = random_tensor(6, 96, device=device)
    args = linear_arguments(x, 24, torch.float32, symmetric=False, threshold=2.0)
    yield Sample("strided_rows", tuple(a[::2] if i < 5 else a for i, a in enumerate(args)))
    x = random_tensor(6, 300, device=device).clamp(-2, 2)
    x[4, 140] = 200.0  # one row of those kept, and none of those next to them
    args = linear_arguments(x, 24, torch.float32, symmetric=True, threshold=6.0)
    yield Sample("strided_blocks", tuple(a[::2] if i < 5 and a is not None else a for i, a in enumerate(args)))
    if device.type != "cuda":
        return
    for label, (m, n, k), symmetric, loud in [
        ("even", (2048, 4096, 512), True, 0),
        ("ragged", (1999, 4640, 528), False, 3),
        ("deep_large", (2100, 4128, 8256), False, 40),
        ("shallow", (4100, 2080, 16), True, 1),
        ("narrow", (513, 4096, 1040), True, 5),
        ("all", (1030, 4096, 1024), False, -1),
        ("few-even", (64, 4096, 4096), True, 2),
        ("few-ragged", (17, 4640, 528), False, 3),
        ("few-wide", (64, 27664, 1040), False, 4),  # three pieces, and less for the last program
        ("few-deep", (33, 4096, 8256), True, 12),  # blocks of several steps
        ("few-all", (40, 6160, 1024), False, -1),
        ("few-one", (1, 4640, 528), True, 2),
        ("few-two_pieces", (48, 4096, 8256), True, 12),
    ]:
        x = random_tensor(m, k, device=device).clamp(-5, 5)
        generator = torch.Generator().manual_seed(m)
        for _ in range(loud):  # some tiles have outliers, in some blocks, and some have none
            row, column = (int(torch.randint(0, size, (1,), generator=generator)) for size in (m, k))
            x[row, column] = 300.0
        if loud < 0:
            x *= 50.0
        yield Sample(label, linear_arguments(x, n, torch.bfloat16, symmetric, threshold=6.0))
