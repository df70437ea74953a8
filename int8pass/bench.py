"""Speed of int8 linear layers on a GPU beside 16-bit ones, and the search for the tiles they are fastest with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from int8pass.errors import OptionError, UnsupportedError
from int8pass.measure import Progress

# Linear layers (N, K) of an 8-billion-parameter decoder: merged QKV, output, gate and up, down.
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ROWS = (16, 64, 128, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Speed:
    """One linear: rows, output and input channels; microseconds in int8 and in bf16 (median); what ran."""

    rows: int
    n: int
    k: int
    int8_us: float
    bf16_us: float
    kernel: str


def parse_shapes(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """ "4096x14336" (output × input channels) → (4096, 14336).

    Raises:
        OptionError: a text is not two positive numbers.
    """
    shapes = []
    for text in texts:
        parts = text.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise OptionError(f"--shape {text}: give output and input channels, as in 4096x14336.")
        shapes.append((int(parts[0]), int(parts[1])))
    return tuple(shapes)


def require_gpu(device: torch.device) -> None:
    """Raises UnsupportedError where there is no GPU, or no Triton, to measure."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UnsupportedError("int8pass bench measures the GPU kernels, and this machine has no CUDA device.")
    try:
        import lowering.triton  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(str(error)) from error


def tune(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], device: torch.device, progress: Progress,
    path: Path | None = None,
) -> tuple[int, Path]:  # fmt: skip
    """Search the tiles of these layers and add what beats the rule to the table at `path` (default: the user's cache).

    Returns the number of entries found and the table's path.
    """
    from lowering.triton import tuning

    problems = [tuning.Problem(count, n, k) for n, k in shapes for count in sorted({tuning.bucket(r) for r in rows})]
    name = torch.cuda.get_device_name(device)
    path = path or tuning.cache_folder() / tuning.file_name(name)
    workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    tuning.compile_all(problems, device, workers, lambda done, total: progress("compile tiles", done, total))
    entries = tuning.tune(problems, device, lambda done, total: progress("measure tiles", done, total))
    tuning.save(path, name, entries, problems)
    return len(entries), path


def speeds(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], device: torch.device, progress: Progress
) -> list[Speed]:
    """Every layer at every number of rows, int8 (with the tables in force) and bf16."""
    from lowering.triton import tuning

    found = []
    cases = [(count, n, k) for n, k in shapes for count in rows]
    for done, (count, n, k) in enumerate(cases, 1):
        bench = tuning.Bench(tuning.Problem(count, n, k), device)
        choice = tuning.chosen(device, count, n, k)
        x = torch.randn(count, k, device=device, dtype=torch.bfloat16)
        copies = max(1, -(-3 * tuning.L2_BYTES // (2 * n * k)))
        weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(copies)]
        calls = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights]
        found.append(
            Speed(
                count,
                n,
                k,
                bench.microseconds(choice),
                tuning.replayed(calls),
                "rule" if choice is None else str(choice),
            )
        )
        progress("time layers", done, len(cases))
    return found
