"""Export: graph facts, kernels in both runtimes, numbers, refusals."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import tiny_llama
import torch
from architectures import EXPORTED, build
from harness import relative_error
from torch import Tensor, nn

import int8pass
from int8pass import example_inputs, hub
from int8pass.errors import CaptureError, ExportError, OptionError, UnsupportedError
from int8pass.qdq import files
from int8pass.qdq.linears import find
from int8pass.recipe import Recipe, SiteSettings


class Block(nn.Module):
    """A norm read by three linears, an MLP, biases and none: rank 2 and rank 3."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(64)
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(torch.nn.functional.gelu(self.up(x + self.q(y) * self.k(y) + self.v(y))))


def block(**options: Any) -> Block:
    torch.manual_seed(0)
    return Block(**options).eval()


def kernels(made: int8pass.Export) -> list[str]:
    assert made.verification is not None
    return [name for result in made.verification.results for name in result.kernels.elements()]


@pytest.mark.parametrize("recipe", ["default", "w8a8", "w8a8-asymmetric", "w8a16", "llm.int8"])
@pytest.mark.parametrize("shape", [(9, 64), (2, 9, 64)], ids=["rank2", "rank3"])
def test_every_scheme_runs_in_int8_in_both_runtimes(recipe: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(*shape)
    made = int8pass.export_onnx(block(), x, tmp_path / "m.onnx", recipe=recipe, target="portable")
    assert made.linears == ("q", "k", "v", "up", "down")
    assert made.verification is not None
    assert [r.planned for r in made.verification.results] == [5, 5]
    assert not any("float" in name and "FullyConnected" not in name for name in kernels(made))
    stored = ir.load(made.path)
    assert [tuple(linear.weight.shape.numpy()) for linear in find(stored)][-1] == (256, 64)  # [K, N]
    assert not any(n.op_type == "Transpose" for n in stored.graph)


def test_one_file_for_any_batch_and_length(tmp_path: Path) -> None:
    model, x = block(norm=nn.RMSNorm), torch.randn(2, 9, 64)
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=512)}
    made = int8pass.export_onnx(model, x, tmp_path / "m.onnx", recipe="w8a8", dynamic_shapes=(axes,))
    assert made.opset == 23
    assert sum(n.op_type == "RMSNormalization" for n in ir.load(made.path).graph) == 1
    session = onnxruntime.InferenceSession(str(made.path))
    for size in [(1, 1), (3, 40), (7, 128)]:
        y = torch.randn(*size, 64)
        (found,) = session.run(None, {"x": y.numpy()})
        assert relative_error(torch.from_numpy(found), model(y)) < 0.03


def test_mixed_settings_per_site(tmp_path: Path) -> None:
    recipe = Recipe.preset("w8a8")
    sites = {"up": SiteSettings(scheme=int8pass.recipe.PRESETS["w8a16"]), "down": SiteSettings(keep=True)}
    recipe = dataclasses.replace(recipe, sites=MappingProxyType(sites))
    made = int8pass.export_onnx(block(), torch.randn(2, 9, 64), tmp_path / "m.onnx", recipe=recipe)
    assert kernels(made).count("MatMulIntegerToFloat") == 3
    assert kernels(made).count("MatMulNBits") == 1
    assert "down" in made.refused


def test_calibrated_columns_are_a_gather_and_a_float_product(tmp_path: Path) -> None:
    model, batches = block(), [torch.randn(2, 9, 64) for _ in range(2)]
    recipe = int8pass.calibrate(model, batches, columns=4)
    made = int8pass.export_onnx(model, batches[0], tmp_path / "m.onnx", recipe=recipe, target="portable")
    names = [n.op_type for n in ir.load(made.path).graph]
    assert names.count("Gather") == 3  # one a site
    assert made.verification is not None
    assert made.verification.passed


def test_tensorrt_rules_hold(tmp_path: Path) -> None:
    made = int8pass.export_onnx(block(), torch.randn(2, 9, 64), tmp_path / "m.onnx", recipe="w8a8", target="tensorrt")
    assert made.opset == 21
    for node in ir.load(made.path).graph:
        if node.op_type == "QuantizeLinear":
            zero = node.inputs[2].const_value if node.inputs[2] is not None else None
            assert zero is not None
            assert zero.dtype == ir.DataType.INT8
            assert not zero.numpy().any()
            assert node.inputs[1].const_value.numpy().size == 1  # type: ignore[union-attr]
    assert "TensorRT needs its GPU" in str(made)


