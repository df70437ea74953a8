"""int8 ONNX files in ONNX Runtime and OpenVINO against their own float32, and against ONNX Runtime's quantizers.

    python -m benchmarks.onnx                    # MiniLM at length 128, one thread and two: some minutes
    python -m benchmarks.onnx --full             # SmolLM2, perplexity, 16 architectures, a file of 2 GB too
    python -m benchmarks.onnx --only minilm-1    # one piece (see --help), whatever an earlier run has found

A full run takes the pieces one by one and writes benchmarks/results/onnx.json after each; started again, it goes on
with the first that is missing, and finds the files it has made in --folder. Speed: medians in milliseconds of calls in
alternation, and the speed-up over the float file of the same runtime. Errors are relative to the float file, on text
that no calibration saw.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import openvino
import torch
import torch.nn.functional as F
from tqdm import tqdm

import int8pass
from benchmarks import onnx_files
from benchmarks.onnx_files import EVALUATION, LENGTH
from int8pass import example_inputs, hub, measure
from int8pass.qdq.lint import lint

Feed = dict[str, np.ndarray]
Call = Callable[[Feed], np.ndarray]
ROUNDS = {"minilm": 30, "smollm2": 10}
WINDOWS = 16
LARGE = 32
"""Linears of 64 MiB: 2 GiB of weights."""
SMALL = 8
"""512 MiB, to compare with the Transpose form: that unfolds weights in float, and 2 GiB take 19 GB of memory."""


def session(path: Path, threads: int) -> Any:
    """A file in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options)


def callables(made: dict[str, Path], threads: int) -> dict[str, Call]:
    """Every file in the runtimes it is for."""
    calls: dict[str, Call] = {}
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    for label, path in made.items():
        if "for openvino" not in label:
            opened = session(path, threads)
            calls[f"onnxruntime {label}"] = lambda feed, opened=opened: opened.run(None, feed)[0]
        if not label.startswith("ort") and "for onnxruntime" not in label:
            compiled = openvino.Core().compile_model(str(path), "CPU", settings)
            calls[f"openvino {label}"] = lambda feed, compiled=compiled: compiled(list(feed.values()))[0]
    return calls


def kernels(made: dict[str, Path]) -> dict[str, str]:
    """Per file and runtime: the linears that run in int8."""
    found = {}
    for label, path in tqdm([(k, v) for k, v in made.items() if k != "fp32"], desc="kernels"):
        for runtime in ("onnxruntime", "openvino"):
            if "for " not in label or f"for {runtime}" in label:
                findings = lint(path, runtime).findings
                found[f"{label}, {runtime}"] = f"{sum(f.int8 for f in findings)} of {len(findings)}"
    return found


def speed(made: dict[str, Path], feed: Feed, threads: int, rounds: int) -> dict[str, Any]:
    """Medians, in alternation, and the ratio to the same runtime's float file."""
    calls = callables(made, threads)
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in tqdm(range(rounds + 3), desc=f"{threads} threads"):
        for label, call in calls.items():
            begin = time.perf_counter()
            call(feed)
            times[label].append(time.perf_counter() - begin)
    medians = {label: statistics.median(found[3:]) for label, found in times.items()}
    return {
        label: {"ms": round(1e3 * median, 3), "speedup": round(medians[f"{label.split()[0]} fp32"] / median, 3)}
        for label, median in medians.items()
    }


def errors(made: dict[str, Path], batches: list[Feed]) -> dict[str, float]:
    """Relative error of the first output to the float file's in ONNX Runtime, the mean over batches."""
    found: dict[str, list[float]] = {}
    calls = callables(made, 1)
    for feed in tqdm(batches, desc="errors"):
        reference = calls["onnxruntime fp32"](feed)
        for label, call in calls.items():
            error = np.linalg.norm(call(feed) - reference) / np.linalg.norm(reference)
            found.setdefault(label, []).append(float(error))
    return {label: round(statistics.mean(values), 6) for label, values in found.items()}


def _inputs(name: str) -> tuple[list[Feed], list[Feed]]:
    """Windows to evaluate on, whole and cut to one token."""
    model, tokenizer = hub.load(name)
    windows = onnx_files.text(tokenizer)[:EVALUATION]
    args = example_inputs.prefill(model, windows[:1]).args
    return onnx_files.feeds(args, windows), onnx_files.feeds(args, windows[:, :1])


def facts_of(name: str, folder: Path) -> dict[str, Any]:
    """Kernels and errors of a model's files."""
    made = getattr(onnx_files, name)(folder)
    whole, one_token = _inputs(name)
    return {
        "length": LENGTH,
        "linears in int8": kernels(made),
        f"relative error at length {LENGTH}": errors(made, whole),
        "relative error at length 1": errors(made, one_token),
    }


