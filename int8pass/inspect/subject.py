"""What a name on the command line stands for: a model and inputs to inspect it with."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8pass import hub
from int8pass.errors import Int8PassError, OptionError

Load = Callable[[str], tuple[nn.Module, Any]]


class SubjectError(Int8PassError):
    """A model that cannot be made: a factory that fails, a damaged `.pt2`, inputs that are missing."""


@dataclass
class Subject:
    """A model, the inputs to capture it with, and data to measure it on."""

    model: nn.Module
    args: Any
    data: list[Any] = field(default_factory=list)
    tokenizer: Any = None


def resolve(name: str, load: Load, length: int, device: torch.device) -> Subject:
    """The subject behind MODEL: `package.module:factory`, a `.pt2` file, or what `int8pass.hub.load` takes.

    A factory is called without arguments and returns a model, `(model, args)` or `(model, args, data)`.

    Raises:
        SubjectError, LoadError: it cannot be loaded.
    """
    path = Path(name).expanduser()
    if path.suffix == ".pt2":
        return _exported(path, device)
    if ":" in name and not path.exists():
        return _made(name, device)
    model, tokenizer = load(name)
    ids = hub.windows(tokenizer, length)[:1].to(device)
    return Subject(model, {"input_ids": ids}, tokenizer=tokenizer)


def text_batches(subject: Subject, file: Path, length: int, count: int) -> list[Any]:
    """Up to `count` windows of `length` tokens of a text, spread over it.

    Raises:
        OptionError: no tokenizer, no such file, or too little text.
    """
    if subject.tokenizer is None:
        raise OptionError("--text needs a model with a tokenizer; a factory can return (model, args, data) instead")
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OptionError(f"--text {file}: {error.strerror}") from error
    ids = subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(ids) // length
    if not whole:
        raise OptionError(f"--text {file}: {len(ids)} tokens, and one window has {length} (--length)")
    step = max(1, whole // count)
    device = next(subject.model.parameters()).device
    windows = torch.tensor(ids[: whole * length], dtype=torch.int64, device=device).view(whole, 1, length)
    return [{"input_ids": window} for window in windows[::step][:count]]


def _made(name: str, device: torch.device) -> Subject:
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # as `python -m` does: modules of the working directory
    try:
        made = getattr(importlib.import_module(module_name), attribute)()
    except Exception as failure:
        raise SubjectError(f"{name}: {type(failure).__name__}: {failure}") from failure
    finally:
        sys.path.remove("")
    parts = made if isinstance(made, tuple) else (made,)
    if not isinstance(parts[0], nn.Module) or len(parts) > 3:
        wanted = "a model, (model, args) or (model, args, data)"
        raise SubjectError(f"{name} returned {type(made).__name__}; wanted: {wanted}")
    if len(parts) == 1:
        args = getattr(parts[0], "dummy_inputs", None) or getattr(parts[0], "example_inputs", None)
        if args is None:
            raise SubjectError(f"{name} returned a model alone, and inputs are needed: return (model, args)")
        parts = (parts[0], args)
    model = parts[0].to(device) if not _is_meta(parts[0]) else parts[0]
    return Subject(model.eval(), parts[1], list(parts[2]) if len(parts) > 2 else [])


def _is_meta(model: nn.Module) -> bool:
    return any(p.device.type == "meta" for p in model.parameters())


def _exported(path: Path, device: torch.device) -> Subject:
    if not path.is_file():
        raise SubjectError(f"there is no file {path}")
    try:
        program = torch.export.load(path)
    except Exception as failure:  # zip, pickle, schema and version errors
        raise SubjectError(f"{path} cannot be read as an exported program (damaged?): {failure}") from failure
    inputs = program.example_inputs
    args, kwargs = inputs if inputs is not None else (tuple(_examples(program)), {})
    model = program.module()
    if not kwargs:
        return Subject(model.to(device), args)
    names = [n.name for n in program.graph.nodes if n.op == "placeholder"][-len(args) - len(kwargs) :]
    return Subject(model.to(device), {**dict(zip(names, args)), **kwargs})


def _examples(program: torch.export.ExportedProgram) -> Iterator[Any]:
    """Zeros in the shapes that a program was exported with; 16 where a size is free."""
    user = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in user:
            value = node.meta["val"]
            if isinstance(value, Tensor):
                yield torch.zeros([s if isinstance(s, int) else 16 for s in value.shape], dtype=value.dtype)
            else:
                yield value if not isinstance(value, (torch.SymInt, torch.SymFloat)) else math.prod([16])


__all__ = ["Subject", "SubjectError", "resolve", "text_batches"]
