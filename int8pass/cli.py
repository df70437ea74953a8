"""The `int8pass` command: run, inspect, calibrate, export, lint, bench.

Only modules of commands import typer; rich is imported by the text of a report too. The table and the display
of progress are used by the examples too.
"""

from __future__ import annotations

import enum
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

import int8pass
from int8pass import hub, measure
from int8pass.errors import CaptureError, OptionError, UnsupportedError

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as missing:
    raise SystemExit(f"the int8pass command needs {missing.name}: pip install 'int8pass[hf]'") from None

from int8pass import bench_command, onnx_commands
from int8pass.terminal import (
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelArgument,
    RecipeOption,
    Steps,
    device_of,
    load,
    recipe_of,
    reported,
    require_folder,
    say,
    warnings_printed,
)

CALIBRATION_START = 100
"""The first calibration window: far from those that perplexity is measured on."""


class Mode(enum.StrEnum):
    """torch.compile's `mode`, for both forms of the model."""

    default = "default"
    reduce_overhead = "reduce-overhead"
    max_autotune = "max-autotune"


app = typer.Typer(
    name="int8pass",
    help='A PyTorch model in 8-bit integers: torch.compile(model, backend="int8").',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `int8pass` command."""
    app()


@app.command()
def run(
    model: ModelArgument,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    recipe: RecipeOption = "default",
    mode: Annotated[Mode, typer.Option(help="torch.compile's mode, for both forms.")] = Mode.default,
    windows: Annotated[int, typer.Option(min=1, max=100, help="Windows of 512 tokens for perplexity.")] = 6,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the greedy continuation.")] = 32,
    prompt: Annotated[str, typer.Option(help="What is continued.")] = "Gravity is",
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Calibrate first, on 8 other windows.")] = False,
    inspect: Annotated[bool, typer.Option("--inspect", help="Print the sites and every linear not taken.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure MODEL in its original dtype (plain Inductor) and in int8, and print one table."""
    with reported():
        chosen = recipe_of(recipe)
        device_ = device_of(device)
        _require_compiler(device_)
        if json_file is not None:
            require_folder("--json", json_file)
        with Steps() as progress:
            loaded, tokenizer = load(model, dtype, device_, progress)
            _require_text_generator(loaded, model)
            text = hub.windows(tokenizer, measure.LENGTH)
            if calibrate:
                preset = "outlier-columns" if recipe == "default" else recipe
                chosen = calibrated(loaded, text, 8, preset, progress)
            comparison = measure.compare(
                loaded,
                tokenizer,
                text[:windows],
                name=model,
                tokens=tokens,
                prompt=prompt,
                mode=None if mode is Mode.default else mode.value,
                options=None if recipe == "default" and not calibrate else {"recipe": chosen},
                progress=progress,
            )
        Console().print(table(comparison))
        if inspect:
            say(str(comparison.report))
        if json_file is not None:
            json_file.write_text(json.dumps(comparison.as_dict(), indent=2) + "\n")


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="As for run, or package.module:factory (returns a model, (model, args) or (model, args, data)), an "
            "exported .pt2, an .onnx. Not needed to --diff two saved reports."
        ),
    ] = "",
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    recipe: RecipeOption = "default",
    length: Annotated[int, typer.Option(min=2, help="Tokens of the input and of every window of --text.")] = 128,
    text: Annotated[
        Path | None, typer.Option(help="Measure activations, errors and times on this text (minutes).")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text to measure on.")] = 4,
    sensitivity: Annotated[
        bool, typer.Option(help="With --text, also quantize one site at a time: half a run of the model per site.")
    ] = True,
    profile: Annotated[
        bool, typer.Option(help="With --text, also compile the graph with Inductor and profile what it runs.")
    ] = True,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="Write .html, .json, .dot, .svg, .txt or .nodes.json; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the worst sites, worst first.")] = None,
    stage: Annotated[
        str | None, typer.Option(help="Show this graph: captured, normalized, smoothed, quantized or fused.")
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="What differs between two saved reports, or two recipes for MODEL."),
    ] = None,
    fail_under_db: Annotated[
        float | None, typer.Option(help="Exit with 3 when a site's SQNR is less: local, without --text of its weights.")
    ] = None,
    fail_on_fallback: Annotated[
        bool, typer.Option("--fail-on-fallback", help="Exit with 3 when a linear is refused that should be taken.")
    ] = False,
) -> None:
    """Show what int8 does with MODEL: every site, its errors and costs, every linear not taken and why."""
    from int8pass.inspect import command

    with _inspection_reported():
        device_ = device_of(device)

        def request(settings: str) -> command.Request:
            return command.Request(
                model, recipe_of(settings), device_, length, text, windows, sensitivity, profile, tuple(output or ()),
                stage,
            )  # fmt: skip

        with Steps() as progress:

            def inspected(settings: str) -> int8pass.Report:
                if not model:
                    raise OptionError(f"MODEL is missing ({settings} is no saved report, so a model must be inspected)")
                return command.report_on(request(settings), lambda name: load(name, dtype, device_, progress), progress)

            if diff is not None:
                typer.echo(command.compare(*diff, inspected))
                return
            report = inspected(recipe)
        command.save(report, tuple(output or ()), stage)
        console = Console()
        # not through the console: its own line breaks would spoil what is piped
        typer.echo(report.to_json() if as_json else command.shown(report, top_k, stage, console.is_terminal))
        for path in output or ():
            say(f"wrote {path}", stderr=True)
        failed = command.failures(report, fail_under_db, fail_on_fallback)
    for line in failed:
        say(f"int8pass: {line}", stderr=True)
    if failed:
        raise typer.Exit(3)


