"""Open a file in a runtime and read what it made of it: which kernel runs each quantized linear."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from int8pass.errors import ExportError, UnsupportedError
from int8pass.qdq.linears import INTEGER_OPS, Linear, signed_input

Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]

# Kernels of ONNX Runtime that multiply integers. MatMulInteger counts with unsigned activations only (trap T4).
ORT_INT8 = {"QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger"}
ORT_WEIGHT_ONLY = {"MatMulNBits"}


@dataclass(frozen=True)
class Kernel:
    """What runs one linear: the runtime's own name for it, and whether it reads the weight as integers."""

    name: str
    int8: bool


@dataclass
class Opened:
    """A file in a runtime: the kernel of every linear (by node name), and how to run it."""

    runtime: str
    version: str
    read_kernels: Callable[[], Mapping[str, Kernel]]
    """Asked anew after a run: where shapes are dynamic, OpenVINO chooses among its kernels then."""
    run: Run

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """Kernel of every linear, by the name of its node."""
        return self.read_kernels()

    def missing(self, linears: Sequence[Linear]) -> list[Linear]:
        """Linears that do not run in int8."""
        kernels = self.kernels
        return [linear for linear in linears if not kernels[str(linear.node.name)].int8]


def module(name: str) -> Any:
    """A runtime's Python package.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        raise UnsupportedError(f"{missing.name} is not installed: pip install 'int8pass[onnx]'") from missing


def installed(name: str) -> bool:
    """Whether a runtime can be imported."""
    return importlib.util.find_spec(name) is not None


def open_in(runtime: str, path: Path, linears: Sequence[Linear]) -> Opened:
    """Open a file in "onnxruntime" or "openvino".

    Raises:
        ExportError: the runtime cannot load the file; the message has its reason.
        UnsupportedError: the runtime is not installed.
    """
    opener = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}[runtime]
    package = module(runtime)
    try:
        return opener(package, path, linears)
    except RuntimeError as error:
        raise ExportError(f"{runtime} {package.__version__} cannot load {path.name}: {str(error)[:1000]}") from error


def open_onnxruntime(ort: Any, path: Path, linears: Sequence[Linear]) -> Opened:
    """CPU execution provider, all optimizations, the optimized graph written out and read."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        # beside the graph, so that this works for any size
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # each kind of failure has a class of its own there, without a common base
            if type(error).__module__ != ort.capi.onnxruntime_pybind11_state.__name__:
                raise
            raise RuntimeError(str(error)) from error
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(session.run(None, dict(zip(names, inputs, strict=True))))

    kernels = _ort_kernels(optimized, linears)
    return Opened("onnxruntime", ort.__version__, lambda: kernels, run)


def _ort_kernels(optimized: onnx.ModelProto, linears: Sequence[Linear]) -> dict[str, Kernel]:
    nodes = list(optimized.graph.node)
    by_weight: dict[str, list[onnx.NodeProto]] = {}
    by_name = {node.name.removesuffix("/MatMulAddFusion"): node for node in nodes}
    for node in nodes:
        for name in node.input:
            by_weight.setdefault(name, []).append(node)
    kernels: dict[str, Kernel] = {}
    for linear in linears:
        readers = [n for n in by_weight.get(str(linear.weight.name), []) if n.op_type in INTEGER_OPS]
        same = by_name.get(str(linear.node.name))
        node = same if same is not None and (same in readers or len(readers) != 1) else next(iter(readers), same)
        kernels[str(linear.node.name)] = _ort_kernel(node, linear)
    return kernels


def _ort_kernel(node: onnx.NodeProto | None, linear: Linear) -> Kernel:
    if node is None:
        return Kernel("float MatMul", False)
    if node.op_type == "MatMulInteger" and signed_input(linear):
        return Kernel("MatMulInteger with signed activations", False)
    if node.op_type in ORT_INT8 | ORT_WEIGHT_ONLY:
        return Kernel(node.op_type, True)
    return Kernel(f"float {node.op_type}", False)


def open_openvino(openvino: Any, path: Path, linears: Sequence[Linear]) -> Opened:
    """CPU device. float32 is asked for where the file says float32: the default may be bf16, by the processor."""
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        result = compiled(list(inputs))
        return [np.asarray(result[port]) for port in compiled.outputs]

    version = openvino.__version__.split("-")[0]
    return Opened("openvino", version, lambda: _openvino_kernels(compiled.get_runtime_model(), linears), run)


# What OpenVINO appends to the name of a node that it takes apart.
_ADDED = re.compile(r"/(WithoutBiases|Dequantization\w+)(/.*)?$")


def _openvino_kernels(executed: Any, linears: Sequence[Linear]) -> dict[str, Kernel]:
    products: dict[str, tuple[str, str]] = {}
    for node in executed.get_ops():
        info = node.get_rt_info()
        kind, primitive, precision, origins = (
            str(info[key].astype(str)) if key in info else ""
            for key in ("layerType", "primitiveType", "runtimePrecision", "originalLayersNames")
        )
        if kind in {"FullyConnected", "MatMul"}:
            for origin in (*origins.split(","), node.get_friendly_name()):  # fusion may leave either out
                products[_ADDED.sub("", origin)] = (primitive, precision)
    kernels: dict[str, Kernel] = {}
    for linear in linears:
        found = [products[name] for name in linear.aliases() if name in products]
        primitive, precision = found[0] if found else ("not found", "")
        # Both operands as integers show in the kernel's name, an int8 weight alone in the precision it is kept in.
        int8 = primitive.lower().endswith("i8") or (linear.form == "weight only" and precision in {"i8", "u8"})
        label = f"FullyConnected {primitive}" if int8 else f"float {primitive}"
        kernels[str(linear.node.name)] = Kernel(f"{label} ({precision})" if precision else label, int8)
    return kernels
