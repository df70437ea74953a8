"""Lint and --fix on files of ONNX Runtime's own quantizer, and on graphs that hold one trap each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization as ort_quantization
from typer.testing import CliRunner

from int8pass.cli import app
from int8pass.errors import ExportError
from int8pass.qdq.lint import fix, lint

K, N, ROWS = 64, 96, 9
UNSIGNED = np.uint8(128)
Arrays = dict[str, np.ndarray]


def model(nodes: list[Any], constants: Arrays, shape: list[Any], outputs: int = 1, opset: int = 21) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(outputs)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def network(path: Path) -> Path:
    """q and k of one input, an MLP with a Relu, in float."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "wq"], ["q"], name="/attn/q/MatMul"),
        node("MatMul", ["x", "wk"], ["k"], name="/attn/k/MatMul"),
        node("Mul", ["q", "k"], ["p"]), node("MatMul", ["p", "wu"], ["u"], name="/mlp/up/MatMul"),
        node("Relu", ["u"], ["r"]), node("MatMul", ["r", "wd"], ["y0"], name="/mlp/down/MatMul"),
    ]  # fmt: skip
    weights = {"wq": floats(K, K), "wk": floats(K, K)[::-1].copy(), "wu": floats(K, N), "wd": floats(N, K)}
    onnx.save(model(nodes, weights, [1, "length", K]), path)
    return path


class Batches(ort_quantization.CalibrationDataReader):
    def __init__(self) -> None:
        self._batches: Iterator[Any] = iter([{"x": floats(1, ROWS, K)}])

    def get_next(self) -> Any:
        return next(self._batches, None)


def run(path: Path, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options).run(None, {"x": x})


def test_quantize_static_by_default_leaves_q_and_k_in_float_and_fix_repairs_it(tmp_path: Path) -> None:
    path = tmp_path / "static.onnx"
    ort_quantization.quantize_static(
        network(tmp_path / "f.onnx"), path, Batches(), op_types_to_quantize=["MatMul"], per_channel=True
    )
    found = lint(path)
    fallen = {f.linear: [t.id for t in f.traps] for f in found.findings if not f.int8}
    assert {"attn.q": ["T2"], "attn.k": ["T2"]}.items() <= fallen.items()
    assert not found.passed
    assert "trap" not in str(found)
    assert "T2" in str(found)
    before = run(path, floats(1, ROWS, K))[0]
    repaired = tmp_path / "fixed.onnx"
    assert fix(path, repaired)["T2"] > 0
    still = {f.linear for f in lint(repaired).findings if not f.int8}
    assert not {"attn.q", "attn.k"} & still
    np.testing.assert_allclose(run(repaired, floats(1, ROWS, K))[0], before, rtol=1e-4, atol=1e-3)


def test_quantize_static_with_unsigned_activations_passes(tmp_path: Path) -> None:
    path = tmp_path / "static.onnx"
    ort_quantization.quantize_static(
        network(tmp_path / "f.onnx"), path, Batches(), op_types_to_quantize=["MatMul"], per_channel=True,
        activation_type=ort_quantization.QuantType.QUInt8,
    )  # fmt: skip
    assert lint(path).passed
    assert lint(path, "openvino").passed
    broken = lint(path, "tensorrt")
    assert {t.id for f in broken.findings for t in f.traps} == {"TRT-zero"}


def test_quantize_dynamic_runs_in_int8_in_one_runtime_and_in_float_in_the_other(tmp_path: Path) -> None:
    path = tmp_path / "dynamic.onnx"
    ort_quantization.quantize_dynamic(network(tmp_path / "f.onnx"), path)
    assert lint(path).passed
    found = lint(path, "openvino")
    assert not any(f.int8 for f in found.findings)
    assert all("DQL" in [t.id for t in f.traps] for f in found.findings)