@contextmanager
def _inspection_reported() -> Iterator[None]:
    """As `_reported`; of a model that cannot be captured, what could be seen is printed first."""
    with reported():
        try:
            yield
        except CaptureError as failure:
            if isinstance(failure.partial, int8pass.Report) and failure.partial.graphs:
                typer.echo(failure.partial)
            raise


@app.command()
def calibrate(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe file to write.")] = Path("recipe.json"),
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    recipe: RecipeOption = "outlier-columns",
    text: Annotated[
        Path | None, typer.Option("--text", help="UTF-8 text like what MODEL will read (default: Python's help).")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to run through MODEL.")] = 8,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Float columns per site (O2, O3: as many weights in all).")
    ] = None,
    cost: Annotated[float | None, typer.Option(min=1.0, help="Budget: multiple of plain int8's cost.")] = None,
    error: Annotated[float | None, typer.Option(min=0.0, help="Budget: mean relative error of the sites.")] = None,
) -> None:
    """Run text through MODEL, and write a recipe for `int8pass run MODEL --recipe FILE` and for torch.compile."""
    with reported():
        chosen = recipe_of(recipe)  # a wrong name is said before anything is loaded
        device_ = device_of(device)
        require_folder("--output", output)
        content = _text(text)
        with Steps() as progress, warnings_printed():
            loaded, tokenizer = load(model, dtype, device_, progress)
            if content is None:
                batches = _batches(hub.windows(tokenizer, measure.LENGTH), windows, CALIBRATION_START)
            else:
                batches = _batches(hub.windows(tokenizer, measure.LENGTH, content), windows, 0)
            made = int8pass.calibrate(
                loaded,
                [{"input_ids": ids.to(device_)} for ids in batches],
                chosen,
                columns=columns,
                cost=cost,
                error=error,
                progress=progress,
            )
        made.save(output)
        errors = [site.error for site in made.sites.values() if site.error is not None]
        mean = sum(errors) / max(1, len(errors))
        say(f"wrote {output}: {len(made.sites)} sites, mean relative error {mean:.2e}")


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A recipe file.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Print what differs between two recipes, one line each; exit 1 where something does."""
    with reported():
        lines = int8pass.Recipe.load(first).diff(int8pass.Recipe.load(second))
    for line in lines or ["no difference"]:
        say(line)
    if lines:
        raise typer.Exit(1)


for _command in (onnx_commands.export, onnx_commands.lint, bench_command.bench):
    app.command()(_command)


def table(comparison: measure.Comparison) -> Table:
    """The comparison as people read it: one column per form, and what int8 makes of it."""
    original, quantized = comparison.original, comparison.int8
    shown = Table(
        title=f"{comparison.model} on {comparison.device}",
        caption=f"torch {comparison.torch}; perplexity on {comparison.windows} windows of {measure.LENGTH} tokens",
    )
    shown.add_column("", no_wrap=True)
    shown.add_column(f"{original.name} (Inductor)", justify="right")
    shown.add_column('backend="int8"', justify="right")
    shown.add_column("int8 / original", justify="right")
    for label, before, after, digits in (
        ("perplexity", original.perplexity, quantized.perplexity, 3),
        (f"prefill {measure.LENGTH}, tok/s", original.prefill_tokens_per_s, quantized.prefill_tokens_per_s, 1),
        ("decode, tok/s", original.decode_tokens_per_s, quantized.decode_tokens_per_s, 1),
        ("linear weights MB", original.linear_weight_bytes / 1e6, quantized.linear_weight_bytes / 1e6, 1),
        ("first compile, s", original.compile_s, quantized.compile_s, 1),
    ):
        ratio = f"{after / before:.{digits + 1}f}" if before else ""
        shown.add_row(label, f"{before:.{digits}f}", f"{after:.{digits}f}", ratio)
    counts = comparison.report.counts
    shown.add_row("linears in int8", "0", f"{counts['taken']} in {counts['sites']} sites", "")
    shown.add_row("linears refused", "", str(counts["refused"]), "")
    shown.add_section()
    continuations = [Text(form.continuation.strip(), justify="left") for form in (original, quantized)]
    shown.add_row(Text(f"{comparison.prompt} …"), *continuations, "")
    return shown


def calibrated(
    model: nn.Module, text: torch.Tensor, count: int, recipe: str, progress: measure.Progress
) -> int8pass.Recipe:
    """A recipe from `count` windows of `text`, taken far from those that perplexity is measured on."""
    device = next(model.parameters()).device
    batches = [{"input_ids": ids.to(device)} for ids in _batches(text, count, CALIBRATION_START)]
    return int8pass.calibrate(model, batches, recipe, progress=progress)


def _batches(windows: torch.Tensor, count: int, start: int) -> list[torch.Tensor]:
    """`count` windows from `start` on, or the last ones there are, as batches of one."""
    if not len(windows):
        raise OptionError(f"--text: fewer than {measure.LENGTH} tokens; calibration needs at least one window of them.")
    first = max(0, min(start, len(windows) - count))
    return [window[None] for window in windows[first : first + count]]


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise OptionError(f"--text {path}: cannot be read as UTF-8 text: {failure}") from failure


def _require_text_generator(model: nn.Module, name: str) -> None:
    if measure.output_head(model) is None or not hasattr(model, "generate"):
        raise UnsupportedError(
            f"`int8pass run` measures models that generate text, and {name} is a {type(model).__name__}. "
            f"See what int8 does with it by: int8pass inspect {name}"
        )


def _require_compiler(device: torch.device) -> None:
    """Inductor builds C++ for a CPU; say so now, and not after minutes with a traceback."""
    if device.type != "cpu":
        return
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not any(shutil.which(compiler.split()[0]) for compiler in compilers):
        raise UnsupportedError(f"torch.compile on a CPU needs a C++ compiler: {' or '.join(compilers)} was not found.")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.is_file():
        raise UnsupportedError(
            f"torch.compile on a CPU needs Python's headers, and there is no {headers}; "
            f"the package python{sys.version_info.major}.{sys.version_info.minor}-dev or its like brings them."
        )
