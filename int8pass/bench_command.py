"""`int8pass bench`: the command about the speed of linear layers on a GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from int8pass import bench as layer_bench
from int8pass.errors import OptionError
from int8pass.terminal import DeviceOption, Steps, device_of, reported, require_folder, say


def bench(
    device: DeviceOption = "auto",
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Output x input channels, as in 4096x14336; may be repeated. Default: an 8B decoder's layers."
        ),
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(min=1, max=8192, help="Rows (tokens) of the input; may be repeated.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="First search the fastest tiles for this GPU and keep them (minutes).")
    ] = False,
    table_file: Annotated[
        Path | None, typer.Option("--table", help="Write what --tune finds to this table, not to the cache.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Time int8 linear layers on this GPU beside bf16 ones; with --tune, search their tiles first.

    Found tiles are used by every later torch.compile with int8 on this chip; nothing is searched then.
    """
    with reported():
        if table_file is not None and not tune:
            raise OptionError("--table: is for what --tune finds.")
        for option, file in (("--table", table_file), ("--json", json_file)):
            if file is not None:
                require_folder(option, file)
        shapes = layer_bench.parse_shapes(shape) if shape else layer_bench.SHAPES
        counts = rows or layer_bench.ROWS
        device_ = device_of(device)
        layer_bench.require_gpu(device_)
        with Steps() as progress:
            if tune:
                count, path = layer_bench.tune(shapes, counts, device_, progress, table_file)
            found = layer_bench.speeds(shapes, counts, device_, progress)
        if tune:
            say(f"{count} of {len(shapes) * len(counts)} layers are faster with tiles found now; kept in {path}")
        Console().print(speed_table(found))
        if json_file is not None:
            json_file.write_text(json.dumps([dataclasses.asdict(speed) for speed in found], indent=1) + "\n")


def speed_table(speeds: list[layer_bench.Speed]) -> Table:
    """What `int8pass bench` prints."""
    shown = Table(title="Linear layers, microseconds (int8: activations quantized beforehand)")
    for title in ("rows", "N", "K", "int8", "bf16", "speed-up", "tile"):
        shown.add_column(title, justify="left" if title == "tile" else "right")
    for s in speeds:
        numbers = (str(s.rows), str(s.n), str(s.k), f"{s.int8_us:.1f}", f"{s.bf16_us:.1f}")
        shown.add_row(*numbers, f"{s.bf16_us / s.int8_us:.2f}x", s.kernel)
    return shown