def speed_of(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Speed of a model's files at LENGTH tokens."""
    made = getattr(onnx_files, name)(folder)
    return speed(made, _inputs(name)[0][0], threads, ROUNDS[name])


def decode(folder: Path) -> dict[str, Any]:
    """The graph for one more token: its kernels."""
    return {"linears in int8": kernels(onnx_files.decode(folder))}


def perplexity(folder: Path) -> dict[str, Any]:
    """SmolLM2 through ONNX Runtime, in float and per token with calibrated columns, on the first WINDOWS windows."""
    float_path, columns = onnx_files.with_columns(folder)
    _, tokenizer = hub.load("smollm2")
    windows = hub.windows(tokenizer)[:WINDOWS]
    found = {}
    for label, path in (("fp32", float_path), ("int8", columns)):
        opened, loss = session(path, 2), 0.0
        for ids in tqdm(windows, desc=f"perplexity {label}"):
            (logits,) = opened.run(None, {"input_ids": ids[None].numpy()})
            loss += F.cross_entropy(torch.from_numpy(logits[0, :-1]), ids[1:], reduction="sum").item()
        found[label] = math.exp(loss / (len(windows) * (windows.shape[1] - 1)))
        del opened
    counted = lint(columns).findings
    return {
        "recipe": "outlier-columns", "windows": len(windows), **{k: round(v, 4) for k, v in found.items()},
        "ratio": round(found["int8"] / found["fp32"], 5),
        "linears in int8": f"{sum(f.int8 for f in counted)} of {len(counted)}",
    }  # fmt: skip


def load_time(folder: Path) -> dict[str, Any]:
    """Seconds until ONNX Runtime has a session: of 2 GiB as exported, of 512 MiB so and in the Transpose form."""

    def export(count: int) -> Path:
        return onnx_files.once(folder / f"large-{count}.onnx", lambda p: onnx_files.large(p, count))

    small = export(SMALL)
    turned = onnx_files.once(folder / f"transposed-{SMALL}.onnx", lambda p: onnx_files.transposed(small, p))
    files = {"2 GiB": export(LARGE), "512 MiB": small, "512 MiB, Transpose form": turned}
    return {label: _loaded(file) for label, file in files.items()}


def _loaded(file: Path) -> dict[str, float]:
    """A file's weights, and the seconds its session takes: median of three, the first of which may read the disk."""
    took: list[tuple[float, float]] = []
    for _ in range(3):
        gc.collect()
        begin, used = time.perf_counter(), time.process_time()
        opened = session(file, 2)
        took.append((time.perf_counter() - begin, time.process_time() - used))
        del opened
    seconds, cpu = (statistics.median(values) for values in zip(*took))
    return {
        "GiB": round(sum(_bytes(file)) / 2**30, 3), "seconds": round(seconds, 2), "first": round(took[0][0], 2),
        "CPU seconds": round(cpu, 2),
    }  # fmt: skip


def _bytes(path: Path) -> list[int]:
    return [v.const_value.nbytes for v in ir.load(path).graph.initializers.values() if v.const_value is not None]


def architectures(folder: Path) -> dict[str, Any]:
    """16 architectures at toy sizes: the linears that run in int8 in both runtimes."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from architectures import EXPORTED, build

    found = {}
    for name in tqdm(EXPORTED, desc="architectures"):
        model, inputs = build(name)
        path = folder / f"{name}.onnx"
        int8pass.export_onnx(model, inputs, path, recipe="w8a8", target="portable", verify="warn")
        found |= kernels({name: path})
    return found


PIECES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "minilm": lambda folder: facts_of("minilm", folder),
    "minilm-1": lambda folder: speed_of("minilm", folder, 1),
    "minilm-2": lambda folder: speed_of("minilm", folder, 2),
    "smollm2": lambda folder: facts_of("smollm2", folder),
    "smollm2-1": lambda folder: speed_of("smollm2", folder, 1),
    "smollm2-2": lambda folder: speed_of("smollm2", folder, 2),
    "decode": decode,
    "perplexity": perplexity,
    "architectures": architectures,
    "load": load_time,
}
"""A name before the hyphen is a folder of files."""


def _where() -> dict[str, Any]:
    return {
        "device": measure.device_name(torch.device("cpu")).split(",")[0],
        "versions": {
            "int8pass": int8pass.__version__, "torch": torch.__version__, "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0],
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all pieces that --out has not")
    parser.add_argument("--only", nargs="+", choices=list(PIECES), help="these pieces, again where --out has them")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "int8pass-onnx-files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/onnx.json"))
    arguments = parser.parse_args()
    report: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if {k: report.get(k) for k in ("device", "versions")} != _where():
        report = _where()
    wanted = arguments.only or [p for p in PIECES if (p not in report if arguments.full else p.startswith("minilm"))]
    for piece in (bar := tqdm(wanted, desc="pieces")):
        bar.set_postfix_str(piece)
        folder = arguments.folder / {"perplexity": "smollm2"}.get(piece, piece.split("-")[0])
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        report[piece] = PIECES[piece](folder)
        report[piece]["took, s"] = round(time.perf_counter() - begin, 1)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps({piece: report[piece]}, indent=1))


if __name__ == "__main__":
    main()
