"""What an inspection costs: time, memory, size of the page, time until it can be used, and whether it accounts for all.

    python -m benchmarks.inspect_report                     # every part, each in a process of its own
    python -m benchmarks.inspect_report --only structure

`structure`: SmolLM2 without data. `data`: on two windows of 64 tokens, with all that is measured. `page`: the
report of the last of these in headless Chromium. `meta`: the shape of Llama-3-8B, 32 layers, without weights.
`architectures`: linears of tiny random models, taken or with a reason, against `nn.Linear` modules and weights read.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path("benchmarks/results/inspect_report.json")
REPORT = Path(tempfile.gettempdir()) / "int8pass-inspect-report.html"
ARCHITECTURES = (
    "llama", "mistral", "qwen3", "gemma3", "phi3", "gpt2", "opt", "bloom", "falcon", "bert", "t5", "bart", "vit",
    "swin", "mixtral", "deepseek_v3",
)  # fmt: skip


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _smollm2(count: int) -> dict[str, Any]:
    import int8pass
    from int8pass import hub
    from int8pass.inspect.running import return_large_blocks

    return_large_blocks()  # as the command does
    model, tokenizer = hub.load("smollm2")
    model.config.use_cache = False
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    windows = hub.windows(tokenizer, 64)
    before, start, cpu = _peak(), time.perf_counter(), time.process_time()
    data = [{"input_ids": w[None]} for w in windows[100 : 100 + count]]
    phases: dict[str, Any] = {}

    def progress(title: str, done: int, total: int) -> None:
        if done == total:
            phases[title] = {"peak / model": round(_peak() / size, 2), "cpu s": round(time.process_time() - cpu, 1)}
            print(title, phases[title], flush=True)

    report = int8pass.inspect(model, {"input_ids": windows[:1]}, data=data, progress=progress)
    seconds, spent = time.perf_counter() - start, time.process_time() - cpu
    found: dict[str, Any] = {"seconds": round(seconds, 1), "cpu seconds": round(spent, 1), **report.counts}
    found["until the end of"] = phases
    if report.runtime:
        found["what ran"] = report.runtime_note
    found |= {"model bytes": size, "peak bytes": _peak(), "peak / model": round(_peak() / size, 2)}
    found["peak before inspecting, bytes"] = before
    if report.output_sqnr is not None:
        found["output dB"] = report.output_sqnr
    report.save(REPORT)
    found["report.html bytes"] = REPORT.stat().st_size
    return found


def structure() -> dict[str, Any]:
    """SmolLM2 without data."""
    return _smollm2(0)


def data() -> dict[str, Any]:
    """SmolLM2 on two windows of 64 tokens."""
    return _smollm2(2)


def page() -> dict[str, Any]:
    """Until the first tab can be used, and until the graph is drawn; medians of five loads."""
    import shutil
    import statistics

    from playwright.sync_api import sync_playwright

    ready, graph = [], []
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        for _ in range(5):
            shown = browser.new_page()
            shown.goto(REPORT.as_uri())
            shown.wait_for_selector("html[data-ready]")
            ready.append(int(shown.evaluate("document.documentElement.dataset.ready")))
            script = "() => { const t = performance.now(); openTab('graph'); return performance.now() - t; }"
            graph.append(shown.evaluate(script))
            shown.close()
        version = browser.version
        browser.close()
    return {
        "chromium": version, "report.html bytes": REPORT.stat().st_size,
        "interactive ms": statistics.median(ready), "graph drawn ms": round(statistics.median(graph)),
    }  # fmt: skip


def meta() -> dict[str, Any]:
    """Llama-3-8B's shape on the meta device."""
    import torch
    import transformers

    import int8pass

    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.zeros(1, 64, dtype=torch.int64)
    start, cpu = time.perf_counter(), time.process_time()
    report = int8pass.inspect(model, {"input_ids": ids})
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": round(seconds, 1), "cpu seconds": round(cpu, 1), "peak bytes": _peak(), **report.counts}


def architectures() -> dict[str, Any]:
    """Per architecture: linears taken, refused (each with a reason), and modules that no row names."""
    sys.path.insert(0, "tests")
    import torch
    from architectures import build

    import int8pass
    from int8pass.inspect.accounting import linears_of

    found = {}
    for name in ARCHITECTURES:
        torch._dynamo.reset()  # all transformers models run through one function, whose graphs would be made dynamic
        model, inputs = build(name)
        try:
            report = int8pass.inspect(model, inputs)
        except int8pass.errors.CaptureError as failure:
            found[name] = {"failed": str(failure).splitlines()[0]}
            continue
        named = {linear for site in report.sites for linear in site.linears} | {r.linear for r in report.refused}
        missing = [n for n, _ in linears_of(model) if n not in named]
        without = [r.linear for r in report.refused if not r.reason]
        found[name] = {**report.counts, "modules not named": missing, "without reason": without}
    return found


PARTS = {"structure": structure, "data": data, "page": page, "meta": meta, "architectures": architectures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part, in this process")
    arguments = parser.parse_args()
    if arguments.only is None:
        for name in PARTS:
            subprocess.run([sys.executable, "-m", "benchmarks.inspect_report", "--only", name], check=True)
        return
    import torch

    from int8pass import measure

    found = {**PARTS[arguments.only](), "device": measure.device_name(torch.device("cpu")), "torch": torch.__version__}
    found |= {"threads": torch.get_num_threads(), "load before": round(os.getloadavg()[1], 1)}
    report = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    report[arguments.only] = found
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({arguments.only: found}, indent=1))


if __name__ == "__main__":
    main()
