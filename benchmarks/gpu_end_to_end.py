"""int8 through the public torch.compile on a GPU: correct first, then beside bf16 Inductor.

    python -m benchmarks.gpu_end_to_end --out results.json [--layers 4]

A Llama-3-8B-shaped decoder in plain torch (hidden 4096, intermediate 14336, 32 heads, 8 KV heads, random weights), so
that it needs no model. Every preset is checked against eager fp32 of one layer before anything is timed; timings are
medians of CUDA-graph replays (`mode="reduce-overhead"`), all in one run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8pass
from int8pass.backend import int8

PRESETS = ("default", "w8a8", "w8a8-asymmetric", "w8a16", "llm.int8")
CASES = {"prefill 1x512": (1, 512), "prefill 1x4096": (1, 4096), "decode 16x1": (16, 1), "decode 1x1": (1, 1)}


class Layer(nn.Module):
    """One decoder layer: grouped-query attention and a gated MLP, RMSNorm written by hand."""

    def __init__(self, hidden: int = 4096, inner: int = 14336, heads: int = 32, kv_heads: int = 8) -> None:
        super().__init__()
        self.head = hidden // heads
        self.norm1, self.norm2 = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k, self.v = (nn.Linear(hidden, kv_heads * self.head, bias=False) for _ in range(2))
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)

    @staticmethod
    def norm(x: Tensor, gamma: Tensor) -> Tensor:
        wide = x.float()
        return gamma * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x, self.norm1)
        q, k, v = (f(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        h = self.norm(x, self.norm2)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def build(layers: int, device: str, dtype: torch.dtype) -> nn.Sequential:
    """Random weights of trained size (0.02)."""
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.Sequential(*(Layer() for _ in range(layers))).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1 if parameter.dim() == 1 else 0.02)
    return model.eval().requires_grad_(False)


def compiled(model: nn.Module, preset: str | None, mode: str | None, **options: Any) -> Callable[[Tensor], Tensor]:
    """The model under plain Inductor (`preset` None) or int8."""
    torch._dynamo.reset()
    if preset is None:
        return torch.compile(model, mode=mode, fullgraph=True)
    given = {"recipe": preset, **({"mode": mode} if mode else {}), **options}
    return torch.compile(model, backend=int8, fullgraph=True, options=given)


def correctness(device: str) -> list[dict[str, Any]]:
    """Relative error of one layer against eager fp32, per preset, for several lengths of one compiled model."""
    rows = []
    for preset in PRESETS:
        model = build(1, device, torch.bfloat16)
        wide = build(1, device, torch.float32)
        wide.load_state_dict(model.state_dict())
        function = compiled(model, preset, None)
        report = int8pass.inspect(model, torch.randn(1, 9, 4096, device=device, dtype=torch.bfloat16), recipe=preset)
        for shape in ((1, 33), (1, 64), (3, 17), (1, 1), (16, 1)):
            x = torch.randn(*shape, 4096, device=device)
            x[..., 7] *= 30  # an outlier channel
            with torch.no_grad():
                expected, found = wide(x) - x, (function(x.bfloat16()).float() - x.bfloat16().float())
            error = float((found - expected).norm() / expected.norm())
            rows.append({"preset": preset, "shape": list(shape), "error": error, **report.counts})
        rows[-1]["implementations"] = sorted({i for s in report.sites for i in s.implementations})
    return rows


def milliseconds(function: Callable[[Tensor], Tensor], x: Tensor, repeats: int = 30) -> float:
    """Median over `repeats` calls, timed with events."""
    with torch.no_grad():
        for _ in range(5):
            function(x)
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function(x)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def timings(layers: int, device: str) -> list[dict[str, Any]]:
    """Every case under bf16 Inductor and every preset, with CUDA graphs; and the first-call compile time."""
    rows = []
    for name, (batch, length) in CASES.items():
        x = torch.randn(batch, length, 4096, device=device, dtype=torch.bfloat16)
        row: dict[str, Any] = {"case": name}
        for preset in (None, "default", "w8a8", "w8a16", "llm.int8"):
            model = build(layers, device, torch.bfloat16)
            function = compiled(model, preset, "reduce-overhead")
            begin = time.perf_counter()
            with torch.no_grad():
                function(x)
            torch.cuda.synchronize()
            row[f"{preset or 'bf16'} first call s"] = round(time.perf_counter() - begin, 1)
            row[f"{preset or 'bf16'} ms"] = round(milliseconds(function, x), 3)
            del function, model
            torch.cuda.empty_cache()
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def memory(layers: int, device: str) -> dict[str, float]:
    """Bytes of GPU memory with bf16 weights, and after compiling with free_weights."""
    torch._dynamo.reset()
    gc.collect()
    empty = torch.cuda.memory_allocated()
    model = build(layers, device, torch.bfloat16)
    before = torch.cuda.memory_allocated() - empty
    function = compiled(model, "default", None, free_weights=True)
    with torch.no_grad():
        function(torch.randn(1, 64, 4096, device=device, dtype=torch.bfloat16))
    gc.collect()
    after = torch.cuda.memory_allocated() - empty
    return {"bf16 bytes": before, "int8 bytes": after, "ratio": round(after / before, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=("memory", "correctness", "timings"), help="one part of it")
    arguments = parser.parse_args()
    import triton

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "layers": arguments.layers,
    }
    for key, measure in (
        ("memory", lambda: memory(arguments.layers, arguments.device)),
        ("correctness", lambda: correctness(arguments.device)),
        ("timings", lambda: timings(arguments.layers, arguments.device)),
    ):
        if arguments.only not in (None, key):
            continue
        result[key] = measure()
        print(key, json.dumps(result[key])[:3000], flush=True)
        with open(arguments.out, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
