"""int8 ONNX files in ONNX Runtime and OpenVINO against their own float32, and against ONNX Runtime's quantizers.

    python -m benchmarks.onnx            # MiniLM at length 128, one thread and two: some minutes
    python -m benchmarks.onnx --full     # SmolLM2 too

Per model and thread count: medians in milliseconds of calls in alternation, and the speed-up over the float file of the
same runtime. Per file: the linears in int8 in each runtime, and the relative error to the float model, on text that no
calibration saw, at length 128 and at length 1. Everything in one run, written to benchmarks/results/onnx.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnxruntime import quantization
from torch import Tensor
from tqdm import tqdm

import int8pass
from benchmarks.cpu import CALIBRATION
from int8pass import example_inputs, hub, measure
from int8pass.export import _quiet
from int8pass.qdq.lint import lint
from int8pass.recipe import CALIBRATED

LENGTH, ROUNDS = 128, 30
RECIPES = ("w8a8", "default", "smoothquant-o3")
EVALUATION = 4
"""Windows of text, the first ones, that errors are taken on."""


class Batches(quantization.CalibrationDataReader):
    """The windows that the recipes calibrate on too."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Any:
        return next(self._batches, None)


def feeds(args: dict[str, Any], text: Tensor) -> list[dict[str, np.ndarray]]:
    """Inputs of the files for windows of text."""
    return [
        {
            name: (ids[None] if name == "input_ids" else torch.ones_like(ids)[None]).numpy()
            for name, value in args.items()
            if isinstance(value, Tensor)
        }
        for ids in text
    ]


def _tensors(feed: dict[str, np.ndarray], args: dict[str, Any]) -> dict[str, Any]:
    """A feed as the model itself takes it, with what else the example has (use_cache)."""
    return {name: torch.from_numpy(feed[name]) if name in feed else value for name, value in args.items()}


def files(name: str, folder: Path, text: Tensor) -> tuple[dict[str, Path], dict[str, Any]]:
    """The float file, ours, and those of ONNX Runtime's quantizers; and what each runtime runs in int8."""
    model, _ = hub.load(name)
    example = example_inputs.prefill(model, text[:1])
    made = {"fp32": folder / "fp32.onnx"}
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            model, (), made["fp32"], kwargs=example.args, dynamic_shapes=example.dynamic_shapes, dynamo=True,
            opset_version=21, external_data=False, verbose=False,
        )  # fmt: skip
    float_model = onnx.load(made["fp32"])
    del float_model.graph.value_info[:]  # ONNX Runtime's quantizers trip over shapes it holds
    onnx.save(float_model, made["fp32"])
    batches = feeds(example.args, text[EVALUATION:])
    for preset in tqdm(RECIPES, desc="export"):
        recipe = int8pass.Recipe.preset(preset)
        if preset in CALIBRATED:
            recipe = int8pass.calibrate(model, [_tensors(b, example.args) for b in batches], recipe)
        made[f"int8pass {preset}"] = path = folder / f"{preset}.onnx"
        int8pass.export_onnx(
            model, example.args, path, recipe=recipe, target="portable", dynamic_shapes=example.dynamic_shapes
        )
    only = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
    made["ort quantize_dynamic"] = folder / "dynamic.onnx"
    quantization.quantize_dynamic(made["fp32"], made["ort quantize_dynamic"], **only)
    made["ort quantize_static"] = folder / "static.onnx"
    quantization.quantize_static(made["fp32"], made["ort quantize_static"], Batches(batches))
    unsigned = {"activation_type": quantization.QuantType.QUInt8, **only}
    made["ort quantize_static u8"] = folder / "static_u8.onnx"
    quantization.quantize_static(made["fp32"], made["ort quantize_static u8"], Batches(batches), **unsigned)
    kernels = {
        f"{label}, {runtime}": f"{sum(f.int8 for f in found.findings)} of {len(found.findings)}"
        for label, path in made.items()
        if label != "fp32"
        for runtime in ("onnxruntime", "openvino")
        for found in [lint(path, runtime)]
    }
    return made, kernels


def callables(made: dict[str, Path], threads: int) -> dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]]:
    """Every file in both runtimes."""
    calls: dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]] = {}
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    for label, path in made.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(str(path), options)
        calls[f"onnxruntime {label}"] = lambda feed, session=session: session.run(None, feed)[0]
        if label == "fp32" or label.startswith("int8pass"):
            compiled = openvino.Core().compile_model(str(path), "CPU", settings)
            calls[f"openvino {label}"] = lambda feed, compiled=compiled: compiled(list(feed.values()))[0]
    return calls


def speed(made: dict[str, Path], feed: dict[str, np.ndarray], threads: int) -> dict[str, Any]:
    """Medians, in alternation, and the ratio to the same runtime's float file."""
    calls = callables(made, threads)
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in tqdm(range(ROUNDS + 3), desc=f"{threads} threads"):
        for label, call in calls.items():
            begin = time.perf_counter()
            call(feed)
            times[label].append(time.perf_counter() - begin)
    medians = {label: statistics.median(found[3:]) for label, found in times.items()}
    return {
        label: {"ms": round(1e3 * median, 3), "speedup": round(medians[f"{label.split()[0]} fp32"] / median, 3)}
        for label, median in medians.items()
    }


def errors(made: dict[str, Path], batches: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Relative error of the first output to the float file's in ONNX Runtime, the mean over batches."""
    found: dict[str, list[float]] = {}
    calls = callables(made, 1)
    for feed in batches:
        reference = calls["onnxruntime fp32"](feed)
        for label, call in calls.items():
            error = np.linalg.norm(call(feed) - reference) / np.linalg.norm(reference)
            found.setdefault(label, []).append(float(error))
    return {label: round(statistics.mean(values), 6) for label, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="SmolLM2 too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/onnx.json"))
    arguments = parser.parse_args()
    report: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in ("minilm", "smollm2") if arguments.full else ("minilm",):
        model, tokenizer = hub.load(name)
        windows = hub.windows(tokenizer, LENGTH)
        text = windows[[*range(EVALUATION), *range(CALIBRATION.start, CALIBRATION.stop)]]
        names = example_inputs.prefill(model, text[:1]).args
        with tempfile.TemporaryDirectory() as folder:
            made, kernels = files(name, Path(folder), text)
            report[name] = {
                "length": LENGTH,
                "linears in int8": kernels,
                f"relative error at length {LENGTH}": errors(made, feeds(names, text[:EVALUATION])),
                "relative error at length 1": errors(made, feeds(names, text[:EVALUATION, :1])),
            }
            (feed,) = feeds(names, text[:1])
            for threads in (1, 2):
                report[name][f"{threads} threads"] = speed(made, feed, threads)
        report[name] |= {
            "device": measure.device_name(torch.device("cpu")).split(",")[0],
            "versions": {
                "int8pass": int8pass.__version__, "torch": torch.__version__, "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0],
            },
        }  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(report[name], indent=1))


if __name__ == "__main__":
    main()