def linear(
    *,
    zero: Any = UNSIGNED,
    shape: tuple[Any, ...] = (ROWS, K),
    transposed: bool = False,
    bias: str = "",
    readers: int = 1,
) -> onnx.ModelProto:
    """`readers` products of one quantized input, each with the bias asked for ("", "float")."""
    node, nodes = helper.make_node, []
    weight = np.clip(np.rint(floats(N, K) * 40), -127, 127).astype(np.int8)
    constants: Arrays = {"sx": np.array(0.03, np.float32), "sw": np.full(N, 0.01, np.float32)}
    constants["wz"] = np.zeros(N, np.int8)
    point = [] if zero is None else ["zx"]
    constants |= {} if zero is None else {"zx": np.array(zero)}
    attributes = {"output_dtype": TensorProto.INT8} if zero is None else {}
    nodes += [node("QuantizeLinear", ["x", "sx", *point], ["xq"], **attributes),
              node("DequantizeLinear", ["xq", "sx", *point], ["xd"])]  # fmt: skip
    for i in range(readers):
        constants[f"m{i}.w"] = weight if transposed else np.ascontiguousarray(weight.T)
        axis = 0 if transposed else 1
        nodes.append(node("DequantizeLinear", [f"m{i}.w", "sw", "wz"], [f"wd{i}"], axis=axis))
        if transposed:
            nodes.append(node("Transpose", [f"wd{i}"], [f"wt{i}"], perm=[1, 0]))
        product = f"p{i}" if bias else f"y{i}"
        nodes.append(node("MatMul", ["xd", f"wt{i}" if transposed else f"wd{i}"], [product], name=f"/m{i}/MatMul"))
        if bias:
            constants[f"b{i}"] = floats(N)
            nodes.append(node("Add", [product, f"b{i}"], [f"y{i}"]))
    return model(nodes, constants, list(shape), readers)


CASES: list[tuple[str, str, Callable[[], onnx.ModelProto]]] = [
    ("float bias, rank 2", "T1", lambda: linear(bias="float")),
    ("float bias, static rank 3", "T1", lambda: linear(bias="float", shape=(2, ROWS, K))),
    ("signed and shared", "T2", lambda: linear(zero=np.int8(0), readers=3, shape=(1, "length", K))),
    ("no zero point", "T6", lambda: linear(zero=None)),
]


