"""Quality, memory, speed and compile time on this machine's CPU, with SmolLM2-135M.

    make bench                      # everything, about 15 minutes on two cores
    python -m benchmarks --only quality

Quality: perplexity over 16 windows of 512 tokens in fp32, in the data-free default, on the stress variant (six channels
of every norm times 40, the columns that read them divided by it: exact in real arithmetic), and with calibrated outlier
columns. Speed: the decoder without its head, 512 tokens and one token, interleaved medians of all forms in one run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import int8pass
from int8pass import hub, measure

WINDOWS = 16
CALIBRATION = slice(100, 132)


def divergence(call: Callable[..., Any], original: Callable[..., Any], windows: Tensor, title: str) -> float:
    """Mean KL divergence of predictions from the original's, in nats; steadier than a ratio of perplexities."""
    total = 0.0
    with torch.no_grad():
        for window in tqdm(windows, desc=title):
            logs = [f(input_ids=window[None]).logits[0, :-1].float().log_softmax(-1) for f in (call, original)]
            total += F.kl_div(*logs, reduction="batchmean", log_target=True).item()
    return total / len(windows)


def perplexity(call: Callable[..., Any], windows: Tensor, title: str) -> float:
    """exp of the mean negative log likelihood of every token but the first of each window `[count, T]`."""
    loss = 0.0
    with torch.no_grad():
        for window in tqdm(windows, desc=title):
            logits = call(input_ids=window[None]).logits[0, :-1]
            loss += F.cross_entropy(logits.float(), window[1:], reduction="sum").item()
    return math.exp(loss / (len(windows) * (windows.shape[1] - 1)))


