"""The model of the GPU benchmarks and how one case of it is compiled, checked, timed and profiled.

A Llama-3-8B-shaped decoder in plain torch (hidden 4096, intermediate 14336, 32 heads, 8 KV heads, random weights), so
that it needs no model file.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int8pass
from int8pass.backend import int8
from int8pass.recipe import PRESETS, Recipe, SiteSettings

HIDDEN, STATIC_COLUMNS = 4096, 32
CASES = {
    "prefill 1x4096": (1, 4096),
    "prefill 8x512": (8, 512),
    "prefill 1x512": (1, 512),
    "decode 64x1": (64, 1),
    "decode 16x1": (16, 1),
    "decode 1x1": (1, 1),
}


class Layer(nn.Module):
    """One decoder layer: grouped-query attention and a gated MLP, RMSNorm written by hand."""

    def __init__(self, hidden: int = HIDDEN, inner: int = 14336, heads: int = 32, kv_heads: int = 8) -> None:
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


def build(layers: int, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Random weights of trained size (0.02)."""
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.Sequential(*(Layer() for _ in range(layers))).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1 if parameter.dim() == 1 else 0.02)
    return model.eval().requires_grad_(False)


def recipe_of(scheme: str, model: nn.Module, x: Tensor) -> Recipe:
    """A preset; `+search`: without float activations for few rows; `+static`: with `STATIC_COLUMNS` fixed outlier
    columns at every site."""
    name, _, change = scheme.partition("+")
    if change == "search":
        return Recipe(dataclasses.replace(PRESETS[name], one_row="same"))
    if change != "static":
        return Recipe.preset(name)
    base = dataclasses.replace(PRESETS[name], outliers="static")
    sites = int8pass.inspect(model, x, recipe="w8a8").sites
    columns = {s.name: tuple(range(3, s.shape[1], s.shape[1] // STATIC_COLUMNS))[:STATIC_COLUMNS] for s in sites}
    return Recipe(base, sites={name: SiteSettings(columns=chosen) for name, chosen in columns.items()})


def peer(model: nn.Module, scheme: str) -> nn.Module:
    """The same model quantized by torchao (in place), with its dynamic int8 or its row-wise fp8 scheme."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    config = {
        "torchao-int8": Int8DynamicActivationInt8WeightConfig,
        "torchao-fp8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    }[scheme]
    quantize_(model, config())
    return model


def compiled(model: nn.Module, scheme: str, x: Tensor, mode: str | None, **options: Any) -> Callable[[Tensor], Tensor]:
    """The model under plain Inductor (`bf16`), a peer under plain Inductor, or int8."""
    if scheme == "bf16":
        return torch.compile(model, mode=mode, fullgraph=True)
    if scheme.startswith("torchao"):
        return torch.compile(peer(copy.deepcopy(model), scheme), mode=mode, fullgraph=True)
    given = {"recipe": recipe_of(scheme, model, x), **({"mode": mode} if mode else {}), **options}
    return torch.compile(model, backend=int8, fullgraph=True, options=given)


def tokens(case: str, device: str) -> Tensor:
    """The input of a case: hidden states with one outlier channel."""
    x = torch.randn(*CASES[case], HIDDEN, device=device)
    x[..., 7] *= 30
    return x.bfloat16()


def milliseconds(function: Callable[[Tensor], Tensor], x: Tensor, repeats: int = 40, wait: bool = False) -> float:
    """Median over `repeats` calls, timed with events: calls in a row, as a server makes them; or with `wait` each one
    alone on an idle device, so that the time the host takes to start it counts."""
    events = []
    with torch.no_grad():
        for _ in range(5):
            function(x)
        torch.cuda.synchronize()
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function(x)
            end.record()
            if wait:
                end.synchronize()
            events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def kernels(function: Callable[[Tensor], Tensor], x: Tensor) -> list[dict[str, Any]]:
    """Every kernel of one call in order: name, microseconds, idle microseconds of the device before it.

    One that starts while another runs, and waits for it, has the time after that one's end.
    """
    from torch.profiler import ProfilerActivity, profile

    from int8pass.inspect.profiled import own_times

    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            function(x)
            torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted(events, key=lambda e: e.time_range.start)
    events = events[-(len(events) // 3) :]  # of the last call
    rows, last = [], None
    times = own_times([(e.time_range.start, e.time_range.end) for e in events])
    for event, us in zip(events, times, strict=True):
        start, end = event.time_range.start, event.time_range.end
        idle = 0.0 if last is None else max(0.0, start - last)
        rows.append({"name": event.name[:90], "us": round(us, 2), "idle": round(idle, 2)})
        last = end if last is None else max(last, end)
    return rows


def one_case(
    case: str, scheme: str, layers: int, device: str, wait: Callable[[], None], profile: bool
) -> dict[str, Any]:
    """Compile (before `wait`), then check, time and profile one case."""
    x = tokens(case, device)
    model = build(layers, device)
    function = compiled(model, scheme, x, "reduce-overhead")
    begin = time.perf_counter()
    with torch.no_grad():
        function(x)
    torch.cuda.synchronize()
    row: dict[str, Any] = {"case": case, "scheme": scheme, "first call s": round(time.perf_counter() - begin, 1)}
    with torch.no_grad():
        for _ in range(3):
            function(x)
    torch.cuda.synchronize()
    wait()
    row["ms"] = round(milliseconds(function, x), 4)
    row["latency ms"] = round(milliseconds(function, x, wait=True), 4)
    if profile:
        row["kernels"] = kernels(function, x)
    fresh = tokens(case, device)  # other values than at capture time, in another place
    with torch.no_grad():
        found = function(fresh).float() - fresh.float()
    expected = _eager(model, fresh)
    row["error"] = float((found - expected).norm() / expected.norm())
    return row


def _eager(model: nn.Module, x: Tensor) -> Tensor:
    """What the layers add to `x`, in fp32, one widened layer at a time."""
    y = x.float()
    with torch.no_grad():
        for layer in model.children():
            with torch.device(x.device):
                wide = Layer()
            wide.load_state_dict(layer.state_dict())
            y = wide(y)
            del wide
    gc.collect()
    return y - x.float()


def memory(layers: int, device: str) -> dict[str, float]:
    """Bytes of GPU memory with bf16 weights and after compiling with `free_weights`; and what a prefill of 4096 tokens
    needs beyond the weights at its peak, under bf16 Inductor and under int8."""
    result: dict[str, float] = {}
    x = tokens("prefill 1x4096", device)
    empty = torch.cuda.memory_allocated()
    model = build(layers, device)
    result["bf16 bytes"] = torch.cuda.memory_allocated() - empty
    for scheme, options in (("bf16", {}), ("w8a8", {"free_weights": True})):
        torch._dynamo.reset()
        function = compiled(model, scheme, x, None, **options)
        with torch.no_grad():
            function(x)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            function(x)
        result[f"{scheme} peak activation bytes"] = torch.cuda.max_memory_allocated() - before
        result["int8 bytes"] = before - empty
    result["ratio"] = round(result["int8 bytes"] / result["bf16 bytes"], 4)
    return result
