"""Every Triton implementation against its op's reference on the GPU at hand, and rough speeds.

    python -m benchmarks.gpu_correctness [OUT.json]

All samples of all ops and the hard shapes of the kernel tests, in poisoned memory; then linear layers, row kernels and
attention of few queries at the sizes of a Llama-3-8B, each checked before it is timed. Times are medians over replays
of a CUDA graph; what is read rotates through more memory than the L2 cache holds.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import platform
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import kernel_checks

import lowering.triton  # noqa: F401  (attaches the implementations)
from lowering import numerics
from lowering.registry import Implementation, Op, all_ops, random_tensor
from lowering.triton.attention import MOST_KEYS_ALONE

CUDA = torch.device("cuda")
NK = [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)]
ROWS = [1, 16, 64, 512, 4096, 8192]
L2_BYTES = 50 * 2**20


def microseconds(calls: list[Callable[[], Any]], replays: int = 15) -> float:
    """Median time of one call: all of `calls` captured in one CUDA graph, replayed."""
    repeat = max(1, 8 // len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (repeat * len(calls)))
    return round(statistics.median(times), 2)


def check(op: Op, implementation: Implementation, args: tuple[Any, ...]) -> tuple[float | None, str | None]:
    """(error, None), or (None, why it failed)."""
    try:
        with kernel_checks.poisoned_memory():
            got = implementation.function(*args)
        return kernel_checks.verify(op, args, got), None
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:300]


WORKERS = 14


def correctness() -> list[dict[str, Any]]:
    """One record per op × Triton implementation × sample. Nearly all of the time is compilation: many processes."""
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(correctness_part, range(WORKERS)))
    return sorted(itertools.chain(*parts), key=lambda r: (r["op"], r["implementation"], r["sample"]))


def correctness_part(part: int) -> list[dict[str, Any]]:
    """Every `WORKERS`-th record."""
    records, index = [], 0
    for op in all_ops().values():
        samples = [(s.label, s.args) for s in op.samples(CUDA)]
        samples += [(f"hard-{s.label}", s.args) for s in kernel_checks.hard_samples(op.name, CUDA)]
        for implementation in [i for i in op.implementations if i.target == "triton"]:
            for label, args in samples:
                if implementation.refuses(args) is not None:
                    continue
                index += 1
                if index % WORKERS != part:
                    continue
                error, failure = check(op, implementation, args)
                record = {"op": op.name, "implementation": implementation.name, "sample": label, "error": error}
                record["passed"] = failure is None
                if failure is not None:
                    record["failure"] = failure
                records.append(record)
    return records


def linear_speed() -> list[dict[str, Any]]:
    """W8A8 and W8A16 at the layers of a Llama-3-8B, bf16 out, beside the same layer in bf16 (cuBLAS)."""
    records = []
    w8a8, w8a16 = all_ops()["linear_w8a8"], all_ops()["linear_w8a16"]
    for n, k in NK:
        copies = max(1, -(-3 * L2_BYTES // (n * k)))
        w = [random_tensor(n, k, device=CUDA, seed=i) for i in range(copies)]
        quantized = [numerics.quantize_weight(v) for v in w]
        dense = [v.bfloat16() for v in w]
        del w
        for m in ROWS:
            x = random_tensor(m, k, device=CUDA, dtype=torch.bfloat16, seed=7)
            codes, scale = numerics.quantize_symmetric(x)
            a8 = [(codes, scale, None, q, s, None, None, None, None, None, torch.bfloat16) for q, s in quantized]
            a16 = [(x, q, s, None) for q, s in quantized]
            record: dict[str, Any] = {"m": m, "n": n, "k": k}
            for name, op, args in [("w8a8", w8a8, a8), ("w8a16", w8a16, a16)]:
                implementation = op.choose("triton", args[0])
                error, failure = check(op, implementation, args[0])
                assert failure is None, f"{name} {record}: {failure}"
                us = microseconds([lambda f=implementation.function, a=a: f(*a) for a in args])
                record[name] = {"us": us, "error": error, **_rates(m, n, k, us, 1)}
            us = microseconds([lambda x=x, d=d: torch.nn.functional.linear(x, d) for d in dense])
            record["bf16"] = {"us": us, **_rates(m, n, k, us, 2)}
            records.append(record)
    return records


def _rates(m: int, n: int, k: int, us: float, weight_bytes: int) -> dict[str, float]:
    return {
        "tflops": round(2 * m * n * k / us / 1e6, 1),
        "weight_gb_per_s": round(n * k * weight_bytes / us / 1e3, 1),
    }


def row_speed() -> list[dict[str, Any]]:
    """Row kernels on 4096 tokens and on one, bf16; rates count each byte of input and output once."""
    records = []
    ops = all_ops()
    for m in (1, 16, 512, 4096):
        x = random_tensor(m, 4096, device=CUDA, dtype=torch.bfloat16)
        r = random_tensor(m, 4096, device=CUDA, dtype=torch.bfloat16, seed=1)
        gate, up = random_tensor(m, 2 * 14336, device=CUDA, dtype=torch.bfloat16).chunk(2, -1)
        gamma, columns = r[0].clone(), torch.arange(0, 4096, 128, device=CUDA)
        token = 4096
        for name, args, size in [
            ("quantize_per_token", (x, True), 3 * token),
            ("split_quantize", (x, columns, True), 3 * token),
            ("split_quantize_dynamic", (x, 64, 6.0, True), 5 * token),
            ("quantize_hilo", (x, 6.0, True), 4 * token),
            ("rms_norm", (x, gamma, 1e-5, 0.0, True), 4 * token),
            ("norm_quantize", (x, gamma, None, 1e-5, 0.0, "rms_round_first", None, True), 3 * token),
            ("add_norm_quantize", (x, r, gamma, None, 1e-5, 0.0, "rms_round_first", None, True), 7 * token),
            ("add_norm_quantize_dynamic", (x, r, gamma, None, 1e-5, 0.0, "rms_round_first", 64, 6.0, True), 9 * token),
            ("add_norm_quantize_hilo", (x, r, gamma, None, 1e-5, 0.0, "rms_round_first", 6.0, True), 8 * token),
            ("act_mul_quantize", (gate, up, "silu", None, True), 5 * 14336),
            ("act_mul_quantize_dynamic", (gate, up, "silu", 64, 0.0, True), 9 * 14336),
            ("act_mul_quantize_hilo", (gate, up, "silu", 6.0, True), 6 * 14336),
        ]:
            op = ops[name]
            implementation = op.choose("triton", args)
            error, failure = check(op, implementation, args)
            assert failure is None, f"{name}: {failure}"
            us = microseconds([lambda f=implementation.function, a=args: f(*a)])
            records.append({"op": name, "m": m, "us": us, "error": error, "gb_per_s": round(m * size / us / 1e3, 1)})
    return records


ATTENTION = [  # batch, heads, heads of keys, queries, keys, channels
    *[(batch, 32, 8, 1, keys, 128) for batch in (1, 16, 64) for keys in (1, 128, 1024, 4096)],
    (1, 32, 8, 1, 16384, 128),
    (16, 32, 32, 1, 1024, 128),
    (16, 9, 3, 1, 1024, 64),
    (16, 32, 8, 4, 1024, 128),
    (1, 32, 8, 16, 4096, 128),
    (8, 12, 12, 64, 64, 64),
    (8, 12, 12, 64, 512, 64),
    (8, 12, 12, 64, 4096, 64),
    (8, 12, 12, 32, 4096, 64),
]


def attention_speed() -> list[dict[str, Any]]:
    """The kernel for few queries beside what takes its place without it: bf16, with and without a mask of keys."""
    records = []
    op = all_ops()["attention"]
    for b, h, g, t, s, d in ATTENTION:
        copies = max(1, min(24, -(-3 * L2_BYTES // (4 * b * g * s * d))))
        sizes = ((b, h, t, d), (b, g, s, d), (b, g, s, d))
        given = [tuple(torch.randn(n, device=CUDA, dtype=torch.bfloat16) for n in sizes) for _ in range(copies)]
        record: dict[str, Any] = {"batch": b, "heads": h, "key heads": g, "queries": t, "keys": s, "channels": d}
        for name, mask in [("plain", None), ("masked", torch.rand(b, 1, 1, s, device=CUDA) > 0.2)]:
            calls = [(*qkv, mask, False, d**-0.5) for qkv in given]
            ours = op.choose("triton", calls[0])
            alone = h == g and mask is None and s > MOST_KEYS_ALONE  # PyTorch's kernels are as fast
            assert (ours.name == "triton:attention_few_queries") != alone, record
            if alone:
                continue
            instead = next(i for i in op.implementations if i is not ours and i.refuses(calls[0]) is None)
            error, failure = check(op, ours, calls[0])
            assert failure is None, f"{name} {record}: {failure}"
            times = [microseconds([lambda f=i.function, a=a: f(*a) for a in calls]) for i in (ours, instead)]
            record[name] = {"us": times[0], "instead us": times[1], "instead": instead.name, "error": error}
        records.append(record)
    return records


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured", file=sys.stderr)
        return 2
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/gpu_correctness.json")
    results = correctness()
    passed = sum(r["passed"] for r in results)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "passed": passed,
        "total": len(results),
        "max_error_by_op": {
            name: max((r["error"] or 0.0 for r in results if r["op"] == name), default=None) for name in all_ops()
        },
        "samples": results,
    }
    print(f"{report['device']}: {passed} of {len(results)} pass")
    for r in results:
        if not r["passed"]:
            print("FAILED", r["op"], r["sample"], r["failure"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    if "--correctness" in sys.argv:
        return 0 if passed == len(results) else 1
    report["linear"] = linear_speed()
    report["rows"] = row_speed()
    report["attention"] = attention_speed()
    for r in report["linear"]:
        rates = "  ".join(
            f"{kind} {r[kind]['us']:8.1f} us {r[kind]['tflops']:7.1f} T {r[kind]['weight_gb_per_s']:7.1f} GB/s"
            for kind in ("w8a8", "w8a16", "bf16")
        )
        print(f"M={r['m']:<5} N={r['n']:<6} K={r['k']:<6} {rates}")
    for r in report["rows"]:
        print(f"M={r['m']:<5} {r['op']:<24} {r['us']:8.1f} us {r['gb_per_s']:7.1f} GB/s")
    for r in report["attention"]:
        shape = " x ".join(str(r[name]) for name in ("batch", "heads", "key heads", "queries", "keys", "channels"))
        rates = "  ".join(
            f"{k} {r[k]['us']:7.1f} us for {r[k]['instead us']:7.1f}" for k in ("plain", "masked") if k in r
        )
        print(f"{shape:<32} {rates}")
    out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
