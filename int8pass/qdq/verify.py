"""Verify: does a file run in int8 where it should, with the numbers it should have?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import Tensor

from int8pass.errors import UnsupportedError
from int8pass.qdq import linears as qdq_linears
from int8pass.qdq import runtimes
from int8pass.qdq.linears import Linear
from int8pass.qdq.traps import Trap, traps_of

RUNTIMES = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "portable": ("onnxruntime", "openvino"),
    "tensorrt": (),
}
"""Target → where its files are opened. TensorRT needs its GPU: there the rules of its parser are asserted instead."""

SLACK = 2.0
"""How much larger than the error of quantization itself the distance between two executions of one quantized model may
be. They differ in the order of float sums, which tips a few roundings, and a deep model amplifies every one of them:
two PyTorch runs whose inputs differ by 1e-7 are apart by nearly the error of quantization."""
FLOOR = 2e-3
"""Relative error that is never held against a runtime."""


@dataclass(frozen=True)
class Fallback:
    """A linear that does not run in int8: what runs instead, why, and what to do."""

    linear: str
    kernel: str
    cause: Trap | None

    def __str__(self) -> str:
        if self.cause is None:
            return f"{self.linear}: {self.kernel}; no known trap explains it"
        return f"{self.linear}: {self.kernel}, trap {self.cause.id}: {self.cause.what}. Fix: {self.cause.fix}"


@dataclass(frozen=True)
class Result:
    """One runtime's word on one file."""

    runtime: str
    planned: int
    kernels: Counter[str]
    fallbacks: tuple[Fallback, ...]
    distance: float | None = None
    """Relative distance to the portable form in PyTorch, the largest over the outputs."""
    error: float | None = None
    """Relative error to the original model."""
    allowed: float | None = None

    @property
    def passed(self) -> bool:
        """Every planned linear in int8, numbers within what is allowed (NaN is not)."""
        near = self.distance is None or (self.allowed is not None and self.distance <= self.allowed)
        return not self.fallbacks and near

    def __str__(self) -> str:
        kernels = ", ".join(f"{count} {name}" for name, count in self.kernels.most_common())
        taken = self.planned - len(self.fallbacks)
        lines = [f"  {self.runtime}: {taken} of {self.planned} linears in int8 ({kernels})"]
        lines += [f"    in float: {fallback}" for fallback in self.fallbacks]
        if self.distance is not None:
            verdict = "" if self.allowed is not None and self.distance <= self.allowed else ": TOO FAR"
            lines.append(
                f"    relative distance to the portable form {self.distance:.2e}, error to the original "
                f"{self.error:.2e} (allowed {self.allowed:.2e}){verdict}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Verification:
    """What was found, runtime by runtime."""

    results: tuple[Result, ...]
    broken_rules: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def passed(self) -> bool:
        """All runtimes passed and no rule is broken."""
        return not self.broken_rules and all(result.passed for result in self.results)

    def __str__(self) -> str:
        lines = [str(result) for result in self.results]
        lines += [f"  rule broken: {rule}" for rule in self.broken_rules]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def require_runtimes(target: str) -> None:
    """Say before anything is computed that a runtime is missing.

    Raises:
        UnsupportedError: a runtime in which the target's files are opened is not installed.
    """
    for name in RUNTIMES[target]:
        if not runtimes.installed(name):
            raise UnsupportedError(
                f"verifying a file for {target!r} needs {name}: pip install 'int8pass[onnx]', "
                "or export with verify=False"
            )


def verify_file(
    path: Path,
    target: str,
    planned: Sequence[str],
    inputs: Sequence[Tensor],
    portable: Sequence[Tensor],
    original: Sequence[Tensor],
) -> Verification:
    """Open a written file in the runtimes of its target, and compare.

    Args:
        planned: module paths of the linears that shall run in int8.
        inputs, portable, original: flat inputs, and the outputs of the portable form and of the original model.
    """
    model = ir.load(path)
    found = qdq_linears.find(model)
    broken = _missing(planned, found)
    if target == "tensorrt":
        broken += tensorrt_rules(model, found)
        note = "not run: TensorRT needs its GPU. Checked are the rules of its parser on the graph."
        return Verification((), tuple(broken), (note,))
    results = [_result(name, path, found, inputs, portable, original) for name in RUNTIMES[target]]
    return Verification(tuple(results), tuple(broken))


def _missing(planned: Sequence[str], found: Sequence[Linear]) -> list[str]:
    """Planned linears that the file has no quantized product for."""
    there = Counter(linear.path.split("#")[0] for linear in found)
    lacking = Counter(planned) - there
    return [f"{path} was planned, and the file has no int8 weight for it" for path in lacking.elements()]


def _result(
    runtime: str,
    path: Path,
    found: Sequence[Linear],
    inputs: Sequence[Tensor],
    portable: Sequence[Tensor],
    original: Sequence[Tensor],
) -> Result:
    opened = runtimes.open_in(runtime, path, found)
    outputs = opened.run([tensor.numpy() for tensor in inputs])
    own = _distance([t.numpy() for t in portable], original)
    return Result(
        f"{opened.runtime} {opened.version}",
        len(found),
        Counter(kernel.name for kernel in opened.kernels.values()),
        fallbacks(opened, found, _opset(path)),
        _distance(outputs, portable),
        _distance(outputs, original),
        FLOOR + SLACK * own,
    )


def fallbacks(opened: runtimes.Opened, found: Sequence[Linear], opset: int) -> tuple[Fallback, ...]:
    """The linears a runtime keeps in float, each with the first trap that explains it."""
    result = []
    for linear in opened.missing(found):
        kernel = opened.kernels[str(linear.node.name)].name
        causes = [trap for trap in traps_of(linear, opset) if opened.runtime in trap.runtimes and trap.id != "T9"]
        result.append(Fallback(linear.path, kernel, causes[0] if causes else None))
    return tuple(result)


def _opset(path: Path) -> int:
    return int(ir.load(path).opset_imports.get("", 0))


def _distance(found: Sequence[np.ndarray], expected: Sequence[Tensor]) -> float:
    """The largest relative distance over all float outputs; NaN where a result is NaN and the expected is not."""
    largest = 0.0
    for left, right in zip(found, expected, strict=True):
        reference = right.double().numpy()
        if not right.is_floating_point() or reference.size == 0:
            continue
        difference = np.linalg.norm(left.astype(np.float64) - reference)
        largest = float(np.maximum(largest, difference / max(float(np.linalg.norm(reference)), 1e-30)))
    return largest


def tensorrt_rules(model: ir.Model, found: Sequence[Linear]) -> list[str]:
    """What TensorRT's parser asks of explicit quantization, each breach in words."""
    opset = int(model.opset_imports.get("", 0))
    broken = [f"{n.name}: DynamicQuantizeLinear" for n in model.graph if n.op_type == "DynamicQuantizeLinear"]
    for linear in found:
        broken += [f"{linear.path}: {trap.what}" for trap in traps_of(linear, opset) if "tensorrt" in trap.runtimes]
    return broken
