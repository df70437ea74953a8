"""Export of calibrated recipes: static activations, one scale per tensor, groups of weight columns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import tiny_llama
import torch
from harness import relative_error, run_pass
from torch import Tensor, nn

import int8pass
from int8pass import example_inputs, hub
from int8pass.errors import ExportError, UnsupportedError
from int8pass.qdq.rewrite import activation_quantizers, constant_of
from int8pass.recipe import Recipe


class Mlp(nn.Module):
    """A norm, two linears that share it, and a Relu whose range begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(torch.relu(self.up(x + self.q(y) * self.k(y))))


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().eval()


def kernels(made: int8pass.Export) -> list[list[str]]:
    assert made.verification is not None
    return [sorted(set(result.kernels)) for result in made.verification.results]


def zero_points(made: int8pass.Export) -> list[tuple[ir.DataType, int]]:
    found = (constant_of(q.inputs[2]) for q in activation_quantizers(ir.load(made.path)))
    return [(z.dtype, int(z.numpy())) for z in found if z is not None]


@pytest.mark.parametrize(("shape", "kernel"), [((9, 64), "QGemm"), ((2, 9, 64), "MatMulIntegerToFloat")])
@pytest.mark.parametrize("symmetric", [False, True])
def test_static_activations(shape: tuple[int, ...], kernel: str, symmetric: bool, tmp_path: Path) -> None:
    model, batches = mlp(), [torch.randn(*shape) for _ in range(2)]
    start = Recipe.preset("smoothquant-o3").override(symmetric=symmetric)
    recipe = int8pass.calibrate(model, batches, start)
    made = int8pass.export_onnx(model, batches[0], tmp_path / "m.onnx", recipe=recipe, target="portable")
    assert kernels(made)[0] == [kernel]
    assert all("I8" in name for name in kernels(made)[1])
    found = zero_points(made)
    assert len(found) == 3  # q and k read one
    assert all(dtype == ir.DataType.UINT8 for dtype, _ in found)
    assert [point == 128 for _, point in found] == [symmetric] * 3 or not symmetric
    assert symmetric or found[-1][1] == 0  # after the Relu


def test_static_activations_for_tensorrt_are_symmetric(tmp_path: Path) -> None:
    model, batches = mlp(), [torch.randn(2, 9, 64) for _ in range(2)]
    recipe = int8pass.calibrate(model, batches, "smoothquant-o3")
    made = int8pass.export_onnx(model, batches[0], tmp_path / "m.onnx", recipe=recipe, target="tensorrt")
    assert zero_points(made) == [(ir.DataType.INT8, 0)] * 3
    stored = ir.load(made.path)
    for quantizer in activation_quantizers(stored):
        scale = constant_of(quantizer.inputs[1])
        assert scale is not None
        assert scale.numpy().size == 1
        assert float(scale.numpy()) != 1.0
    assert not any(v.dtype == ir.DataType.INT32 for v in stored.graph.initializers.values())  # biases are float


