"""What `int8pass inspect` does, apart from its options: load, inspect, show, write, judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from int8pass.errors import OptionError
from int8pass.inspect import text
from int8pass.inspect.collect import inspect
from int8pass.inspect.compare import diff
from int8pass.inspect.observe import Progress
from int8pass.inspect.report import Report, renderer, write
from int8pass.inspect.running import return_large_blocks
from int8pass.inspect.subject import Load, Subject, resolve, text_batches
from int8pass.inspect.worst import UNKNOWN, loss
from int8pass.recipe import Recipe

STAGES = ("captured", "normalized", "smoothed", "quantized", "fused")


@dataclass(frozen=True)
class Request:
    """The options of the command."""

    model: str
    recipe: Recipe
    device: torch.device
    length: int = 128
    text: Path | None = None
    windows: int = 4
    sensitivity: bool = True
    profile: bool = True
    outputs: tuple[Path, ...] = ()
    stage: str | None = None

    def __post_init__(self) -> None:
        if self.stage is not None and self.stage not in STAGES:
            raise OptionError(f"--stage {self.stage}: stages are {', '.join(STAGES)}")
        for path in self.outputs:
            renderer(path)  # an ending nobody writes is said before minutes are spent
            if not path.parent.is_dir():
                raise OptionError(f"--output {path}: there is no folder {path.parent}")


def report_on(request: Request, load: Load, progress: Progress) -> Report:
    """Inspect what the request names.

    Raises:
        Int8PassError: it cannot be loaded, captured or measured.
    """
    return_large_blocks()
    if Path(request.model).suffix == ".onnx":
        from int8pass.inspect.onnx_file import inspect_onnx

        return inspect_onnx(Path(request.model).expanduser())
    return inspect_subject(request, resolve(request.model, load, request.length, request.device), progress)


def inspect_subject(request: Request, subject: Subject, progress: Progress) -> Report:
    """Inspect a loaded model."""
    data = subject.data
    if request.text is not None:
        data = text_batches(subject, request.text, request.length, request.windows)
    args, *batches = [_without_cache(subject, inputs) for inputs in (subject.args, *data)]
    return inspect(
        subject.model, args, recipe=request.recipe, data=batches, sensitivity=request.sensitivity,
        profile=request.profile, progress=progress,
    )  # fmt: skip


def _without_cache(subject: Subject, inputs: Any) -> Any:
    """A language model's key/value cache is an output of no interest here."""
    caches = getattr(getattr(subject.model, "config", None), "use_cache", None)
    return {**inputs, "use_cache": False} if caches and isinstance(inputs, dict) else inputs


def save(report: Report, outputs: tuple[Path, ...], stage: str | None) -> None:
    """Write every file asked for; `stage` is what pictures show."""
    for path in outputs:
        if stage is not None and path.suffix in (".html", ".dot", ".svg"):
            drawn: Callable[..., str] = renderer(path)
            write(path, drawn(report, stage))
        else:
            report.save(path)


def shown(report: Report, top_k: int | None, stage: str | None, terminal: bool) -> str:
    """What is printed: the report, or the code of a stage."""
    if stage is not None:
        found = [s for s in report.stages if s.name == stage]
        if not found:
            names = ", ".join(s.name for s in report.stages)
            raise OptionError(f"--stage {stage}: this report has {names or 'no stage'}")
        lines = []
        for one in found:
            lines += [f"# graph {one.graph + 1} of {report.graphs}, {one.name}: {len(one.nodes)} nodes"]
            calls = [node for node in one.nodes if node.op not in ("constant", "getitem")]
            lines += [f"{node.code:<70}  # {node.shape}" for node in calls]
        return "\n".join(lines)
    return (text.coloured if terminal else text.render)(report, top_k)


def failures(report: Report, fail_under_db: float | None, fail_on_fallback: bool) -> list[str]:
    """Why a run with these limits fails; nothing when it does not."""
    found = []
    if fail_under_db is not None:
        measured = sorted((loss(s), s.name) for s in report.sites if loss(s) < UNKNOWN)
        bad = [(value, name) for value, name in measured if value < fail_under_db]
        found += [f"{name}: {value:.1f} dB is under {fail_under_db:g}" for value, name in bad]
        if not measured:
            found.append("nothing was measured, so --fail-under-db cannot be met")
    if fail_on_fallback:
        found += [f"{r.linear} was not taken: {r.reason}" for r in report.refused if not r.asked]
    return found


def compare(a: str, b: str, one: Callable[[str], Report]) -> str:
    """The difference of two saved reports, or of what two recipes make of a model (`one` inspects it)."""
    reports = [Report.load(name) if _is_report(name) else one(name) for name in (a, b)]
    return diff(reports[0], reports[1], (a, b))


def _is_report(name: str) -> bool:
    path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"int8pass_report"' in file.read(64)


__all__ = ["Request", "compare", "failures", "inspect_subject", "report_on", "save", "shown"]
