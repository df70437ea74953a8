"""Facts of an ONNX file: which products are int8 on paper, and what ONNX Runtime made of it.

Reads any QDQ or QOperator model, whoever wrote it. A QDQ pattern is a plan: the runtime's optimized graph says what
became of it, so that is run once, on zeros, when onnxruntime is installed.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8pass.inspect.facts import Node, Ran, RefusedLinear, SiteRow, Stage
from int8pass.inspect.report import Report, ReportError

PRODUCTS = {"MatMul": (0, 1), "Gemm": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3), "QGemm": (0, 3)}
"""Op → positions of the activation and of the weight."""
_THROUGH = {"Transpose", "Reshape", "Identity", "Cast", "Squeeze", "Unsqueeze"}
_INT8 = {2, 3}  # TensorProto.UINT8, INT8
NOTE = "ONNX Runtime's optimized graph, one run on zeros with dynamic sizes of {size}, CPU"
_SIZE = 16


@dataclass(frozen=True)
class _Graph:
    """An ONNX graph with what is asked of it again and again."""

    nodes: tuple[Any, ...]
    made_by: dict[str, Any]
    initializers: dict[str, Any]
    shapes: dict[str, str]

    def through(self, name: str) -> tuple[str, Any]:
        """The value behind views and casts, and the node that makes it."""
        node = self.made_by.get(name)
        while node is not None and node.op_type in _THROUGH:
            name = node.input[0]
            node = self.made_by.get(name)
        return name, node

    def constant(self, name: str) -> Any:
        """The initializer behind a value, seen through DequantizeLinear; None when it is computed."""
        name, node = self.through(name)
        if node is not None and node.op_type == "DequantizeLinear":
            name, node = self.through(node.input[0])
        return self.initializers.get(name)


def inspect_onnx(path: str | Path, run: bool = True) -> Report:
    """The report of an ONNX file. With `run`, it is also run once in ONNX Runtime, if that is installed.

    Raises:
        ReportError: onnx is not installed, or the file is missing or damaged.
    """
    model, graph = _read(Path(path))
    sites, refused = list[SiteRow](), list[RefusedLinear]()
    for node in graph.nodes:
        if node.op_type in PRODUCTS:
            found = _product(node, graph)
            (sites if isinstance(found, SiteRow) else refused).append(found)  # type: ignore[arg-type]
    opsets = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import)
    ops = Counter(node.op_type for node in graph.nodes)
    settings = {
        "model": Path(path).name, "producer": f"{model.producer_name} {model.producer_version}".strip() or "unknown",
        "opset": opsets, "nodes": str(len(graph.nodes)),
        "quantize / dequantize": f"{ops['QuantizeLinear'] + ops['DynamicQuantizeLinear']} / {ops['DequantizeLinear']}",
    }  # fmt: skip
    runtime, note = _ran(Path(path), [site.name for site in sites]) if run else ([], "")
    return Report(
        f"ONNX file ({opsets})", 1, tuple(sites), tuple(refused), {}, settings,
        stages=(_stage(graph),), runtime=tuple(runtime), runtime_note=note,
    )  # fmt: skip


def _read(path: Path) -> tuple[Any, _Graph]:
    try:
        import onnx
    except ModuleNotFoundError as missing:
        raise ReportError(f"an .onnx file needs {missing.name}: pip install 'int8pass[onnx]'") from missing
    if not path.is_file():
        raise ReportError(f"there is no file {path}")
    try:
        model = onnx.load(str(path), load_external_data=False)  # sizes and types suffice, and files may be large
        inferred = onnx.shape_inference.infer_shapes(model) if path.stat().st_size < 2**30 else model
    except Exception as failure:  # protobuf's errors differ by its version
        raise ReportError(f"{path} is no ONNX model, or damaged: {failure}") from failure
    if not model.graph.node:
        raise ReportError(f"{path} holds no graph: it is no ONNX model, or damaged")
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    shapes = {v.name: _shape(v, onnx) for v in values}
    nodes = tuple(model.graph.node)
    made_by = {name: node for node in nodes for name in node.output}
    return model, _Graph(nodes, made_by, {i.name: i for i in model.graph.initializer}, shapes)


def _shape(value: Any, onnx: Any) -> str:
    tensor = value.type.tensor_type
    dims = [d.dim_param or str(d.dim_value) for d in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}[{', '.join(dims)}]"


def _product(node: Any, graph: _Graph) -> SiteRow | RefusedLinear:
    """A row for an int8 product, a refusal for a float one with a constant weight."""
    x_at, w_at = PRODUCTS[node.op_type]
    weight = graph.constant(node.input[w_at])
    name = node.name or node.output[0]
    if weight is None or len(weight.dims) != 2:
        kind = "both operands are activations" if weight is None else f"its weight has {len(weight.dims)} dimensions"
        return RefusedLinear(name, f"{node.op_type}: {kind}", _origin(node))
    if weight.data_type not in _INT8:
        reason = f"{node.op_type}: its weight is float, there is no DequantizeLinear on it"
        return RefusedLinear(name, reason, _origin(node))
    transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
    transposed ^= _flips(node.input[w_at], graph)
    n, k = (weight.dims[0], weight.dims[1]) if transposed else (weight.dims[1], weight.dims[0])
    _, source = graph.through(node.input[x_at])
    scheme = _scheme(node, source, graph, w_at)
    made = source.op_type if source is not None else "input"
    if source is not None and source.op_type == "DequantizeLinear":
        _, quantize = graph.through(source.input[0])
        made = _producer(quantize, graph)
    size = int(n) * int(k)
    return SiteRow(
        name, made, (name,), (int(n), int(k)), scheme, 0, "", (), source=_origin(node),
        bytes=(4 * size, size + 4 * int(n)),
    )  # fmt: skip


def _producer(quantize: Any, graph: _Graph) -> str:
    """What makes the value that is quantized."""
    if quantize is None:
        return "input"
    _, source = graph.through(quantize.input[0])
    return str(source.op_type) if source is not None else "input"


def _flips(name: str, graph: _Graph) -> bool:
    """True when an odd number of Transposes stands between a product and its constant."""
    flips, node = False, graph.made_by.get(name)
    while node is not None:
        flips ^= node.op_type == "Transpose"
        node = graph.made_by.get(node.input[0])
    return flips


def _scheme(node: Any, source: Any, graph: _Graph, w_at: int) -> str:
    if node.op_type in {"MatMulInteger"}:
        return "w8a8 dynamic" if source is not None and source.op_type == "DynamicQuantizeLinear" else "w8a8 integers"
    if node.op_type.startswith("Q"):
        return "w8a8 static"
    _, weight = graph.through(node.input[w_at])
    scale = graph.initializers.get(weight.input[1]) if weight is not None else None
    channels = "per channel" if scale is not None and len(scale.dims) == 1 and scale.dims[0] > 1 else "per tensor"
    if source is None or source.op_type != "DequantizeLinear":
        return f"w8a16 {channels}"
    static = source.input[1] in graph.initializers
    return f"w8a8 {'static' if static else 'dynamic'}, weights {channels}"


def _origin(node: Any) -> str:
    """The source line or module that an exporter noted on a node."""
    noted = {p.key: p.value for p in getattr(node, "metadata_props", ())}
    for key in ("pkg.torch.onnx.stack_trace", "int8pass.source"):
        lines = [line.strip() for line in noted.get(key, "").splitlines() if line.strip()]
        if lines:
            return lines[-1]
    return noted.get("namespace", "")


def _stage(graph: _Graph) -> Stage:
    nodes = []
    for node in graph.nodes:
        name = node.name or node.output[0]
        inputs = tuple(graph.made_by[i].name or graph.made_by[i].output[0] for i in node.input if i in graph.made_by)
        shape = graph.shapes.get(node.output[0], "") if node.output else ""
        code = f"{', '.join(node.output)} = {node.op_type}({', '.join(node.input)})"
        site = name if node.op_type in PRODUCTS else ""
        nodes.append(Node(name, node.op_type, inputs, shape, _module(name), -1, code, site))
    return Stage("onnx", 0, tuple(nodes))


def _module(name: str) -> str:
    """Exporters write the module path into the node's name: `/model/layers.0/mlp/MatMul`."""
    return ".".join(part for part in name.split("/")[:-1] if part)


