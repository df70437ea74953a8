"""`int8pass inspect`: every kind of MODEL, what is printed and written, diffs, limits, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hub import write_gguf
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("typer")
from typer.testing import CliRunner

import int8pass
from int8pass import cli
from int8pass.errors import CaptureError
from int8pass.inspect.report import ReportError


def invoke(*arguments: object) -> Any:
    options = ["--device", "cpu"] if "--profile" in arguments else ["--device", "cpu", "--no-profile"]
    result = CliRunner().invoke(cli.app, ["inspect", *map(str, arguments), *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


class Small(nn.Module):
    """A norm, a gate, a linear that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.unused = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Fails(nn.Module):
    """Reads its data while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        torch._dynamo.graph_break()
        raise KeyError(f"nowhere, {x.dim()}")


def small() -> tuple[nn.Module, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    return Small(), torch.randn(2, 4, 32), [torch.randn(2, 4, 32), torch.randn(2, 4, 32)]


def alone() -> nn.Module:
    return Small()


def fails() -> tuple[nn.Module, Tensor]:
    return Fails(), torch.randn(2, 8)


def wrong() -> int:
    return 3


FACTORY = "test_inspect_command:small"


def test_text_measures_and_files_are_written(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("In the beginning was the word, and the word was eight bits wide. " * 20)
    outputs = [tmp_path / name for name in ("r.json", "r.dot", "r.svg", "r.txt", "r.nodes.json")]
    options = [option for path in outputs for option in ("-o", path)]
    result = invoke(folder, "--length", 32, "--text", text, "--windows", 2, "--top-k", 2, *options)
    assert result.exit_code == 0, result.stderr
    report = int8pass.Report.load(outputs[0])
    assert len(report.sites) == 4
    assert all(site.tokens == 64 and site.errors.final is not None for site in report.sites)
    assert "… and 2 sites with less error" in result.stdout
    assert "schemes on this model:" in result.stdout
    for path in outputs:
        assert path.stat().st_size > 100
        assert f"wrote {path}" in result.stderr
    assert outputs[1].read_text().startswith("digraph")
    assert outputs[2].read_text().startswith("<svg")
    results = json.loads(outputs[4].read_text())["main"]["results"]
    assert len(results) == 7
    assert {round(r["value"], 2) for r in results.values()} == {site.errors.final for site in report.sites}


def test_json_and_stage_are_printed_alone() -> None:
    result = invoke(FACTORY, "--json")
    report = int8pass.Report.from_json(result.stdout)
    assert [site.name for site in report.sites] == ["up", "down"]
    assert report.sites[0].errors.cumulative is not None, "a factory's data are measured"
    code = invoke(FACTORY, "--stage", "quantized").stdout
    assert "quantize_per_token(" in code
    assert "linear" not in code.splitlines()[0]
    assert "split_quantize" not in code
    assert "split_quantize_dynamic(" in invoke(FACTORY, "--stage", "fused").stdout


def test_a_linear_that_does_not_run_is_accounted_for() -> None:
    result = invoke(FACTORY)
    assert "unused: no graph reads its weight: on these inputs it did not run" in result.stdout


def test_an_exported_program(tmp_path: Path) -> None:
    model, x, _ = small()
    torch.export.save(torch.export.export(model.eval(), (x,)), tmp_path / "m.pt2")
    result = invoke(tmp_path / "m.pt2")
    assert result.exit_code == 0, result.stderr
    assert "linears taken 2" in result.stdout
    (tmp_path / "broken.pt2").write_bytes((tmp_path / "m.pt2").read_bytes()[:500])
    broken = invoke(tmp_path / "broken.pt2")
    assert broken.exit_code == 1
    assert "cannot be read as an exported program" in broken.stderr


def test_a_gguf_file(tmp_path: Path) -> None:
    result = invoke(write_gguf(tmp_path / "tiny.gguf"), "--length", 8)
    assert result.exit_code == 0, result.stderr
    assert "linears taken 7, not taken 1" in result.stdout
    assert "model.layers.0.mlp.down_proj" in result.stdout


def test_diff_of_reports_and_of_recipes(tmp_path: Path) -> None:
    for recipe in ("default", "w8a16"):
        invoke(FACTORY, "--recipe", recipe, "-o", tmp_path / f"{recipe}.json")
    saved = invoke("--diff", tmp_path / "default.json", tmp_path / "w8a16.json")
    assert saved.exit_code == 0, saved.stderr
    assert "w8a8 affine, largest columns" in saved.stdout
    assert "w8a16" in saved.stdout
    assert "local dB" in saved.stdout
    same = invoke("--diff", tmp_path / "default.json", tmp_path / "default.json")
    assert "no difference" in same.stdout
    recipes = invoke(FACTORY, "--diff", "w8a8", "w8a8-asymmetric")
    assert "w8a8 symmetric" in recipes.stdout
    missing = invoke("--diff", "w8a8", "default")
    assert missing.exit_code == 1
    assert "MODEL is missing" in missing.stderr


def test_limits_fail_with_a_code_of_their_own() -> None:
    assert invoke(FACTORY, "--fail-under-db", 10).exit_code == 0
    under = invoke(FACTORY, "--fail-under-db", 90)
    assert under.exit_code == 3
    assert "dB is under 90" in under.stderr
    fallback = invoke(FACTORY, "--fail-on-fallback")
    assert fallback.exit_code == 3
    assert "unused was not taken" in fallback.stderr


def test_the_head_is_no_fallback(folder: Path) -> None:
    result = invoke(folder, "--length", 16, "--fail-on-fallback")
    assert result.exit_code == 0, result.stderr
    assert "lm_head" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FACTORY, "-o", "{tmp}/r.pdf"), "a report can be written as .nodes.json, .html, .json"),
        ((FACTORY, "-o", "{tmp}/no/r.html"), "there is no folder"),
        ((FACTORY, "--stage", "boiled"), "stages are captured, normalized, smoothed, quantized, fused"),
        ((FACTORY, "--text", "{tmp}/some.txt"), "--text needs a model with a tokenizer"),
        (("{model}", "--text", "{tmp}/none.txt"), "No such file"),
        (("{model}", "--text", "{tmp}/some.txt"), "tokens, and one window has 128"),
        (("no.such:thing",), "ModuleNotFoundError"),
        (("test_inspect_command:nothing",), "AttributeError"),
        (("test_inspect_command:wrong",), "returned int; wanted: a model, (model, args) or (model, args, data)"),
        (("test_inspect_command:alone",), "returned a model alone, and inputs are needed"),
        (("{tmp}/none.pt2",), "there is no file"),
        (("{tmp}/none.onnx",), "there is no file"),
        (("{tmp}/broken.onnx",), "is no ONNX model, or damaged"),
        (("--diff", "{tmp}/broken.json", "{tmp}/broken.json"), "truncated"),
    ],
)
def test_bad_input_is_one_message(folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    pytest.importorskip("onnx")
    (tmp_path / "some.txt").write_text("short")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x07broken")
    (tmp_path / "broken.json").write_text('{"int8pass_report":1,"sites":[')
    before = sorted(tmp_path.iterdir())
    result = invoke(*(a.format(tmp=tmp_path, model=folder) for a in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_fails_shows_its_line_and_what_was_seen() -> None:
    result = invoke("test_inspect_command:fails")
    assert result.exit_code == 1
    assert 'raise KeyError(f"nowhere, {x.dim()}")' in result.stderr
    assert "the model itself fails on these inputs (KeyError)" in result.stderr
    assert "2 linears in the model; 1 graphs with 1 sites captured before it failed" in result.stderr
    assert "linears taken 1, not taken 1" in result.stdout
    with pytest.raises(CaptureError) as caught:
        int8pass.inspect(*fails())
    assert isinstance(caught.value.partial, int8pass.Report)
    assert [site.name for site in caught.value.partial.sites] == ["one"]


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    report = int8pass.inspect(nn.LayerNorm(8), torch.randn(2, 8))
    target = tmp_path / "r.json"
    target.mkdir()
    with pytest.raises(ReportError, match="cannot be written"):
        report.save(target)
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"], "no part is left"


@pytest.mark.parametrize(("package", "file"), [("jinja2", "r.html"), ("vl_convert", "r.html"), ("netron", "r.html")])
def test_missing_extras_are_named(package: str, file: str, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "import torch, int8pass\n"
        "from torch import nn\n"
        "report = int8pass.Report('r', 0, (), ())\n"
        "try: report.save(sys.argv[1])\n"
        "except int8pass.errors.Int8PassError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pip install 'int8pass[inspect]'" in done.stdout
    assert not list(tmp_path.iterdir())


def test_an_onnx_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    _qdq_model(onnx, tmp_path / "m.onnx")
    result = invoke(tmp_path / "m.onnx", "-o", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    report = int8pass.Report.load(tmp_path / "r.json")
    (site,) = report.sites
    assert (site.name, site.shape, site.scheme) == ("quantized", (8, 16), "w8a8 static, weights per channel")
    assert site.bytes == (4 * 8 * 16, 8 * 16 + 4 * 8)
    assert {r.linear: r.reason for r in report.refused} == {
        "plain": "MatMul: its weight is float, there is no DequantizeLinear on it",
        "both": "MatMul: both operands are activations",
    }
    assert "onnxruntime CPU" in {row.implementation for row in report.runtime}
    assert "quantized" in {row.site for row in report.runtime}, "what was fused is known by its site"
    assert "ONNX Runtime's optimized graph" in report.runtime_note
    assert "what ran:" in result.stdout


def _qdq_model(onnx: Any, path: Path) -> None:
    """A quantized product, a float one, and one of two activations."""
    import numpy

    helper, tensor = onnx.helper, onnx.numpy_helper.from_array
    initializers = [
        tensor(numpy.array(0.05, numpy.float32), "xs"), tensor(numpy.array(128, numpy.uint8), "xz"),
        tensor(numpy.ones((16, 8), numpy.int8), "wq"), tensor(numpy.full(8, 0.1, numpy.float32), "ws"),
        tensor(numpy.zeros(8, numpy.int8), "wz"), tensor(numpy.ones((8, 8), numpy.float32), "w2"),
    ]  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="quantized"),
        helper.make_node("MatMul", ["y", "w2"], ["z"], name="plain"),
        helper.make_node("Transpose", ["z"], ["zt"], perm=[1, 0]),
        helper.make_node("MatMul", ["z", "zt"], ["out"], name="both"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", 1, ["n", 16])], [value("out", 1, None)], initializers
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
