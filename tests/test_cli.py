"""The command line: what it prints, what it writes, and how it says no. No network."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
import tiny_llama
from rich.console import Console
from typer.testing import CliRunner

import int8pass
from int8pass import cli, measure


def invoke(*arguments: object):
    """The result of `int8pass ARGUMENTS`; an exception that is no plain exit is raised."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_help_lists_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("run", "inspect", "calibrate", "diff"):
        assert command in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "{tmp}/none"), "there is no file or folder"),
        (("run", "{tmp}/none.gguf"), "there is no file"),
        (("inspect", "{tmp}"), "no config.json"),
        (("run", "{model}", "--preset", "w4a4"), "Presets: default"),
        (("run", "{model}", "--recipe", "{tmp}/none.json"), "neither a preset nor a recipe file"),
        (("run", "{model}", "--recipe", "{tmp}/broken.json"), "broken.json"),
        (("calibrate", "{model}", "--recipe", "w4a4"), "Presets: default"),
        (("calibrate", "{model}", "--output", "{tmp}/no/such/recipe.json"), "there is no folder"),
        (("calibrate", "{model}", "--text", "{tmp}/none.txt"), "cannot be read as UTF-8 text"),
        (("calibrate", "{model}", "--text", "{tmp}/broken.json"), "fewer than 512 tokens"),
        (("diff", "{tmp}/broken.json", "{tmp}/broken.json"), "broken.json"),
        (("run", "{model}", "--device", "abacus"), "not a device"),
        (("run", "{model}", "--device", "mps"), "cpu and cuda"),
        (("run", "{model}", "--device", "cuda:99"), "CUDA devices"),
        (("run", "{model}", "--json", "{tmp}/no/such/file.json"), "there is no folder"),
    ],
)
def test_expected_errors_are_one_message(folder, tmp_path, arguments, message):
    (tmp_path / "broken.json").write_text("{")
    result = invoke(*(argument.format(tmp=tmp_path, model=folder) for argument in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", [("run",), ("run", "x", "--windows", "0"), ("run", "x", "--dtype", "int4"), ("fly",)]
)
def test_wrong_usage(arguments):
    assert invoke(*arguments).exit_code == 2


def test_run_refuses_a_model_that_generates_nothing(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(tmp_path)
    tiny_llama.tokenizer().save_pretrained(tmp_path)
    result = invoke("run", tmp_path, "--device", "cpu")
    assert result.exit_code == 1
    assert f"int8pass inspect {tmp_path}" in result.stderr


def test_no_compiler_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    result = invoke("run", "smollm2", "--device", "cpu")
    assert result.exit_code == 1
    assert "needs a C++ compiler" in result.stderr


@pytest.mark.parametrize("package", ["typer", "rich", "rich.console"])
def test_missing_typer_names_the_extra(package):
    script = f"import sys; sys.modules[{package!r}] = None; from int8pass.cli import main"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'int8pass[hf]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_int8pass_needs_torch_alone():
    extras = ["transformers", "typer", "rich", "tokenizers", "safetensors", "gguf", "accelerate", "triton", "onnx"]
    script = f"import sys; sys.modules.update(dict.fromkeys({extras}))\nimport int8pass, int8pass.hub, int8pass.measure"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_inspect_prints_sites_and_refusals(folder):
    result = invoke("inspect", folder, "--device", "cpu", "--length", 16)
    assert result.exit_code == 0
    assert "lm_head" in result.stdout
    assert "down_proj" in result.stdout


def test_calibrate_writes_a_recipe_that_run_takes(folder, tmp_path):
    path = tmp_path / "recipe.json"
    result = invoke("calibrate", folder, "--device", "cpu", "--windows", 1, "--output", path)
    assert result.exit_code == 0, result.stderr
    assert str(path) in result.stdout
    recipe = int8pass.Recipe.load(path)
    assert recipe.sites
    assert cli.recipe_of(str(path)) == recipe


def test_calibrate_reads_a_text_and_diff_shows_what_it_changed(folder, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("All happy models are alike; every unhappy model is unhappy in its own way.\n" * 30)
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, more in zip(paths, ((), ("--recipe", "smoothquant-o3", "--columns", 4))):
        arguments = ("--device", "cpu", "--windows", 4, "--text", text, "-o", path, *more)
        result = invoke("calibrate", folder, *arguments)
        assert result.exit_code == 0, result.stderr
        assert "calibrate:" in result.stderr
        assert "mean relative error" in result.stdout
    assert invoke("diff", paths[0], paths[0]).exit_code == 0
    result = invoke("diff", *paths)
    assert result.exit_code == 1
    assert "activations: per_token → static" in result.stdout
    assert "columns: 16 removed, 0 added, 0 now" in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first.json", "mine.txt", "second.json", "second.json.pt"]


@pytest.mark.slow
def test_run_prints_one_table(folder, tmp_path):
    path = tmp_path / "figures.json"
    arguments = ("--device", "cpu", "--windows", 2, "--tokens", 4, "--inspect", "--json", path)
    result = invoke("run", folder, *arguments)
    assert result.exit_code == 0, result.stderr
    for row in ("perplexity", "prefill", "decode", "linear weights", "compile", "linears in int8", "lm_head"):
        assert row in result.stdout
    assert "perplexity, int8:" in result.stderr
    figures = json.loads(path.read_text())
    assert sum(len(site["linears"]) for site in figures["report"]["sites"]) == 7
    assert [refused["linear"] for refused in figures["report"]["refused"]] == ["lm_head"]
    assert figures["int8"]["perplexity"] == pytest.approx(figures["original"]["perplexity"], rel=0.01)
    assert figures["int8"]["linear_weight_bytes"] < figures["original"]["linear_weight_bytes"]


def counting_backend(graphs: list[str], name: str):
    """Runs what Dynamo captured as it is, and counts."""

    def backend(gm, inputs, **_):
        graphs.append(name)
        return gm.forward

    return backend


def test_two_graphs_per_form_are_all_that_measuring_compiles():
    graphs: list[str] = []
    model = tiny_llama.model()
    forms = [measure.Form(n, model, counting_backend(graphs, n), cache_length=48) for n in ("first", "second")]
    text = torch.arange(96).view(3, 32)
    measure.compile_forms(forms, text[:1])
    assert sorted(graphs) == ["first", "first", "second", "second"]
    measure.time_prefill(forms, text[:1], rounds=2)
    seconds, continuations = measure.time_decode(forms, text[0, :5], tokens=6, rounds=2)
    quality = [measure.perplexity(form, text) for form in forms]
    assert len(graphs) == 4
    assert all(s > 0 for s in seconds)
    assert continuations[0] == continuations[1]
    assert quality[0] == quality[1]


def test_perplexity_and_greedy_agree_with_plain_transformers():
    model, text = tiny_llama.model(), torch.arange(64).view(2, 32)
    form = measure.Form("eager", model, None, cache_length=48)
    with torch.no_grad():
        logits = model(text, use_cache=False).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).exp()
        generated = model.generate(text[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 32:]
    assert measure.perplexity(form, text) == pytest.approx(expected.item(), rel=1e-4)
    assert measure.greedy(form, text[0], 6)[0] == generated.tolist()


def test_mode_and_options_both_reach_the_backend():
    seen = {}

    def backend(gm, inputs, *, mode=None, options=None):
        seen.update(mode=mode, options=options)
        return gm.forward

    form = measure.Form("x", tiny_llama.model(), backend, cache_length=8, mode="max-autotune", options={"a": 1})
    form.prefill(torch.zeros(1, 4, dtype=torch.int64), torch.arange(2))
    assert seen == {"mode": "max-autotune", "options": {"a": 1}}


def test_linear_weight_bytes_leave_out_the_head():
    model = tiny_llama.model()
    layer = model.model.layers[0]
    linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert measure.linear_weight_bytes(model) == 4 * sum(m.weight.numel() for m in linears)


def test_table_shows_both_forms_and_the_ratio():
    figures = [
        measure.Measurement(name, quality, 1000.0 * k, 24.0 * k, 400_000_000 // k, 50.0, "a force")
        for name, quality, k in (("float32", 16.0, 1), ("int8", 16.08, 4))
    ]
    report = int8pass.inspect(tiny_llama.model(), {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
    comparison = measure.Comparison("m", "a machine", "float32", "2.13.0", 2, 6, 32, "Gravity is", *figures, report)
    shown = io.StringIO()
    Console(width=100, file=shown).print(cli.table(comparison))
    text = shown.getvalue()
    for part in ("16.000", "16.080", "1.0050", "4.00", "400.0", "100.0", "0.25", "7 in 4 sites", "a force"):
        assert part in text


def test_steps_are_plain_lines_when_piped(capsys):
    with cli.Steps() as progress:
        progress("perplexity, int8", 0, 2)
        progress("perplexity, int8", 1, 2)
        progress("perplexity, int8", 2, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("perplexity, int8: ")