def test_one_dynamic_scale_per_tensor(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(2, 9, 64)
    recipe = Recipe(dataclasses.replace(Recipe.preset("w8a8").scheme, activations="per_tensor"))
    made = int8pass.export_onnx(model, x, tmp_path / "m.onnx", recipe=recipe, target="portable")
    assert kernels(made)[0] == ["MatMulIntegerToFloat"]
    assert all("I8" in name for name in kernels(made)[1])


def test_calibrated_at_length_128_and_run_at_length_1(tmp_path: Path) -> None:
    model = tiny_llama.model()
    texts = [torch.randint(0, 256, (1, 128), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    recipe = int8pass.calibrate(model, [{"input_ids": ids} for ids in texts], "smoothquant-o3")
    example = example_inputs.prefill(model, texts[0])
    made = int8pass.export_onnx(
        model, example.args, tmp_path / "m.onnx", recipe=recipe, target="portable",
        dynamic_shapes=example.dynamic_shapes,
    )  # fmt: skip
    assert len(made.linears) == 7
    assert kernels(made)[0] == ["MatMulIntegerToFloat"]
    session = onnxruntime.InferenceSession(str(made.path))
    errors = {}
    for length in (1, 128):
        ids = torch.cat([t[:, :length] for t in texts])[:1]
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        (found,) = session.run(None, {"input_ids": ids.numpy()})
        errors[length] = relative_error(torch.from_numpy(found), expected)
    assert errors[128] < 0.02
    assert errors[1] < 0.1, errors  # 20 dB; files of tools that quantize every tensor come out at 5 to 9


class Collapsing(nn.Module):
    """A sum over the length, which a range of long inputs does not fit at length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x.sum(dim=1, keepdim=True) * x.shape[1])) * x.shape[1] ** 2)


def test_a_static_file_that_collapses_at_length_1_is_refused_with_advice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Collapsing().eval(), torch.randn(2, 64, 64)
    recipe = int8pass.calibrate(model, [x], Recipe.preset("smoothquant-o3").override(clipping="minmax", alpha=0.0))
    axes = ({1: torch.export.Dim("length", min=2, max=128)},)
    path = tmp_path / "m.onnx"
    options = {"target": "portable", "quantize_head": True}
    with pytest.raises(ExportError, match=r"smallest sizes \(2×1×64\)[\s\S]*COLLAPSED there: the static ranges.*w8a8"):
        int8pass.export_onnx(model, x, path, recipe=recipe, dynamic_shapes=axes, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    int8pass.export_onnx(model, x, path, recipe="w8a8", dynamic_shapes=axes, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_minilm_calibrated_in_both_runtimes(tmp_path: Path) -> None:
    model, tokenizer = hub.load("minilm")
    windows = hub.windows(tokenizer, 64)
    example = example_inputs.prefill(model, windows[:1])
    batches = [{"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]} for w in windows[100:102]]
    recipe = int8pass.calibrate(model, batches, Recipe.preset("smoothquant-o3").override(clipping="minmax"))
    made = int8pass.export_onnx(
        model, example.args, tmp_path / "m.onnx", recipe=recipe, target="portable",
        dynamic_shapes=example.dynamic_shapes,
    )  # fmt: skip
    assert made.verification is not None
    assert [result.planned for result in made.verification.results] == [37, 37]
    assert kernels(made)[0] == ["MatMulIntegerToFloat", "QGemm"]  # the pooler's input has two dimensions


@pytest.mark.parametrize("activations", ["per_token", "none"])
def test_groups_are_refused(activations: str, tmp_path: Path) -> None:
    recipe = Recipe.preset("zeroquant").override(activations=activations)
    with pytest.raises(UnsupportedError, match=r"trap T7.*per_channel"):
        int8pass.export_onnx(mlp(), torch.randn(2, 9, 64), tmp_path / "m.onnx", recipe=recipe)
    assert not list(tmp_path.iterdir())


class Tied(nn.Module):
    """A model whose head reads the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.norm = nn.Embedding(48, 32), nn.Linear(32, 32), nn.LayerNorm(32)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(self.embed(ids))))


def test_a_head_that_shares_the_embedding_has_one_name_however_it_is_captured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tied = Tied().eval().requires_grad_(False)
    data = [torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    start = dataclasses.replace(Recipe.preset("smoothquant-o3"), quantize_head=True)
    found = int8pass.calibrate(tied, data, start)
    assert sorted(found.sites) == ["head", "inner"]
    assert sorted(found.tensors) == ["head", "inner"]
    assert relative_error(run_pass(tied, data[0], found).output, tied(data[0])) < 0.05
    made = int8pass.export_onnx(tied, data[0], tmp_path / "m.onnx", recipe=found, target="portable", quantize_head=True)
    assert sorted(made.linears) == ["head", "inner"]
