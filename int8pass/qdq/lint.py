"""Lint: which linears of a QDQ file run in int8, which do not, which trap they are in, and what can be repaired."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes import common as passes

from int8pass.errors import ExportError, OptionError
from int8pass.qdq import files, linears, rewrite, runtimes, traps
from int8pass.qdq.linears import Linear
from int8pass.qdq.traps import TRAPS, Trap

RUNTIMES = ("onnxruntime", "openvino", "tensorrt")


@dataclass(frozen=True)
class Finding:
    """One quantized linear: what runs it, and the traps it is in."""

    linear: str
    shape: tuple[int, ...]
    """Of its weight, as stored."""
    kernel: str
    int8: bool
    traps: tuple[Trap, ...]

    def __str__(self) -> str:
        """One line, and one more for every trap."""
        shape = "×".join(map(str, self.shape))
        lines = [f"{'int8 ' if self.int8 else 'FLOAT'} {self.linear} [{shape}] {self.kernel}"]
        lines += [f"      {trap.id}: {trap.what}. Fix: {trap.fix}{_how(trap)}" for trap in self.traps]
        return "\n".join(lines)


def _how(trap: Trap) -> str:
    return " (--fix does it)" if trap.safe else ""


@dataclass(frozen=True)
class Lint:
    """What lint found in one file."""

    path: Path
    runtime: str
    findings: tuple[Finding, ...]
    does_not_load: str = ""

    @property
    def passed(self) -> bool:
        """It loads, has quantized linears, and all of them run in int8."""
        return bool(self.findings) and not self.does_not_load and all(f.int8 for f in self.findings)

    def __str__(self) -> str:
        fallbacks = [f for f in self.findings if not f.int8]
        lines = [
            f"{self.path}: {len(self.findings)} quantized linears, "
            f"{len(self.findings) - len(fallbacks)} run in int8 in {self.runtime}"
        ]
        if not self.findings:
            lines.append("  no linear reads a quantized weight: this is no QDQ model, or it quantizes other ops only")
        if self.does_not_load:
            lines.append(f"  {self.does_not_load}")
        kernels = Counter(f.kernel for f in self.findings if f.int8)
        lines += [f"  int8  {count} × {name}" for name, count in kernels.most_common()]
        lines += [f"  {finding}" for finding in fallbacks]
        warned = Counter(trap.id for f in self.findings if f.int8 for trap in f.traps)
        lines += [f"  warning {name}: {count} × {TRAPS[name].what}. Fix: {TRAPS[name].fix}{_how(TRAPS[name])}"
                  for name, count in warned.items()]  # fmt: skip
        return "\n".join(lines)


def lint(path: str | os.PathLike[str], runtime: str = "onnxruntime") -> Lint:
    """Open a QDQ file, by any tool, in a runtime, and find out what it runs in int8.

    Args:
        path: an ONNX file, its external weights beside it.
        runtime: "onnxruntime", "openvino", or "tensorrt" (the rules of its parser on the graph; nothing is run).

    Raises:
        ExportError: the file is missing, or no ONNX model.
        UnsupportedError: the runtime is not installed.
    """
    if runtime not in RUNTIMES:
        raise OptionError(f"unknown runtime {runtime!r}; runtimes are {', '.join(RUNTIMES)}")
    file = Path(path)
    model = read(file)
    found = linears.find(model)
    opset = int(model.opset_imports.get("", 0))
    if runtime == "tensorrt":
        return Lint(file, runtime, tuple(_tensorrt(linear, opset) for linear in found))
    problem = ""
    try:
        opened = runtimes.open_in(runtime, file, found)
        kernels = opened.kernels
        label = f"{opened.runtime} {opened.version}"
    except ExportError as error:
        kernels = {str(linear.node.name): runtimes.Kernel("nothing", False) for linear in found}
        problem, label = str(error), runtime
    findings = tuple(_finding(linear, kernels[str(linear.node.name)], opset, runtime) for linear in found)
    return Lint(file, label, findings, problem)


def read(path: Path) -> ir.Model:
    """A model with the shapes of its values, which traps depend on.

    Raises:
        ExportError: the file is missing, or no ONNX model.
    """
    if not path.is_file():
        raise ExportError(f"there is no file {path}")
    try:
        model = ir.load(path)
    except (DecodeError, ValueError, KeyError) as error:
        raise ExportError(f"{path} is no ONNX model: {str(error)[:200]}") from error
    if not model.graph.outputs:
        raise ExportError(f"{path} is no ONNX model, or an empty one: its graph has no outputs")
    _name_nodes(model)
    passes.ShapeInferencePass()(model)
    return model


def _name_nodes(model: ir.Model) -> None:
    """Nodes need names to be found again in what a runtime makes of the file."""
    for node in model.graph:
        if not node.name:
            node.name = node.outputs[0].name


def _finding(linear: Linear, kernel: runtimes.Kernel, opset: int, runtime: str) -> Finding:
    found = [t for t in traps.traps_of(linear, opset) if runtime in t.runtimes]
    fails = [t for t in found if t.id == "T7"]  # fused, and then an error whenever it is run
    if fails and kernel.int8:
        return Finding(linear.path, _shape(linear), f"{kernel.name}, which fails", False, tuple(fails))
    if kernel.int8:  # what fuses anyway is in no trap; slow loading is one all the same
        found = [t for t in found if t.id == "T9"]
    return Finding(linear.path, _shape(linear), kernel.name, kernel.int8, tuple(found))


def _tensorrt(linear: Linear, opset: int) -> Finding:
    broken = tuple(t for t in traps.traps_of(linear, opset) if "tensorrt" in t.runtimes)
    kernel = "by the rules of its parser, not run"
    return Finding(linear.path, _shape(linear), kernel, not broken, broken)


def _shape(linear: Linear) -> tuple[int, ...]:
    tensor = rewrite.constant_of(linear.weight)
    return tuple(int(size) for size in tensor.shape.numpy()) if tensor is not None else ()


def fix(path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> dict[str, int]:
    """Rewrite what is safe: no number changes but by rounding a bias to the accumulator's step.

    Args:
        path: the file to repair.
        output: where the repaired model goes; default: in its place, in one step.

    Returns:
        Trap id → places repaired, for the traps that were there.

    Raises:
        ExportError: the file is no ONNX model, or the result cannot be written.
    """
    source = Path(path)
    target = Path(output) if output is not None else source
    model = read(source)
    opset = int(model.opset_imports.get("", 0))
    counts: Counter[str] = Counter()
    counts["T6"] = rewrite.explicit_zero_points(list(model.graph), model)
    in_trap = {trap.id for linear in linears.find(model) for trap in traps.traps_of(linear, opset)}
    if in_trap & {"T2", "T4", "T5"}:
        done = rewrite.unsigned_activations(model)
        counts.update({name: done for name in ("T2", "T4", "T5") if name in in_trap})
    counts["T3"] = rewrite.relu_as_max(model)
    counts["T9"] = rewrite.transpose_weights(model)
    counts["T1"] = rewrite.fix_biases(model)
    passes.RemoveUnusedNodesPass()(model)
    with files.staged(target) as folder:
        files.publish(files.write(model, folder, target), target)
    return {name: count for name, count in counts.items() if count}


__all__ = ["Finding", "Lint", "fix", "lint", "read"]
