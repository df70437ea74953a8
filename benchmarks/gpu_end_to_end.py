"""int8 through the public torch.compile on a GPU: every case correct first, then beside bf16 Inductor.

    python -m benchmarks.gpu_end_to_end --out results.json [--layers 4] [--cases decode] [--schemes w8a8] [--profile]

Every (case, scheme) compiles in a process of its own, several at once; then they are checked and timed one after the
other while the rest wait, so that all rows come from one run. Times are medians of CUDA-graph replays
(`mode="reduce-overhead"`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

SCHEMES = ("bf16", "default", "w8a8", "llm.int8", "w8a8+static", "torchao-fp8", "torchao-int8")


class Child:
    """One (case, scheme) in its own process: compiles at once, measures when told."""

    def __init__(self, case: str, scheme: str, arguments: argparse.Namespace, **environment: str) -> None:
        self.case, self.scheme = case, scheme
        command = [sys.executable, "-m", "benchmarks.gpu_end_to_end", "--out", "-", "--layers", str(arguments.layers)]
        command += ["--child", case, scheme, *(["--profile"] if arguments.profile else [])]
        # A pipe that nobody reads would stop a child that has much to say.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the child)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **environment},
        )

        self.patience = threading.Timer(arguments.patience, self.process.kill)
        self.patience.start()

    def ready(self) -> bool:
        """Wait until it has compiled; False when it failed, or took too long and was ended."""
        assert self.process.stdout is not None
        found = any(line.strip() == "READY" for line in self.process.stdout)
        self.patience.cancel()
        return found

    def measure(self) -> dict[str, Any]:
        """Its row; or what went wrong."""
        if self.process.poll() is not None:  # failed before it was ready
            return self.failure()
        out, _ = self.process.communicate("GO\n")
        if self.process.returncode != 0:
            return self.failure()
        row = json.loads(out.strip().splitlines()[-1])
        assert isinstance(row, dict)
        return row

    def failure(self) -> dict[str, Any]:
        """The end of what it wrote to stderr."""
        self.errors.seek(0)
        return {"case": self.case, "scheme": self.scheme, "failed": self.errors.read()[-1500:] or "ended"}


def child(case: str, scheme: str, layers: int, profile: bool) -> None:
    """The other side of `Child`."""
    from benchmarks.gpu_model import one_case

    def wait() -> None:
        print("READY", flush=True)
        sys.stdin.readline()

    print(json.dumps(one_case(case, scheme, layers, "cuda", wait, profile)))


def timings(arguments: argparse.Namespace, batch: int = 15) -> list[dict[str, Any]]:
    """Every case under every scheme, `batch` processes compiling at a time."""
    from benchmarks.gpu_model import CASES

    pairs = [
        (case, scheme)
        for case in CASES
        if not arguments.cases or any(part in case for part in arguments.cases)
        for scheme in arguments.schemes
    ]
    rows = []
    for start in range(0, len(pairs), batch):
        children = [Child(case, scheme, arguments) for case, scheme in pairs[start : start + batch]]
        for one in children:
            one.ready()
        for one in children:
            rows.append(one.measure())
            with open(arguments.out + ".part", "w") as file:
                json.dump({"timings": rows}, file)
            print({k: v for k, v in rows[-1].items() if k != "kernels"}, flush=True)
    return rows


def compile_times(arguments: argparse.Namespace, case: str = "prefill 1x512") -> dict[str, Any]:
    """Seconds of the first call of one case, nothing else running and nothing cached on disk."""
    seconds = {}
    for scheme in ("bf16", "w8a8"):
        with tempfile.TemporaryDirectory() as folder:
            one = Child(
                case,
                scheme,
                arguments,
                TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor",
                TRITON_CACHE_DIR=f"{folder}/triton",
            )
            one.ready()
            seconds[scheme] = one.measure().get("first call s")
    return {"case": case, "first call s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--cases", nargs="*", help="parts of names of cases (default: all)")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--profile", action="store_true", help="record every kernel of one call")
    parser.add_argument("--memory", action="store_true", help="measure weight memory and peak activation memory too")
    parser.add_argument("--patience", type=float, default=120, help="seconds that one case may compile for")
    parser.add_argument("--compile-time", action="store_true", help="measure first calls alone, from empty caches")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child, arguments.layers, arguments.profile)
        return
    import torch
    import triton

    begin = time.perf_counter()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "torchao": importlib.metadata.version("torchao") if importlib.util.find_spec("torchao") else None,
        "layers": arguments.layers,
        "timings": timings(arguments),
    }
    if arguments.compile_time:
        result["compile"] = compile_times(arguments)
        print(result["compile"], flush=True)
    if arguments.memory:
        from benchmarks.gpu_model import memory

        result["memory"] = memory(arguments.layers, "cuda")
        print(result["memory"], flush=True)
    result["seconds"] = round(time.perf_counter() - begin)
    with open(arguments.out, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
