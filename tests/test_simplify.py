"""What an exported graph no longer computes, and that its numbers stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from harness import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

import int8pass
from int8pass.qdq import runtimes, simplify

BOUNDED = {
    "gelu": (nn.GELU(), 0.1701), "gelu, tanh": (nn.GELU("tanh"), 0.1701), "relu": (nn.ReLU(), 1e-6),
    "silu": (nn.SiLU(), 0.2785), "sigmoid": (nn.Sigmoid(), 1e-6), "softmax": (nn.Softmax(-1), 1e-6),
}  # fmt: skip
"""Activations whose results are never far below zero, and how far that may be."""


class Encoder(nn.Module):
    """Attention with a mask of padding, an MLP, both with residuals: as encoders are written."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 128), nn.Linear(128, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, columns = torch.arange(mask.shape[0]), torch.arange(mask.shape[1])
        kept = mask.bool()[rows[:, None, None, None], columns[None, None, None, :]]
        kept = (columns[None, None, :, None] >= 0) & kept
        q, k, v = (self._heads(linear(x)) for linear in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)
        x = self.norms[0](self.o(y.transpose(1, 2).reshape(x.shape)) + x)
        return self.norms[1](self.down(torch.nn.functional.gelu(self.up(x))) + x)


@pytest.fixture(scope="module", params=["portable", "onnxruntime", "openvino"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Path]:
    torch.manual_seed(0)
    model = Encoder().eval()
    batch, length = torch.export.Dim("batch", max=8), torch.export.Dim("length", max=64)
    shapes = {"x": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    args = {"x": torch.randn(2, 12, 64), "mask": torch.ones(2, 12, dtype=torch.int64)}
    path = tmp_path_factory.mktemp("simplify") / f"{request.param}.onnx"
    int8pass.export_onnx(
        model, args, path, recipe="w8a8", target=request.param, dynamic_shapes=shapes, quantize_head=True
    )
    return model, path


def counts(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph)


def test_no_gather_and_no_comparison_is_left_of_a_mask(exported: tuple[Encoder, Path]) -> None:
    found = counts(exported[1])
    assert not {"Range", "GatherND", "And", "GreaterOrEqual"} & set(found)


@pytest.mark.parametrize("exported", ["tensorrt"], indirect=True)  # elsewhere none are left
def test_reshapes_have_constant_sizes(exported: tuple[Encoder, Path]) -> None:
    model = ir.load(exported[1])
    reshapes = [node for node in model.graph if node.op_type == "Reshape"]
    assert len(reshapes) >= 4
    assert all(node.inputs[1].const_value is not None for node in reshapes)
    assert not simplify.constant_reshapes(model)


def test_one_reduction_is_enough_after_gelu(exported: tuple[Encoder, Path]) -> None:
    model = ir.load(exported[1])
    reduced = [node.inputs[0].producer() for node in model.graph if node.op_type == "ReduceMin"]
    assert len(reduced) == 3  # x, attention's result, the first norm's
    assert not any(made is not None and made.op_type == "Gelu" for made in reduced)


def test_norms_gelu_and_attention_are_single_nodes(exported: tuple[Encoder, Path]) -> None:
    found = counts(exported[1])
    assert [found[name] for name in ("LayerNormalization", "Gelu", "Attention", "Softmax", "Erf")] == [2, 1, 1, 0, 0]


def test_attention_takes_rows_and_gives_rows(exported: tuple[Encoder, Path]) -> None:
    model = ir.load(exported[1])
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert [attention.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads")] == [4, 4]
    made = [value.producer().op_type for value in attention.inputs[:3]]  # type: ignore[union-attr]
    assert made == ["Add", "Mul", "Add"]  # keys have no bias
    turned = [node.inputs[0] for node in model.graph if node.op_type == "Transpose"]
    assert len(turned) == 1  # the mask of rows
    assert turned[0] is not None
    assert turned[0].producer().op_type == "ReduceMax"  # type: ignore[union-attr]


def test_the_bias_of_keys_is_not_added(exported: tuple[Encoder, Path]) -> None:
    names = {str(v.name) for v in ir.load(exported[1]).graph.initializers.values()}
    assert "q.bias" in names
    assert "v.bias" in names
    assert "k.bias" not in names


@pytest.mark.parametrize("size", [(1, 1), (2, 12), (3, 40)])
def test_numbers_stay_also_where_all_is_masked(exported: tuple[Encoder, Path], size: tuple[int, int]) -> None:
    """In either runtime, whichever the file is for."""
    model, path = exported
    x, mask = torch.randn(*size, 64, generator=torch.Generator().manual_seed(1)), torch.ones(*size, dtype=torch.int64)
    mask[0, size[1] // 2 :] = 0
    if size[0] > 1:
        mask[1] = 0  # nothing to attend to: the result is the bias of the output projection
    with torch.no_grad():
        expected = model(x, mask)
    for runtime in ("onnxruntime", "openvino"):
        (found,) = runtimes.open_in(runtime, path, []).run([x.numpy(), mask.numpy()])
        assert not np.isnan(found).any()
        assert relative_error(torch.from_numpy(found), expected) < 0.03


class Masked(Encoder):
    """Attention by the mask that is given."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self._heads(linear(x)) for linear in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.norms[0](self.o(y.transpose(1, 2).reshape(x.shape)) + x)


def export_masked(mask: Tensor, path: Path, target: str, recipe: str = "w8a8", model: nn.Module | None = None) -> Path:
    torch.manual_seed(0)
    args = {"x": torch.randn(2, 12, 64), "mask": mask}
    made = int8pass.export_onnx(
        model or Masked().eval(),
        args,
        path,
        recipe=recipe,
        target=target,
        quantize_head=True,  # type: ignore[arg-type]
    )
    assert made.verification is not None
    assert made.verification.passed
    return path


def test_values_are_made_beside_queries_and_keys(tmp_path: Path) -> None:
    """By ONNX Runtime, in whose order of execution softmax comes after the three."""
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(export_masked(mask, tmp_path / "m.onnx", "onnxruntime")), options)
    order = [node.op_type for node in ir.load(options.optimized_model_filepath).graph]
    assert order[: order.index("Softmax")].count("MatMulIntegerToFloat") == 3


@pytest.mark.parametrize(("recipe", "products"), [("w8a8", 0), ("w8a8-asymmetric", 0), ("w8a16", 1)])
def test_a_mask_of_rows_stays_where_rows_have_no_scale(recipe: str, products: int, tmp_path: Path) -> None:
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    mask[1, 0, 3] = False
    model = ir.load(export_masked(mask, tmp_path / "m.onnx", "portable", recipe))
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert "q_num_heads" in attention.attributes
    readers = [user for user, _ in attention.outputs[0].uses()]
    masked = [n for n in readers if n.op_type == "Mul" and n.inputs[1].producer().op_type == "Squeeze"]  # type: ignore[union-attr]
    assert len(masked) == products


def test_rows_with_nothing_above_zero_are_close_after_gelu(tmp_path: Path) -> None:
    """There the bound is larger than the row: an error of half a step of 0.17 / 127, and no more."""
    up, down = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        up.weight.copy_(torch.eye(64))
        up.bias.fill_(0.0)
        down.weight.copy_(torch.eye(64))
    model = nn.Sequential(up, nn.GELU(), down).eval()
    x = -torch.rand(3, 9, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    x[0] = 0.0
    made = int8pass.export_onnx(
        model, torch.randn(3, 9, 64), tmp_path / "m.onnx", recipe="w8a8", target="portable", quantize_head=True
    )
    (found,) = runtimes.open_in("onnxruntime", made.path, []).run([x.numpy()])
    with torch.no_grad():
        assert np.abs(found - model(x).numpy()).max() <= 0.1701 / 127


class Squash(nn.Module):
    """An activation, and a linear that hands on what it is given."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation, self.linear = activation, nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.activation(x))


@pytest.fixture(scope="module", params=[*BOUNDED])
def squashed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Squash, float, Any]:
    activation, bound = BOUNDED[request.param]
    model = Squash(activation).eval()
    path = tmp_path_factory.mktemp("squash") / "m.onnx"
    shapes = ({0: torch.export.Dim("rows", max=64)},)
    int8pass.export_onnx(
        model, torch.randn(3, 9, 32), path, recipe="w8a8", target="portable", dynamic_shapes=shapes, quantize_head=True
    )
    assert counts(path)["ReduceMin"] == 0
    return model, bound, runtimes.open_in("onnxruntime", path, [])


@given(rows=arrays(np.float32, (2, 9, 32), elements=st.floats(-40.0, 40.0, width=32)), shrink=st.integers(0, 12))
@settings(deadline=None, max_examples=30)
def test_codes_after_a_bounded_activation_cover_its_row(
    squashed: tuple[Squash, float, Any], rows: np.ndarray, shrink: int
) -> None:
    """No value is saturated: each is within half a step of the row's range, or of the bound where that is wider."""
    model, bound, opened = squashed
    x = rows * np.float32(2.0**-shrink)
    x[0] = -np.abs(x[0])  # nothing above zero
    with torch.no_grad():
        exact = model.activation(torch.from_numpy(x)).numpy()
    (found,) = opened.run([x])
    widest = np.maximum(np.abs(exact).max(-1, keepdims=True), bound)
    assert (np.abs(found - exact) <= 0.505 * widest / 127 + 1e-6).all()  # so exact are a runtime's own activations


def test_a_product_with_a_mask_of_heads_stays(tmp_path: Path) -> None:
    """The mask of a head cannot be moved to where heads are one row."""
    mask = torch.ones(2, 4, 12, 12, dtype=torch.bool)
    mask[1, 2] = False
    found = counts(export_masked(mask, tmp_path / "m.onnx", "portable"))
    assert found["Squeeze"] == 0
    assert found["Transpose"] == 4


def test_heads_that_are_not_views_of_rows_stay(tmp_path: Path) -> None:
    """Keys are scaled head by head after they are split: the node takes heads, and its keys keep their bias."""

    class Scaled(Masked):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (self._heads(linear(x)) for linear in (self.q, self.k, self.v))
            y = torch.nn.functional.scaled_dot_product_attention(q, k * self.scale, v, attn_mask=mask)
            return self.norms[0](self.o(y.transpose(1, 2).reshape(x.shape)) + x)

    torch.manual_seed(0)
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    path = export_masked(mask, tmp_path / "m.onnx", "portable", model=Scaled().eval())
    model = ir.load(path)
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert "q_num_heads" not in attention.attributes
    assert "k.bias" in {str(v.name).removesuffix(".wide") for v in model.graph.initializers.values()}