def _ran(path: Path, sites: Sequence[str]) -> tuple[list[Ran], str]:
    """One profiled run in ONNX Runtime: a row per node of the optimized graph."""
    try:
        import numpy
        import onnxruntime
    except ModuleNotFoundError as missing:
        return [], f"not run: {missing.name} is not installed (pip install 'int8pass[onnx]')"
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            feeds = {i.name: _zeros(i, numpy) for i in session.get_inputs()}
            session.run(None, feeds)
            session.run(None, feeds)
        except Exception as failure:  # noqa: BLE001  onnxruntime raises classes of its own for every status
            return [], f"ONNX Runtime does not run it: {str(failure).splitlines()[0]}"
        events = json.loads(Path(session.end_profiling()).read_text())
    return list(_rows(events, sites)), NOTE.format(size=_SIZE)


def _zeros(value: Any, numpy: Any) -> Any:
    kinds = {"float": "float32", "double": "float64", "float16": "float16"}
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    shape = [d if isinstance(d, int) else _SIZE for d in value.shape]
    return numpy.zeros(shape, kinds.get(kind, kind))


def _rows(events: list[Any], sites: Sequence[str]) -> Iterator[Ran]:
    """The second run's kernels, the slowest first. What was fused keeps the name of a node it was made from."""
    last: dict[str, Any] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            last[event["name"].removesuffix("_kernel_time")] = event
    for name, event in sorted(last.items(), key=lambda item: -item[1]["dur"]):
        arguments = event["args"]
        provider = str(arguments.get("provider", "")).removesuffix("ExecutionProvider")
        size = int(arguments.get("parameter_size", 0) or 0)
        op, seconds = str(arguments.get("op_name", "")), event["dur"] * 1e-6
        site = max((s for s in sites if _made_of(name, s)), key=len, default="")
        yield Ran(name, op, f"onnxruntime {provider}", 1, seconds, size, site)


def _made_of(name: str, node: str) -> bool:
    """True for a node of the optimized graph named after a node of the file, with or without an addition."""
    return name == node or (name.startswith(node) and not name[len(node)].isalnum())


__all__ = ["inspect_onnx"]
