"""What an exported graph no longer computes, and that its numbers stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from harness import relative_error
from torch import Tensor, nn

import int8pass
from int8pass.qdq import runtimes, simplify


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


@pytest.fixture(scope="module", params=["portable", "openvino"])
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


@pytest.mark.parametrize("exported", ["portable"], indirect=True)  # one node elsewhere
def test_the_bias_of_keys_is_not_added(exported: tuple[Encoder, Path]) -> None:
    names = {str(v.name) for v in ir.load(exported[1]).graph.initializers.values()}
    assert "q.bias" in names
    assert "v.bias" in names
    assert "k.bias" not in names


@pytest.mark.parametrize("exported", ["portable"], indirect=True)  # one node elsewhere
def test_values_are_made_beside_queries_and_keys(exported: tuple[Encoder, Path]) -> None:
    """By ONNX Runtime, in whose order of execution softmax comes after the three."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(exported[1].with_name("optimized.onnx"))
    onnxruntime.InferenceSession(str(exported[1]), options)
    order = [node.op_type for node in ir.load(options.optimized_model_filepath).graph]
    assert order[: order.index("Softmax")].count("MatMulIntegerToFloat") == 3


@pytest.mark.parametrize("size", [(1, 1), (2, 12), (3, 40)])
def test_numbers_stay_also_where_all_is_masked(exported: tuple[Encoder, Path], size: tuple[int, int]) -> None:
    model, path = exported
    x, mask = torch.randn(*size, 64, generator=torch.Generator().manual_seed(1)), torch.ones(*size, dtype=torch.int64)
    mask[0, size[1] // 2 :] = 0
    if size[0] > 1:
        mask[1] = 0  # nothing to attend to: the result is the bias of the output projection
    with torch.no_grad():
        expected = model(x, mask)
    runtime = "openvino" if path.stem == "openvino" else "onnxruntime"
    (found,) = runtimes.open_in(runtime, path, []).run([x.numpy(), mask.numpy()])
    assert not np.isnan(found).any()
    assert relative_error(torch.from_numpy(found), expected) < 0.03


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


def test_a_product_with_a_mask_of_heads_stays(tmp_path: Path) -> None:
    """The mask of a head cannot be moved to where heads are one row."""

    class Heads(Encoder):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (self._heads(linear(x)) for linear in (self.q, self.k, self.v))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.norms[0](self.o(y.transpose(1, 2).reshape(x.shape)) + x)

    torch.manual_seed(0)
    model, x, mask = Heads().eval(), torch.randn(2, 12, 64), torch.ones(2, 4, 12, 12, dtype=torch.bool)
    mask[1, 2] = False
    made = int8pass.export_onnx(
        model, {"x": x, "mask": mask}, tmp_path / "m.onnx", recipe="w8a8", target="portable", quantize_head=True
    )
    assert counts(made.path)["Squeeze"] == 0
    assert made.verification is not None
    assert made.verification.passed
