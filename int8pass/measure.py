"""Measure a causal language model in two compiled forms side by side: quality, speed, memory, compile time.

Used by the command line, the examples and the benchmarks. Units: seconds, bytes, tokens per second. Nothing here
prints; long functions report to a `Progress`.

Two graphs per form serve everything, because compiling is what takes longest: one for `[1, length]` tokens (prefill
and perplexity) and one for a single token (decode). Both run over a static key/value cache, as `generate()` does.
"""

from __future__ import annotations

import functools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

import int8pass

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all), with 0 done when it begins."""

LENGTH = 512
"""Tokens of a prefill, and of a perplexity window."""


@dataclass(frozen=True)
class Measurement:
    """One form of the model, measured."""

    name: str
    perplexity: float
    prefill_tokens_per_s: float  # batch 1, `LENGTH` tokens, logits of the last ones
    decode_tokens_per_s: float  # batch 1, greedy, static cache
    linear_weight_bytes: int  # weights of all linears but the output head, with scales and outlier columns
    compile_s: float  # first calls of both graphs (weights quantized in them), less the time of a later call
    continuation: str  # greedy, of the prompt


@dataclass(frozen=True)
class Comparison:
    """A model in its original dtype and in int8, measured in one run on one machine."""

    model: str
    device: str
    dtype: str
    torch: str
    threads: int
    windows: int
    tokens: int
    prompt: str
    original: Measurement
    int8: Measurement
    report: int8pass.Report  # what became of every linear

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Form:
    """A model compiled by one backend (`None`: not compiled), with the static cache it runs on.

    The model itself is shared: two forms of one model differ in their graphs alone.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        backend: str | Callable[..., Any] | None,
        *,
        cache_length: int,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.device = next(model.parameters()).device
        self._call = _compiled(model, backend, mode, options)
        self._cache = _static_cache(model, cache_length)

    def reset(self) -> None:
        """Forget all tokens."""
        self._cache.reset()

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Logits `[1, len(keep), vocabulary]` at the positions `keep` of `ids` `[1, T]`, after the tokens so far."""
        torch.compiler.cudagraph_mark_step_begin()  # what the last call returned may be overwritten
        with torch.no_grad():
            output = self._call(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=keep)
        return output.logits

    def prefill(self, ids: Tensor, keep: Tensor) -> Tensor:
        """`forward` on an empty cache; `keep` may differ in length from call to call without a new graph."""
        torch._dynamo.maybe_mark_dynamic(keep, 0)
        self.reset()
        return self.forward(ids, keep)

    def synchronize(self) -> None:
        """Wait until the device is done, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compare(
    model: nn.Module,
    tokenizer: Any,
    windows: Tensor,
    *,
    name: str = "",
    tokens: int = 32,
    prompt: str = "Gravity is",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    int8_backend: str | Callable[..., Any] = "int8",
    rounds: int = 3,
    progress: Progress = lambda *_: None,
) -> Comparison:
    """Everything `int8pass run` shows: `model` by plain Inductor and by `backend="int8"`, in alternation.

    `windows` int64 `[count, LENGTH]` is the text for perplexity, `tokens` the length of the greedy continuation,
    `options` go to the int8 backend, and of `rounds` timings the median is kept.
    """
    parameter = next(model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    windows = windows.to(parameter.device)
    prompt_ids = torch.tensor(tokenizer(prompt)["input_ids"], device=parameter.device)
    cache_length = max(windows.shape[1], len(prompt_ids) + tokens + 1)
    progress("inspect", 0, 1)
    report = int8pass.inspect(model, {"input_ids": windows[:1]}, **_recipe_of(options))
    progress("inspect", 1, 1)
    forms = [
        Form(dtype, model, "inductor", cache_length=cache_length, mode=mode),
        Form("int8", model, int8_backend, cache_length=cache_length, mode=mode, options=options),
    ]
    first_calls = compile_forms(forms, windows[:1], progress)
    prefills = time_prefill(forms, windows[:1], rounds, progress)
    decodes, continuations = time_decode(forms, prompt_ids, tokens, rounds, progress)
    weight_bytes = [linear_weight_bytes(model), packed_weight_bytes(model, report)]
    original, quantized = (
        Measurement(
            name=form.name,
            perplexity=perplexity(form, windows, progress),
            prefill_tokens_per_s=windows.shape[1] / prefills[i],
            decode_tokens_per_s=1 / decodes[i],
            linear_weight_bytes=weight_bytes[i],
            compile_s=max(0.0, first_calls[i] - prefills[i] - decodes[i]),
            continuation=tokenizer.decode(continuations[i], skip_special_tokens=True),
        )
        for i, form in enumerate(forms)
    )
    return Comparison(
        model=name,
        device=device_name(parameter.device),
        dtype=dtype,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        windows=len(windows),
        tokens=tokens,
        prompt=prompt,
        original=original,
        int8=quantized,
        report=report,
    )


def compile_forms(forms: Sequence[Form], ids: Tensor, progress: Progress = lambda *_: None) -> list[float]:
    """Seconds of the first calls of each form's two graphs, each with empty compile caches.

    All prefill graphs come first: once Dynamo has seen two lengths of one model it makes the length symbolic, and the
    form compiled last would get another graph than the first.
    """
    seconds = [0.0] * len(forms)
    progress("warm up the compiler", 0, 1)
    _warm_up_inductor(ids.device)
    progress("warm up the compiler", 1, 1)
    for what, call in (("prefill", _prefill_call), ("decode", _decode_call)):
        for i, form in enumerate(forms):
            title = f"compile {what}, {form.name}"
            progress(title, 0, 1)
            with cold_compile():
                seconds[i] += _seconds(form, functools.partial(call, form, ids))
            progress(title, 1, 1)
    return seconds


def perplexity(form: Form, windows: Tensor, progress: Progress = lambda *_: None) -> float:
    """exp of the mean negative log likelihood of each window's tokens but its first; `windows` int64 `[count, T]`."""
    title, loss = f"perplexity, {form.name}", 0.0
    keep = torch.arange(windows.shape[1] - 1, device=windows.device)
    progress(title, 0, len(windows))
    for done, window in enumerate(windows, 1):
        logits = form.prefill(window[None], keep)[0]
        loss += F.cross_entropy(logits.float(), window[1:], reduction="sum").item()
        progress(title, done, len(windows))
    return math.exp(loss / (len(windows) * (windows.shape[1] - 1)))


def time_prefill(forms: Sequence[Form], ids: Tensor, rounds: int, progress: Progress = lambda *_: None) -> list[float]:
    """Median seconds of a prefill of `ids` `[1, T]`, the forms in alternation."""

    def once(form: Form) -> float:
        form.reset()
        return _seconds(form, lambda: _prefill_call(form, ids))

    return _interleaved(forms, once, rounds, f"prefill {ids.shape[1]} tokens", progress)


def time_decode(
    forms: Sequence[Form], prompt: Tensor, tokens: int, rounds: int, progress: Progress = lambda *_: None
) -> tuple[list[float], list[list[int]]]:
    """Median seconds per greedy token of each form, the forms in alternation, and each form's continuation."""
    continuations: dict[str, list[int]] = {}

    def once(form: Form) -> float:
        continuations[form.name], seconds = greedy(form, prompt, tokens)
        return seconds / tokens

    seconds = _interleaved(forms, once, rounds, f"decode {tokens} tokens", progress)
    return seconds, [continuations[form.name] for form in forms]


def greedy(form: Form, prompt: Tensor, tokens: int) -> tuple[list[int], float]:
    """The greedy continuation of `prompt` `[T]` and the seconds of its `tokens` decoding steps.

    The prompt is fed token by token: a graph for its length would take longer to compile than this takes to run.
    """
    keep = torch.zeros(1, dtype=torch.int64, device=form.device)
    form.reset()
    for token in prompt:
        logits = form.forward(token.view(1, 1), keep)
    made = [logits[:, -1].argmax(-1, keepdim=True)]
    form.synchronize()
    begin = time.perf_counter()
    for _ in range(tokens):
        made.append(form.forward(made[-1], keep)[:, -1].argmax(-1, keepdim=True))
    form.synchronize()
    seconds = time.perf_counter() - begin
    return [int(token) for token in made[:tokens]], seconds


@contextmanager
def cold_compile() -> Iterator[None]:
    """Inductor's caches empty and apart: a compile time must not depend on what was compiled earlier."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


def linear_weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights of all linears but the output head, as they are now; shared weights count once."""
    return _bytes(_linear_weights(model).values())


def packed_weight_bytes(model: nn.Module, report: int8pass.Report) -> int:
    """The same once `free_weights` has released what int8 replaces: int8 weights, scales and outlier columns, and the
    weights of the linears that `report` (of `int8pass.inspect`) says were not taken, as they were."""
    refused = {refused.linear.removesuffix(".weight") for refused in report.refused}
    kept = [weight for name, weight in _linear_weights(model).items() if name in refused]
    return int8pass.packed_bytes(model) + _bytes(kept)


def device_name(device: torch.device) -> str:
    """What a reader of a table needs to know about the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def output_head(model: Any) -> nn.Module | None:
    """The linear that makes logits, in models that have one."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Module name → weight of all linears but the output head. `named_modules` names a shared module once."""
    head = output_head(model)
    # GPT-2's Conv1D is a linear that keeps its weight transposed; `nf` is its number of outputs.
    return {
        name: module.weight
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or hasattr(module, "nf")) and module is not head
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


def _compiled(
    model: nn.Module, backend: str | Callable[..., Any] | None, mode: str | None, options: dict[str, Any] | None
) -> Callable[..., Any]:
    if backend is None:
        return model
    if mode is None or options is None:
        return torch.compile(model, backend=backend, mode=mode, options=options)
    # torch.compile takes a mode or options; a backend takes both
    function: Callable[..., Any] = lookup_backend(backend) if isinstance(backend, str) else backend
    return torch.compile(model, backend=functools.partial(function, mode=mode, options=options))


def _static_cache(model: nn.Module, length: int) -> Any:
    """An empty cache for `length` tokens whose buffers exist already: making them in a compiled call costs a graph."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    cache.reset()
    return cache


def _prefill_call(form: Form, ids: Tensor) -> None:
    # Two positions, not one: Dynamo takes a size of one for a constant, and perplexity asks this graph for many.
    form.prefill(ids, torch.arange(ids.shape[1] - 2, ids.shape[1], device=ids.device))


def _decode_call(form: Form, ids: Tensor) -> None:
    form.reset()
    # reshape and not ids[:, :1], whose outer stride is another than an argmax's and costs a graph
    form.forward(ids.flatten()[:1].view(1, 1), torch.zeros(1, dtype=torch.int64, device=ids.device))


def _seconds(form: Form, call: Callable[[], object]) -> float:
    form.synchronize()
    begin = time.perf_counter()
    call()
    form.synchronize()
    return time.perf_counter() - begin


def _interleaved(
    forms: Sequence[Form], once: Callable[[Form], float], rounds: int, title: str, progress: Progress
) -> list[float]:
    """Median of `rounds` calls of `once` for each form after one that is not counted; A B A B, so that a slow spell
    of a shared machine meets all forms alike."""
    seconds: list[list[float]] = [[] for _ in forms]
    progress(title, 0, rounds + 1)
    for done in range(rounds + 1):
        for i, form in enumerate(forms):
            seconds[i].append(once(form))
        progress(title, done + 1, rounds + 1)
    return [statistics.median(of_form[1:]) for of_form in seconds]


def _warm_up_inductor(device: torch.device) -> None:
    """The first compilation of a process imports modules and builds a header; that belongs to no model."""
    with torch.no_grad():
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))


def _recipe_of(options: dict[str, Any] | None) -> dict[str, Any]:
    return {"recipe": options["recipe"]} if options and "recipe" in options else {}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
