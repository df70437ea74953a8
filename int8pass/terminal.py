"""What the commands share: options, the display of progress, errors and warnings as one line, arguments looked up.

Needs typer and rich, which come with `int8pass[hf]`.
"""

from __future__ import annotations

import enum
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import nn

import int8pass
from int8pass import hub, measure
from int8pass.errors import CalibrationWarning, Int8PassError, OptionError


class Dtype(enum.StrEnum):
    """Weights' dtype of the original model. `auto`: bfloat16 on a GPU, float32 on a CPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArgument = Annotated[
    str, typer.Argument(help="smollm2, minilm, a transformers hub id, a folder with a model, or a .gguf file.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of the original; auto: bfloat16 on a GPU, else float32.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: the GPU if there is one.")]
RecipeOption = Annotated[
    str,
    typer.Option("--recipe", "--preset", help="A preset's name or a recipe file (.json)."),
]


class Steps:
    """Shows a `measure.Progress` on stderr: bars on a terminal, elsewhere one plain line when a step has ended."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, float] = {}

    def __enter__(self) -> Steps:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, title: str, done: int, total: int) -> None:
        if title not in self._tasks:
            self._tasks[title] = self._bars.add_task(title, total=total)
            self._begun[title] = time.perf_counter()
        self._bars.update(self._tasks[title], completed=done)
        if done == total and not self._console.is_terminal:
            seconds = time.perf_counter() - self._begun[title]
            self._console.print(f"{title}: {seconds:.1f} s", markup=False, highlight=False)


def say(text: str, stderr: bool = False) -> None:
    """Print text as it is: nothing in it is read as markup or coloured, and no line is broken."""
    Console(stderr=stderr).print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def warnings_printed() -> Iterator[None]:
    """What calibration warns of, as one line on stderr each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CalibrationWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, CalibrationWarning):
            say(f"int8pass: {warning.message}", stderr=True)


@contextmanager
def reported() -> Iterator[None]:
    """An expected error ends the command with its message alone; anything else keeps its traceback."""
    try:
        yield
    except Exception as failure:
        # Dynamo wraps what a backend raises
        expected = failure if isinstance(failure, Int8PassError) else getattr(failure, "inner_exception", None)
        if not isinstance(expected, Int8PassError):
            raise
        say(f"int8pass: {expected}", stderr=True)
        raise typer.Exit(1) from failure


def recipe_of(text: str) -> int8pass.Recipe:
    """A preset by name, else a recipe file."""
    if text in int8pass.presets():
        return int8pass.Recipe.preset(text)
    path = Path(text).expanduser()
    if not path.is_file():
        raise OptionError(
            f"--recipe {text}: neither a preset nor a recipe file. Presets: {', '.join(int8pass.presets())}."
        )
    return int8pass.Recipe.load(path)


def device_of(text: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:N`; `auto` is the GPU if there is one."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError as failure:
        raise OptionError(f"--device {text}: not a device. Give auto, cpu, cuda or cuda:N.") from failure
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device {text}: int8pass runs on cpu and cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {text}: this machine has {torch.cuda.device_count()} CUDA devices.")
    return device


def load(name: str, dtype: Dtype, device: torch.device, progress: measure.Progress) -> tuple[nn.Module, Any]:
    """A model and its tokenizer (`hub.load`), in the dtype asked for, as one step of the progress."""
    chosen = {"cuda": "bfloat16", "cpu": "float32"}[device.type] if dtype is Dtype.auto else dtype.value
    title = f"load {name}"
    progress(title, 0, 1)
    loaded = hub.load(name, dtype=getattr(torch, chosen), device=device)
    progress(title, 1, 1)
    return loaded


def require_folder(option: str, path: Path) -> None:
    """Say that an output cannot be written before minutes are spent on it."""
    if not path.parent.is_dir():
        raise OptionError(f"{option} {path}: there is no folder {path.parent}.")
