"""The ONNX files that benchmarks/onnx.py measures: ours, the float ones, and those of ONNX Runtime's own quantizers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxruntime import quantization
from torch import Tensor, nn
from tqdm import tqdm

import int8pass
from int8pass import example_inputs, hub
from int8pass.example_inputs import Example
from int8pass.qdq.rewrite import constant_of
from int8pass.recipe import CALIBRATED
from int8pass.translate import quiet

CALIBRATION = slice(100, 116)
"""Windows of LENGTH tokens that the evaluation does not see: 2048 tokens."""
CALIBRATION_LONG = slice(100, 104)
"""As many, in windows of 512 tokens."""

LENGTH = 128
EVALUATION = 4
"""Windows of text, the first ones, that errors are taken on."""
HEAD = ", head too"
MINILM = ("w8a8", "w8a8-asymmetric", "default", "smoothquant-o3")
SMOLLM2 = (("w8a8", False), ("w8a8", True), ("smoothquant-o3", False))
ONLY = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}


class Batches(quantization.CalibrationDataReader):
    """The windows that the recipes calibrate on too."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Any:
        return next(self._batches, None)


def text(tokenizer: Any) -> Tensor:
    """Windows to evaluate on, then those to calibrate on: int64 `[count, LENGTH]`."""
    windows = hub.windows(tokenizer, LENGTH)
    return windows[[*range(EVALUATION), *range(CALIBRATION.start, CALIBRATION.stop)]]


def feeds(args: dict[str, Any], windows: Tensor) -> list[dict[str, np.ndarray]]:
    """Inputs of the files for windows of text."""
    return [
        {
            name: (ids[None] if name == "input_ids" else torch.ones_like(ids)[None]).numpy()
            for name, value in args.items()
            if isinstance(value, Tensor)
        }
        for ids in windows
    ]


def tensors(feed: dict[str, np.ndarray], args: dict[str, Any]) -> dict[str, Any]:
    """A feed as the model itself takes it, with what else the example has (use_cache)."""
    return {name: torch.from_numpy(feed[name]) if name in feed else value for name, value in args.items()}


def once(path: Path, make: Callable[[Path], Any]) -> Path:
    """`path`, made now unless an earlier run has."""
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        make(partial)
        partial.rename(path)
    return path


def float_file(model: nn.Module, example: Example, path: Path) -> None:
    """The model in float32, by torch.onnx.export."""
    with quiet(), torch.no_grad():
        torch.onnx.export(
            model, (), path, kwargs=example.args, dynamic_shapes=example.dynamic_shapes, dynamo=True,
            opset_version=21, external_data=False, verbose=False,
        )  # fmt: skip
    made = onnx.load(path)
    del made.graph.value_info[:]  # ONNX Runtime's quantizers trip over shapes it holds
    onnx.save(made, path)


def minilm(folder: Path) -> dict[str, Path]:
    """Every recipe as a portable file, the per-token one for each runtime too; the quantizers of ONNX Runtime."""
    model, tokenizer = hub.load("minilm")
    windows = text(tokenizer)
    example = example_inputs.prefill(model, windows[:1])
    batches = feeds(example.args, windows[EVALUATION:])
    made = {"fp32": once(folder / "fp32.onnx", lambda p: float_file(model, example, p))}
    wanted = [*((preset, "portable") for preset in MINILM), ("w8a8", "onnxruntime"), ("w8a8", "openvino")]
    for preset, target in tqdm(wanted, desc="export"):
        recipe = _recipe(folder, model, example, preset, batches)
        made |= _ours(folder, model, example, preset, recipe, target)
    return made | _theirs(folder, batches, default_static=True)


def smollm2(folder: Path) -> dict[str, Path]:
    """The prefill graph per token and static, its output head in float and in int8; the quantizers of ONNX Runtime."""
    model, tokenizer = hub.load("smollm2")
    windows = text(tokenizer)
    example = example_inputs.prefill(model, windows[:1])
    batches = feeds(example.args, windows[EVALUATION:])
    made = {"fp32": once(folder / "fp32.onnx", lambda p: float_file(model, example, p))}
    for (preset, head), target in tqdm(list(itertools.product(SMOLLM2, ("portable", "onnxruntime"))), desc="export"):
        recipe = _recipe(folder, model, example, preset, batches, head)
        made |= _ours(folder, model, example, preset, recipe, target)
    return made | _theirs(folder, batches)


def _recipe(
    folder: Path,
    model: nn.Module,
    example: Example,
    preset: str,
    batches: list[dict[str, np.ndarray]],
    head: bool = False,
) -> int8pass.Recipe:
    """A preset; where it needs calibration the one that an earlier run has found, or found now."""
    recipe = dataclasses.replace(int8pass.Recipe.preset(preset), quantize_head=head)
    if preset not in CALIBRATED:
        return recipe
    path = folder / f"{preset}{HEAD if head else ''}.json"
    if not path.exists():
        data = [tensors(b, example.args) for b in batches]
        int8pass.calibrate(model, data, recipe, progress=_bar("calibrate")).save(path)
    return int8pass.Recipe.load(path)


