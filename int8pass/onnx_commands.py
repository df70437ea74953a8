"""`int8pass export` and `int8pass lint`: the commands about ONNX files."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from int8pass import hub
from int8pass.errors import OptionError, UnsupportedError
from int8pass.terminal import Dtype, ModelArgument, RecipeOption, Steps, load, recipe_of, reported, require_folder, say


class ExportTarget(enum.StrEnum):
    """`portable`: one file for ONNX Runtime and OpenVINO."""

    onnxruntime = "onnxruntime"
    openvino = "openvino"
    tensorrt = "tensorrt"
    portable = "portable"


class LintRuntime(enum.StrEnum):
    """Where a linted file shall run; TensorRT's rules are checked on the graph alone."""

    onnxruntime = "onnxruntime"
    openvino = "openvino"
    tensorrt = "tensorrt"


class Verify(enum.StrEnum):
    """`error`: no file; `warn`: keep it and say so; `off`: do not look."""

    error = "error"
    warn = "warn"
    off = "off"


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")] = Path("model.onnx"),
    target: Annotated[ExportTarget, typer.Option(help="The runtime whose int8 kernels the file is written for.")] = (
        ExportTarget.onnxruntime
    ),
    recipe: RecipeOption = "default",
    with_past: Annotated[
        bool, typer.Option("--with-past", help="The graph for one more token, with past keys and values.")
    ] = False,
    static: Annotated[bool, typer.Option("--static", help="Only the shapes of the example, no other length.")] = False,
    length: Annotated[int, typer.Option(min=2, help="Tokens of the example that the graph is traced with.")] = 64,
    verify: Annotated[Verify, typer.Option(help="What to do with a file that does not verify.")] = Verify.error,
) -> None:
    """Write MODEL as an ONNX file that TARGET runs in int8, and check in TARGET that it does."""
    with reported():
        from int8pass import example_inputs
        from int8pass.export import export_onnx

        chosen = recipe_of(recipe)
        require_folder("--output", output)
        with Steps() as progress:
            loaded, tokenizer = load(model, Dtype.float32, torch.device("cpu"), progress)
            ids = hub.windows(tokenizer, length)[:1]
            make = example_inputs.decode if with_past else example_inputs.prefill
            example = make(loaded, ids, dynamic=not static)
            made = export_onnx(
                loaded,
                example.args,
                output,
                recipe=chosen,
                target=target.value,
                dynamic_shapes=example.dynamic_shapes,
                verify={Verify.error: True, Verify.warn: "warn", Verify.off: False}[verify],  # type: ignore[arg-type]
                progress=progress,
            )
        say(str(made))


def lint(
    file: Annotated[Path, typer.Argument(help="An ONNX model with QuantizeLinear / DequantizeLinear, by any tool.")],
    runtime: Annotated[LintRuntime, typer.Option(help="Where it shall run in int8.")] = LintRuntime.onnxruntime,
    fix: Annotated[bool, typer.Option("--fix", help="Rewrite what is safe, then look again.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where --fix writes the model (default: in its place).")
    ] = None,
) -> None:
    """Say which linears of FILE run in int8 and which fell back, why, and how to repair it.

    Exit code 0: all of them run in int8. 1: some do not, the file does not load, or nothing in it is quantized.
    """
    with reported():
        try:
            from int8pass.qdq import lint as linter
        except ModuleNotFoundError as missing:
            raise UnsupportedError(f"lint needs {missing.name}: pip install 'int8pass[onnx]'") from missing
        if output is not None and not fix:
            raise OptionError("--output says where --fix writes; give --fix too")
        if fix:
            for name, count in linter.fix(file, output).items():
                say(f"fixed {name}: {count} places")
        found = linter.lint(output or file, runtime.value)
        say(str(found))
        if not found.passed:
            raise typer.Exit(1)
