"""`int8pass export` on a model folder: the file it writes runs, and wrong arguments end it with a message."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import tiny_llama
from typer.testing import CliRunner

from int8pass.cli import app


def test_export_of_a_model_folder(tmp_path: Path) -> None:
    folder, path = tiny_llama.save(tmp_path / "model"), tmp_path / "m.onnx"
    invoke = CliRunner().invoke
    found = invoke(app, ["export", str(folder), "-o", str(path), "--target", "portable", "--length", "8"])
    assert found.exit_code == 0, found.output
    assert "7 linears in int8" in found.output
    assert "7 of 7 linears in int8" in found.output
    assert [i.name for i in onnxruntime.InferenceSession(str(path)).get_inputs()] == ["input_ids"]
    before = path.read_bytes()
    assert invoke(app, ["export", str(folder), "-o", str(path), "--recipe", "zeroquant"]).exit_code == 1
    assert invoke(app, ["export", str(folder), "-o", str(tmp_path / "none" / "m.onnx")]).exit_code == 1
    assert path.read_bytes() == before