def stress(model: Any, channels: int = 6, factor: float = 40.0) -> None:
    """Plant the outliers of large models, in place: gamma of both norms of every block up, their readers down."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                chosen = torch.randperm(norm.weight.numel(), generator=generator)[:channels]
                norm.weight[chosen] *= factor
                for reader in readers:
                    reader.weight[:, chosen] /= factor


def quality() -> dict[str, Any]:
    """Perplexities, their ratios to fp32, and the memory of the packed weights."""
    model, tokenizer = hub.load("smollm2", dtype=torch.float32, device="cpu")
    model.config.use_cache = False
    windows = hub.windows(tokenizer, size=512)
    evaluation = windows[:WINDOWS]
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    result: dict[str, Any] = {"windows": WINDOWS, "fp32": perplexity(model, evaluation, "fp32")}

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    result["default"] = perplexity(compiled, evaluation, "default")
    linear_bytes = measure.linear_weight_bytes(model)
    result["linear weight bytes, fp32"] = linear_bytes
    result["linear weight bytes, int8"] = int8pass.packed_bytes(model)
    result["memory ratio to fp32"] = result["linear weight bytes, int8"] / linear_bytes
    result["memory ratio to bf16"] = 2 * result["memory ratio to fp32"]
    stress(model)
    result["stress fp32, 2 windows"] = perplexity(model, evaluation[:2], "stress, fp32")
    # The same compiled graph: written weights are packed anew.
    result["stress default"] = perplexity(compiled, evaluation, "stress, default")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(original[name])
    result["plain fp32, 2 windows"] = perplexity(model, evaluation[:2], "fp32, restored")

    for name in ("default", "stress default"):
        result[f"{name} ratio"] = result[name] / result["fp32"]
    return result


def calibrated() -> dict[str, Any]:
    """Perplexity with outlier columns and smoothing from 32 windows that the evaluation does not see."""
    model, tokenizer = hub.load("smollm2", dtype=torch.float32, device="cpu")
    model.config.use_cache = False
    windows = hub.windows(tokenizer, size=512)
    evaluation = windows[:WINDOWS]
    result: dict[str, Any] = {"windows": WINDOWS, "fp32": perplexity(model, evaluation, "fp32")}
    torch._dynamo.reset()
    recipe = int8pass.calibrate(model, [{"input_ids": w[None]} for w in windows[CALIBRATION]])
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"recipe": recipe})
    result["outlier-columns"] = perplexity(compiled, evaluation, "outlier-columns")
    result["outlier-columns ratio"] = result["outlier-columns"] / result["fp32"]
    result["outlier-columns KL, mnat"] = 1e3 * divergence(compiled, model, evaluation[:4], "KL, 4 windows")
    return result


def speed() -> dict[str, Any]:
    """Milliseconds of the decoder without head and seconds of first calls, the int8 form made from the bf16 model."""
    result: dict[str, Any] = {}
    forms = [("fp32 inductor", torch.float32, "inductor"), ("bf16 eager", torch.bfloat16, None)]
    forms += [("bf16 inductor", torch.bfloat16, "inductor"), ("int8 (bf16)", torch.bfloat16, "int8")]
    models = {dtype: _decoder(dtype) for dtype in (torch.float32, torch.bfloat16)}
    torch._dynamo.reset()
    torch.compile(lambda x: x + 1)(torch.ones(2))  # the compiler's own start
    for case, length in (("prefill 512", 512), ("decode 1", 1)):
        ids = torch.randint(0, 40000, (1, length), generator=torch.Generator().manual_seed(0))
        calls: dict[str, Callable[[], Any]] = {}
        for name, dtype, backend in forms:
            function = models[dtype] if backend is None else torch.compile(models[dtype], backend=backend)
            calls[name] = _frozen_call(function, ids, result, f"{case}, {name}", backend is not None)
        for name, milliseconds in _interleaved(calls, 6, 3 if length > 1 else 32).items():
            result[f"{case}, {name} ms"] = round(milliseconds, 2)
    return result


def profile() -> dict[str, Any]:
    """Where the time of the same calls goes: milliseconds a call in every operator, and in what Inductor generates."""
    result: dict[str, Any] = {}
    model = _decoder(torch.bfloat16)
    for case, length in (("prefill 512", 512), ("decode 1", 1)):
        ids = torch.randint(0, 40000, (1, length), generator=torch.Generator().manual_seed(0))
        for name in ("inductor", "int8"):
            torch._dynamo.reset()
            function = torch.compile(model, backend=name)
            with torch.no_grad():
                for _ in range(3):
                    function(input_ids=ids)
                calls = 6 if length > 1 else 40
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as p:
                    for _ in range(calls):
                        function(input_ids=ids)
            result[f"{case}, bf16 {name}, ms by operator"] = _by_operator(p.events(), calls)
    return result


def _by_operator(events: Any, calls: int) -> dict[str, float]:
    """Operators with their weight's shape → milliseconds a call, from the median of each; the rest is left out."""
    times: dict[str, list[float]] = {}
    for event in events:
        shapes = [s for s in event.input_shapes if len(s) > 1]
        if event.name.startswith("## Call"):
            title = "kernels and calls of Inductor's"
        elif "linear" in event.name or event.name in {"aten::mm", "aten::addmm"}:
            title = f"{event.name} {'x'.join(map(str, next((s for s in shapes[1:] if len(s) == 2), [])))}"
        else:
            title = event.name
        times.setdefault(title, []).append(event.self_cpu_time_total)
    totals = {title: statistics.median(found) * len(found) / calls / 1e3 for title, found in times.items()}
    return {title: round(ms, 2) for title, ms in sorted(totals.items(), key=lambda item: -item[1]) if ms > 0.3}


def _decoder(dtype: torch.dtype) -> nn.Module:
    model, _ = hub.load("smollm2", dtype=dtype, device="cpu")
    model.config.use_cache = False
    return model.model


def _frozen_call(
    function: Callable[..., Any], ids: Tensor, result: dict[str, Any], name: str, compiled: bool
) -> Callable[[], Any]:
    with torch.no_grad(), measure.cold_compile():
        begin = time.perf_counter()
        function(input_ids=ids)
        if compiled:
            result[f"{name} first call s"] = round(time.perf_counter() - begin, 1)

    def call() -> Any:
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
            return function(input_ids=ids)

    return call


def _interleaved(calls: dict[str, Callable[[], Any]], rounds: int, burst: int) -> dict[str, float]:
    """Median milliseconds of every call, in alternating bursts of one form: a model is called again and again, too.

    The first call of a burst does not count: it finds the last cache full of another form's weights.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(rounds), desc="timing"):
        for name, call in calls.items():
            for i in range(burst + 1):
                begin = time.perf_counter()
                call()
                if i:
                    times[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}
