"""Every Triton implementation on a few small samples, for NVIDIA's compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 9 python -m benchmarks.gpu_sanitize

Without caching every tensor is an allocation of its own, so that an access beyond it is seen. Samples of odd sizes, and
for the persistent kernel one that fills it and is ragged in every dimension.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import kernel_checks

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
    "hard-code_outliers",
)


def main() -> int:
    """Run them; returns how many gave a wrong result."""
    wrong = count = 0
    for op in all_ops().values():
        samples = [(s.label, s.args) for s in [*op.samples(CUDA)][:4]]
        hard = [(f"hard-{s.label}", s.args) for s in kernel_checks.hard_samples(op.name, CUDA)]
        samples += [(label, args) for label, args in hard if label.startswith(HARD)]
        for implementation in [i for i in op.implementations if i.target == "triton"]:
            for label, args in samples:
                if implementation.refuses(args) is not None:
                    continue
                count += 1
                try:
                    kernel_checks.verify(op, args, implementation.function(*args))
                except AssertionError as error:
                    wrong += 1
                    print("WRONG", implementation.name, label, str(error).splitlines()[0])
    torch.cuda.synchronize()
    print(f"{count} runs, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main()))
