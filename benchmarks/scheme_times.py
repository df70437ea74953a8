"""What schemes cost when they run: SmolLM2-135M in bf16, calibrated and compiled, in alternation with plain `w8a8`.

    python -m benchmarks.scheme_times                  # about a quarter of an hour on two cores
    python -m benchmarks.scheme_times --device cuda    # with CUDA graphs

Medians of a prefill and of a greedy decoding step, and their ratio to `w8a8`. A device has one entry in the file: a run
replaces its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import int8pass
from benchmarks.accuracy import LENGTH, Bars, progress_bars
from int8pass import Recipe, hub, measure
from int8pass.calibration import Calibration
from int8pass.recipe import CALIBRATED
from int8pass.recipe_file import written_whole

RESULTS = Path("benchmarks/results/scheme_times.json")
BASE, FLOAT = "w8a8", "bf16 Inductor"
SCHEMES = (BASE, "auto", "smoothquant-o1", "outlier-columns", "default")
PROMPT, DECODED, ROUNDS = 32, 16, 15  # a prompt is fed token by token; the cache is as long as for a prefill


def recipes(
    names: Sequence[str], model: nn.Module, batches: list[dict[str, Any]], bars: Bars
) -> dict[str, Recipe | str]:
    """A recipe, or a preset that needs no data, for every scheme."""
    seen = Calibration(model, batches, progress=bars)
    return {s: seen.recipe(s, progress=bars) if s in CALIBRATED else s for s in names}


def forms(model: nn.Module, chosen: dict[str, Recipe | str], cuda: bool) -> list[measure.Form]:
    """Plain Inductor first, then every scheme."""
    length = LENGTH + DECODED
    mode = "reduce-overhead" if cuda else None
    made = [measure.Form(FLOAT, model, "inductor", cache_length=length, mode=mode)]
    for name, recipe in chosen.items():
        options = {"recipe": recipe, **({"mode": mode} if mode else {})}
        made.append(measure.Form(name, model, "int8", cache_length=length, options=options))
    return made


def rows(built: list[measure.Form], window: Tensor, bars: Bars) -> list[dict[str, Any]]:
    """Times of every form, in alternation."""
    measure.compile_forms(built, window[None], bars)
    prefill = measure.time_prefill(built, window[None], ROUNDS, bars)
    decode, _ = measure.time_decode(built, window[:PROMPT], DECODED, ROUNDS, bars)
    base = [f.name for f in built].index(BASE)
    return [
        {
            "scheme": form.name,
            "prefill_ms": round(1e3 * p, 3),
            "decode_ms": round(1e3 * d, 3),
            "prefill_ratio": round(p / prefill[base], 3),
            "decode_ratio": round(d / decode[base], 3),
        }
        for form, p, d in zip(built, prefill, decode)
    ]


def table(report: dict[str, Any]) -> Table:
    """The file as people read it."""
    shown = Table(title=f"SmolLM2-135M, bf16, prefill of {LENGTH} tokens and decoding steps, against {BASE}")
    for column in ("device", "scheme", "prefill, ms", "ratio", "decode, ms", "ratio"):
        shown.add_column(column, justify="left" if column in {"device", "scheme"} else "right")
    for device, run in report.items():
        for row in run["rows"]:
            numbers = (row[k] for k in ("prefill_ms", "prefill_ratio", "decode_ms", "decode_ratio"))
            shown.add_row(device, row["scheme"], *(f"{n:.3f}" for n in numbers))
    return shown


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="some of them; plain w8a8 is always measured")
    parser.add_argument("--text", type=Path, help="a file instead of the text that comes with this Python")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    text = args.text.read_text() if args.text else hub.evaluation_text()
    model, tokenizer = hub.load("smollm2", dtype=torch.bfloat16, device=args.device)
    windows = hub.windows(tokenizer, LENGTH, text).to(args.device)
    batches = [{"input_ids": w[None], "use_cache": False} for w in windows[100:132]]
    with progress_bars(Console(stderr=True)) as bars:
        chosen = recipes([BASE, *(s for s in args.schemes.split(",") if s != BASE)], model, batches, bars)
        made = forms(model, chosen, args.device.type == "cuda")
        # All forms are of one function, and each compiles it twice: beyond a limit Dynamo would run the rest as it is.
        with torch._dynamo.config.patch(recompile_limit=4 * len(made)):
            found = rows(made, windows[0], bars)
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    report[measure.device_name(args.device)] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "int8pass": int8pass.__version__,
        "threads": torch.get_num_threads(),
        "rows": found,
    }
    with written_whole(args.out) as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    Console().print(table(report))


if __name__ == "__main__":
    main()
