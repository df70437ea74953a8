r"""Every Triton implementation on a few small samples, for NVIDIA's compute-sanitizer.

    python -m benchmarks.gpu_sanitize                   # compiles the kernels, which is slow under the sanitizer
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --launch-timeout 120 --target-processes application-only --tool memcheck --error-exitcode 9 \
        python -m benchmarks.gpu_sanitize [--part 1/4] [--only wgmma]

Without caching every tensor is an allocation of its own, so that an access beyond it is seen. Samples of odd sizes, and
for the persistent kernel one that fills it and is ragged in every dimension.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import kernel_checks
from torch.nn.attention import SDPBackend, sdpa_kernel

import lowering.triton  # noqa: F401  (attaches the implementations)
from lowering.registry import all_ops

CUDA = torch.device("cuda")
HARD = (
    "hard-17x7",
    "hard-bf16_7x123",
    "hard-many_rows",
    "hard-no_rows",
    "hard-123x7x123",
    "hard-ragged",
    "hard-few-",
    "hard-code_outliers",
    "hard-last_block",
    "hard-one_query",
    "hard-parts",
)


def runs() -> list[tuple[Any, Any, str, tuple[Any, ...]]]:
    """(op, implementation, label, arguments) of all that can run here."""
    found = []
    for op in all_ops().values():
        samples = [(s.label, s.args) for s in [*op.samples(CUDA)][:4]]
        hard = [(f"hard-{s.label}", s.args) for s in kernel_checks.hard_samples(op.name, CUDA)]
        samples += [(label, args) for label, args in hard if label.startswith(HARD)]
        for implementation in [i for i in op.implementations if i.target == "triton"]:
            found += [(op, implementation, *s) for s in samples if implementation.refuses(s[1]) is None]
    return found


def main() -> int:
    """Run them; returns how many gave a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="1/1", help="k/n: every n-th run from the k-th on, to share them out")
    parser.add_argument("--only", default="", help="parts of names of implementations, by commas (default: all)")
    given = parser.parse_args()
    first, parts = (int(number) for number in given.part.split("/"))
    wanted = [r for r in runs() if any(name in f"{r[0].name} {r[1].name}" for name in given.only.split(","))]
    wrong, begin, chosen = 0, time.perf_counter(), wanted[first - 1 :: parts]
    if not 1 <= first <= parts or not chosen:
        parser.error(f"--part {given.part} --only {given.only!r} leaves nothing to run")
    for count, (op, implementation, label, args) in enumerate(chosen, 1):
        try:
            with sdpa_kernel(SDPBackend.MATH):  # cuDNN's kernel reads a few bytes beyond a mask of odd length
                kernel_checks.verify(op, args, implementation.function(*args))
        except AssertionError as error:
            wrong += 1
            print("WRONG", implementation.name, label, str(error).splitlines()[0])
        if count % 10 == 0 or count == len(chosen):
            print(f"{count} of {len(chosen)} runs, {wrong} wrong, {time.perf_counter() - begin:.0f} s", flush=True)
    torch.cuda.synchronize()
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main()))