def test_tiny_products_stay_in_float_for_tensorrt(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
    x, path = torch.randn(2, 9, 64), tmp_path / "m.onnx"
    made = int8pass.export_onnx(model.eval(), x, path, recipe="w8a8", target="tensorrt", quantize_head=True)
    assert made.linears == ("4",)
    assert set(made.refused) == {"0", "2"}
    assert made.verification is not None
    assert made.verification.passed
    made = int8pass.export_onnx(model, x, path, recipe="w8a8", target="portable", quantize_head=True)
    assert made.linears == ("0", "2", "4")


@pytest.mark.parametrize("target", ["onnxruntime", "portable", "tensorrt"])
@pytest.mark.parametrize("kind", ["bool", "float", "causal", "grouped", "padding", "matrix", "one for all", "none"])
def test_attention_of_every_mask(kind: str, target: str, tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (-1, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
            if kind != "grouped":
                k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=None if kind in {"causal", "none"} else mask, is_causal=kind == "causal",
                enable_gqa=kind == "grouped",
            )  # fmt: skip

    torch.manual_seed(0)
    shape = {"padding": (2, 1, 1, 9), "matrix": (9, 9), "one for all": (1, 1, 9, 9)}.get(kind, (2, 1, 9, 9))
    mask = torch.rand(shape) > 0.4
    mask.view(-1, 9)[-7 if kind != "padding" else -1] = False  # a row that sees nothing is 0
    given = torch.where(mask, torch.randn(mask.shape), -torch.inf) if kind == "float" else mask
    model, x = Attention().eval(), torch.randn(2, 9, 64)
    made = int8pass.export_onnx(
        model,
        (x, given),
        tmp_path / "m.onnx",
        recipe="w8a16",
        target=target,
        quantize_head=True,  # type: ignore[arg-type]
    )
    session = onnxruntime.InferenceSession(str(made.path))
    feed = {i.name: value.numpy() for i, value in zip(session.get_inputs(), (x, given))}
    (found,) = session.run(None, feed)
    assert relative_error(torch.from_numpy(found), model(x, given)) < 0.02
    if kind not in {"causal", "none"}:
        assert not found[1, :, 2].any()
    names = [n.op_type for n in ir.load(made.path).graph]
    assert "IsNaN" not in names
    own_rows = kind not in {"padding", "none"}
    # the clamp that keeps the softmax of many masked scores from denormal numbers
    assert ("Sub" in names) == (target == "onnxruntime" and own_rows)
    assert names.count("Attention") == (target == "portable" or (target == "onnxruntime" and not own_rows))


def test_prefill_and_decode_of_a_decoder(tmp_path: Path) -> None:
    model, ids = tiny_llama.model(), torch.arange(3, 15)[None]
    example = example_inputs.prefill(model, ids)
    made = int8pass.export_onnx(
        model, example.args, tmp_path / "p.onnx", target="portable", dynamic_shapes=example.dynamic_shapes
    )
    assert len(made.linears) == 7
    assert list(made.refused) == ["lm_head"]
    example = example_inputs.decode(model, ids)
    made = int8pass.export_onnx(
        model, example.args, tmp_path / "d.onnx", target="portable", dynamic_shapes=example.dynamic_shapes
    )
    assert kernels(made).count("MatMulNBits") == 7  # a single token is weight-only
    assert len(onnxruntime.InferenceSession(str(made.path)).get_outputs()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_architecture(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    made = int8pass.export_onnx(model, inputs, tmp_path / "m.onnx", recipe="w8a8", target="portable")
    assert made.linears
    assert made.verification is not None
    assert all(not result.fallbacks for result in made.verification.results), str(made)


@pytest.mark.slow
def test_minilm_in_both_runtimes(tmp_path: Path) -> None:
    model, tokenizer = hub.load("minilm")
    example = example_inputs.prefill(model, hub.windows(tokenizer, 32)[:1])
    made = int8pass.export_onnx(
        model, example.args, tmp_path / "m.onnx", recipe="w8a8", target="portable",
        dynamic_shapes=example.dynamic_shapes,
    )  # fmt: skip
    assert kernels(made).count("MatMulIntegerToFloat") == len(made.linears) == 37


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: nothing half-written, nothing lost


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.fc(x))


def test_an_op_without_translation_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"bessel_j0.*test_export\.py:\d+"):
        int8pass.export_onnx(Odd().eval(), torch.randn(3, 16), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_does_not_fuse_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"q computes in torch\.bfloat16.*test_export\.py:\d+.*model\.float"):
        int8pass.export_onnx(block().bfloat16(), torch.randn(3, 64).bfloat16(), tmp_path / "m.onnx")


def test_what_cannot_be_traced(tmp_path: Path) -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(CaptureError, match=r"torch\.export cannot trace"):
        int8pass.export_onnx(Breaks(), torch.randn(3), tmp_path / "m.onnx")


def test_wrong_arguments(tmp_path: Path) -> None:
    model, x = block(), torch.randn(3, 64)
    with pytest.raises(OptionError, match="targets are"):
        int8pass.export_onnx(model, x, tmp_path / "m.onnx", target="ort")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="verify must be"):
        int8pass.export_onnx(model, x, tmp_path / "m.onnx", verify="maybe")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="no folder"):
        int8pass.export_onnx(model, x, tmp_path / "none" / "m.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        int8pass.export_onnx(model, x, tmp_path)


def _signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave activations signed: numerically right, and the three readers of the norm fall back."""
    monkeypatch.setattr("int8pass.qdq.rewrite.unsigned_activations", lambda model: 0)


def test_a_file_that_does_not_verify_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _signed(monkeypatch)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"what was there")
    with pytest.raises(ExportError, match=r"was not written.*\n.*2 of 5 linears in int8[\s\S]*q: float .*trap T2"):
        int8pass.export_onnx(block(), torch.randn(2, 9, 64), path, recipe="w8a8")
    assert path.read_bytes() == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_warn_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _signed(monkeypatch)
    with pytest.warns(UserWarning, match="does not verify"):
        made = int8pass.export_onnx(block(), torch.randn(2, 9, 64), tmp_path / "m.onnx", recipe="w8a8", verify="warn")
    assert made.path.is_file()
    assert made.verification is not None
    assert not made.verification.passed


def test_wrong_numbers_do_not_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: ir.Model) -> int:
        for node in model.graph:
            if node.op_type == "LayerNormalization":
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 3.0)
        return 0

    monkeypatch.setattr("int8pass.qdq.simplify.split_adds", spoil)
    with pytest.raises(ExportError, match="TOO FAR"):
        int8pass.export_onnx(block(), torch.randn(2, 9, 64), tmp_path / "m.onnx", recipe="w8a8")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(model: ir.Model, path: Path, **options: Any) -> None:
        path.write_bytes(b"half a model")
        raise failure

    monkeypatch.setattr(files.ir, "save", save)
    expected = ExportError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        int8pass.export_onnx(block(), torch.randn(3, 64), tmp_path / "m.onnx", recipe="w8a8")
    assert not list(tmp_path.iterdir())


def test_large_models_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "EXTERNAL_ABOVE", 1000)
    x = torch.randn(3, 64)
    for _ in range(2):  # the second replaces the first, whose weights go when the new model is in place
        made = int8pass.export_onnx(block(), x, tmp_path / "m.onnx", recipe="w8a8")
        (data,) = (p for p in tmp_path.iterdir() if p.name != "m.onnx")
        assert data.name.endswith(".data")
        onnxruntime.InferenceSession(str(made.path)).run(None, {"x": x.numpy()})


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UnsupportedError, match=r"int8pass\[onnx\]"):
        int8pass.export_onnx(block(), torch.randn(3, 64), tmp_path / "m.onnx")


def test_the_file_says_what_made_it(tmp_path: Path) -> None:
    made = int8pass.export_onnx(block(), torch.randn(3, 64), tmp_path / "m.onnx", recipe="w8a8", verify=False)
    stored = ir.load(made.path)
    assert stored.producer_name == "int8pass"
    assert '"q"' in stored.metadata_props["int8pass.linears"]
    assert [linear.node.name for linear in find(stored)] == ["q", "k", "v", "up", "down"]