def _ours(
    folder: Path, model: nn.Module, example: Example, preset: str, recipe: int8pass.Recipe, target: str
) -> dict[str, Path]:
    """One export, under its name in the tables."""
    name = f"{preset}{'' if target == 'portable' else f' for {target}'}{HEAD if recipe.quantize_head else ''}"
    return {f"int8pass {name}": once(folder / f"{name}.onnx", _export(model, example, recipe, target))}


def _theirs(folder: Path, batches: list[dict[str, np.ndarray]], default_static: bool = False) -> dict[str, Path]:
    """What ONNX Runtime's quantizers make of the float file: dynamic, static at their best, static as they come."""
    source = folder / "fp32.onnx"

    def static(path: Path, **options: Any) -> None:
        quantization.quantize_static(source, path, Batches(batches), **options)

    unsigned = functools.partial(static, activation_type=quantization.QuantType.QUInt8, **ONLY)
    made = {
        "ort quantize_dynamic": once(
            folder / "dynamic.onnx", lambda p: quantization.quantize_dynamic(source, p, **ONLY)
        )
    }
    if default_static:
        made["ort quantize_static"] = once(folder / "static.onnx", static)
    return made | {"ort quantize_static u8": once(folder / "static_u8.onnx", unsigned)}


def decode(folder: Path) -> dict[str, Path]:
    """SmolLM2's graph for one more token, with past keys and values, per token."""
    model, tokenizer = hub.load("smollm2")
    example = example_inputs.decode(model, text(tokenizer)[:1])
    export = _export(model, example, int8pass.Recipe.preset("w8a8"), "portable")
    return {"int8pass w8a8": once(folder / "w8a8.onnx", export)}


def with_columns(folder: Path) -> tuple[Path, Path]:
    """SmolLM2 in float, and per token with calibrated outlier columns in float, for ONNX Runtime."""
    model, tokenizer = hub.load("smollm2")
    windows = hub.windows(tokenizer)
    example = example_inputs.prefill(model, windows[:1, :LENGTH])

    def calibrated(path: Path) -> None:
        batches = [{"input_ids": ids[None]} for ids in windows[CALIBRATION_LONG]]
        recipe = int8pass.calibrate(model, batches, "outlier-columns", progress=_bar("calibrate"))
        _export(model, example, recipe, "onnxruntime")(path)

    return (
        once(folder / "fp32.onnx", lambda p: float_file(model, example, p)),
        once(folder / "columns.onnx", calibrated),
    )


def _export(model: nn.Module, example: Example, recipe: Any, target: str, **options: Any) -> Callable[[Path], Any]:
    return lambda path: int8pass.export_onnx(
        model, example.args, path, recipe=recipe, target=target, dynamic_shapes=example.dynamic_shapes, **options
    )


def _bar(title: str) -> Callable[[str, int, int], None]:
    bar = tqdm(desc=title, unit="step")

    def show(step: str, done: int, total: int) -> None:
        bar.set_postfix_str(f"{step} {done}/{total}")
        bar.update()

    return show


class Wide(nn.Module):
    """Linears of 8192 × 8192, 64 MiB each in int8. Their float weights are one row each, repeated without memory."""

    def __init__(self, count: int, width: int = 8192) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width, bias=False, device="meta") for _ in range(count))
        for linear in self.linears:
            linear.weight = nn.Parameter((torch.randn(1, width) / width).expand(width, width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = linear(x)
        return x


def large(path: Path, count: int) -> None:
    """`count` linears of 64 MiB in one file for ONNX Runtime; not run, only written."""
    model, x = Wide(count).eval(), torch.randn(1, 2, 8192)
    int8pass.export_onnx(model, x, path, recipe="w8a8", quantize_head=True, verify=False)


def transposed(source: Path, path: Path) -> None:
    """The same model with its weights stored `[N, K]` and a Transpose each: what exporters of F.linear write."""
    model = ir.load(source)
    for node in list(model.graph):
        weight = constant_of(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or len(weight.shape) != 2:
            continue
        value, axis = node.inputs[0], node.attributes["axis"].as_int()
        value.const_value = ir.tensor(np.ascontiguousarray(weight.numpy().T), name=value.name)
        node.attributes["axis"] = ir.AttrInt64("axis", 1 - axis)
        turned = ir.Node("", "Transpose", [node.outputs[0]], [ir.AttrInt64s("perm", [1, 0])])
        turned.outputs[0].name = f"{value.name}.turned"
        readers = [(user, index) for user, index in node.outputs[0].uses() if user is not turned]
        for user, index in readers:
            user.replace_input_with(index, turned.outputs[0])
        model.graph.insert_after(node, turned)
    ir.save(model, path, external_data=f"{path.name}.data")