@pytest.mark.parametrize(("name", "trap", "make"), CASES, ids=[c[0] for c in CASES])
def test_a_trap_is_named_and_fixed(name: str, trap: str, make: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    path, x = tmp_path / "m.onnx", floats(1, ROWS, K)
    onnx.save(make(), path)
    if "rank 2" in name or trap == "T6":
        x = x[0]
    elif "static" in name:
        x = np.concatenate([x, -x])
    found = lint(path)
    assert not any(f.int8 for f in found.findings), str(found)
    assert all(f.traps[0].id == trap for f in found.findings), str(found)
    before = run(path, x)
    fix(path)
    assert lint(path).passed, str(lint(path))
    for left, right in zip(run(path, x), before, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=2e-3)


def test_transposed_weights_run_in_int8_but_load_slowly(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(linear(transposed=True, shape=(1, "length", K)), path)
    found = lint(path)
    assert found.passed
    assert "warning T9" in str(found)
    before = run(path, floats(1, ROWS, K))
    assert fix(path) == {"T9": 1}
    assert not any(n.op_type == "Transpose" for n in onnx.load(path).graph.node)
    np.testing.assert_allclose(run(path, floats(1, ROWS, K))[0], before[0], rtol=1e-5, atol=1e-5)


def test_a_relu_before_a_quantizer_is_named_and_fixed(tmp_path: Path) -> None:
    made = linear(bias="", shape=(1, "length", K))
    node = helper.make_node
    made.graph.node.extend([
        node("Relu", ["y0"], ["r"]), node("QuantizeLinear", ["r", "sx", "zx"], ["rq"]),
        node("DequantizeLinear", ["rq", "sx", "zx"], ["y1"]),
    ])  # fmt: skip
    made.graph.output[0].name = "y1"
    path = tmp_path / "m.onnx"
    onnx.save(made, path)
    found = lint(path)
    assert [[t.id for t in f.traps] for f in found.findings if not f.int8] == [["T3"]], str(found)
    before = run(path, floats(1, ROWS, K))[0]
    assert fix(path)["T3"] == 1
    assert lint(path).passed
    np.testing.assert_allclose(run(path, floats(1, ROWS, K))[0], before, rtol=1e-3, atol=0.031)


def test_signed_integers_multiply_slowly(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("MatMulInteger", ["q", "w"], ["a"], name="m"),
        node("Cast", ["a"], ["y0"], to=TensorProto.FLOAT),
    ]  # fmt: skip
    weight = np.clip(np.rint(floats(K, N) * 40), -127, 127).astype(np.int8)
    constants = {"s": np.array(0.03, np.float32), "z": np.array(0, np.int8), "w": weight}
    path = tmp_path / "m.onnx"
    onnx.save(model(nodes, constants, [ROWS, K]), path)
    assert [t.id for f in lint(path).findings for t in f.traps] == ["T4"]
    before = run(path, floats(ROWS, K))[0]
    fix(path)
    assert lint(path).passed
    np.testing.assert_array_equal(run(path, floats(ROWS, K))[0], before)


def replaced(made: onnx.ModelProto, **arrays: np.ndarray) -> onnx.ModelProto:
    """The model with other constants."""
    for stored in made.graph.initializer:
        if stored.name in arrays:
            stored.CopyFrom(numpy_helper.from_array(arrays[stored.name], stored.name))
    return made


def test_a_model_that_does_not_load_is_named_and_fixed(tmp_path: Path) -> None:
    made = linear(zero=np.int8(0), shape=(2, ROWS, K))
    made.graph.node[-1].output[0] = "product"
    bias = {"b": np.arange(N, dtype=np.int32), "bs": np.full(N, 3e-4, np.float32), "bz": np.zeros(N, np.int32)}
    made.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in bias.items())
    made.graph.node.extend([
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
        helper.make_node("Add", ["product", "bd"], ["y0"]),
    ])  # fmt: skip
    path = tmp_path / "m.onnx"
    onnx.save(made, path)
    found = lint(path)
    assert "cannot load" in found.does_not_load
    assert [[t.id for t in f.traps] for f in found.findings] == [["T5"]]
    assert fix(path) == {"T5": 1}
    assert lint(path).passed, str(lint(path))
    x = floats(2, ROWS, K)
    codes = np.clip(np.rint(x / np.float32(0.03)), -128, 127) * 0.03
    weight = numpy_helper.to_array(next(i for i in made.graph.initializer if i.name == "m0.w")) * 0.01
    np.testing.assert_allclose(run(path, x)[0], codes @ weight + np.arange(N) * 3e-4, rtol=1e-3, atol=2e-3)


def test_weights_in_blocks_with_quantized_activations_fail_when_run(tmp_path: Path) -> None:
    made = linear(shape=(1, "length", K))
    (read,) = (n for n in made.graph.node if n.input[0] == "m0.w")
    del read.attribute[:]
    read.attribute.extend([helper.make_attribute("axis", 0), helper.make_attribute("block_size", 32)])
    replaced(made, sw=np.full((K // 32, N), 0.01, np.float32), wz=np.zeros((K // 32, N), np.int8))
    path = tmp_path / "m.onnx"
    onnx.save(made, path)
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):  # what a user would meet
        onnxruntime.InferenceSession(str(path)).run(None, {"x": floats(1, ROWS, K)})
    found = lint(path)
    assert not found.passed
    assert [[t.id for t in f.traps] for f in found.findings] == [["T7"]]


def test_half_precision_around_the_integers_runs_in_float(tmp_path: Path) -> None:
    made = replaced(linear(shape=(1, "length", K)), sx=np.array(0.03, np.float16), sw=np.full(N, 0.01, np.float16))
    for value in (made.graph.input[0], made.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    path = tmp_path / "m.onnx"
    onnx.save(made, path)
    found = lint(path)
    assert not any(f.int8 for f in found.findings)
    assert [[t.id for t in f.traps] for f in found.findings] == [["T8"]]


def test_rules_of_tensorrt(tmp_path: Path) -> None:
    def broken(made: onnx.ModelProto) -> list[list[str]]:
        path = tmp_path / "m.onnx"
        onnx.save(made, path)
        return [[t.id for t in f.traps] for f in lint(path, "tensorrt").findings]

    shape = (1, ROWS, K)
    assert broken(linear(zero=np.int8(0), shape=shape)) == [[]]
    assert broken(linear(zero=np.int8(3), shape=shape)) == [["TRT-zero"]]
    scales = {"sx": np.full(ROWS, 0.03, np.float32), "zx": np.zeros(ROWS, np.int8)}
    assert broken(replaced(linear(zero=np.int8(0), shape=shape), **scales)) == [["TRT-axis"]]  # axis 1: the rows
    tiny = {"m0.w": np.ones((K, 8), np.int8), "sw": np.ones(8, np.float32), "wz": np.zeros(8, np.int8)}
    assert broken(replaced(linear(zero=np.int8(0), shape=shape), **tiny)) == [["TRT-tiny"]]


def test_the_command_says_what_runs_by_its_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(linear(bias="float"), path)
    invoke = CliRunner().invoke
    found = invoke(app, ["lint", str(path)])
    assert found.exit_code == 1
    assert "FLOAT" in found.output
    assert "T1" in found.output
    repaired = tmp_path / "fixed.onnx"
    found = invoke(app, ["lint", str(path), "--fix", "-o", str(repaired)])
    assert found.exit_code == 0, found.output
    assert "fixed T1: 1 places" in found.output
    assert invoke(app, ["lint", str(repaired)]).exit_code == 0


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_what_is_no_model(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=r"no file|no ONNX model"):
        lint(path)


def test_nothing_quantized_does_not_pass(tmp_path: Path) -> None:
    found = lint(network(tmp_path / "f.onnx"))
    assert not found.passed
    assert "no linear reads a quantized weight" in str(found)
