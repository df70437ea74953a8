"""int8 ONNX files in ONNX Runtime and OpenVINO against their own float32, and against ONNX Runtime's quantizers.

    python -m benchmarks.onnx                     # MiniLM at length 128, one thread and two
    python -m benchmarks.onnx --models minilm smollm2

Per model and thread count: interleaved medians in milliseconds, the relative error of the output to the float model,
and the kernels each runtime chose. Everything in one run, written to benchmarks/results/onnx.json.
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

LENGTH, ROUNDS = 128, 20
RECIPES = ("w8a8", "default")


class Batches(quantization.CalibrationDataReader):
    """The windows that the recipes calibrate on too."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Any:
        return next(self._batches, None)


def feeds(args: dict[str, Tensor], text: Tensor) -> list[dict[str, np.ndarray]]:
    """Inputs of the files for windows of text."""
    return [
        {name: (ids[None] if name == "input_ids" else torch.ones_like(ids)[None]).numpy() for name in args}
        for ids in text
    ]


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
    for recipe in RECIPES:
        made[f"int8pass {recipe}"] = path = folder / f"{recipe}.onnx"
        int8pass.export_onnx(
            model, example.args, path, recipe=recipe, target="portable", dynamic_shapes=example.dynamic_shapes
        )
    only = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
    made["ort quantize_dynamic"] = folder / "dynamic.onnx"
    quantization.quantize_dynamic(made["fp32"], made["ort quantize_dynamic"], **only)
    made["ort quantize_static"] = folder / "static.onnx"
    quantization.quantize_static(made["fp32"], made["ort quantize_static"], Batches(feeds(example.args, text[1:5])))
    unsigned = {"activation_type": quantization.QuantType.QUInt8, **only}
    made["ort quantize_static u8"] = folder / "static_u8.onnx"
    quantization.quantize_static(
        made["fp32"], made["ort quantize_static u8"], Batches(feeds(example.args, text[1:5])), **unsigned
    )
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
    """Medians, in alternation, the ratio to the same runtime's float file, and errors."""
    calls = callables(made, threads)
    times: dict[str, list[float]] = {label: [] for label in calls}
    outputs: dict[str, np.ndarray] = {}
    for _ in tqdm(range(ROUNDS + 3), desc=f"{threads} threads"):
        for label, call in calls.items():
            begin = time.perf_counter()
            outputs[label] = call(feed)
            times[label].append(time.perf_counter() - begin)
    reference = outputs["onnxruntime fp32"]
    result: dict[str, Any] = {}
    for label, found in times.items():
        median = statistics.median(found[3:])
        base = statistics.median(times[f"{label.split()[0]} fp32"][3:])
        error = np.linalg.norm(outputs[label] - reference) / np.linalg.norm(reference)
        figures = {"ms": 1e3 * median, "speedup": base / median, "error": float(error)}
        result[label] = {name: round(value, 5) for name, value in figures.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("minilm", "smollm2"), default=["minilm"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/onnx.json"))
    arguments = parser.parse_args()
    report: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.models:
        _, tokenizer = hub.load(name)
        text = hub.windows(tokenizer, LENGTH)[[0, *range(CALIBRATION.start, CALIBRATION.stop)]]
        with tempfile.TemporaryDirectory() as folder:
            made, kernels = files(name, Path(folder), text)
            args = {"input_ids": text} if name == "smollm2" else {"input_ids": text, "attention_mask": text}
            (feed,) = feeds(args, text[:1])
            report[name] = {"length": LENGTH, "linears in int8": kernels}
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
