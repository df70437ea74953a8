"""Tiles found by measuring: tables by chip, looked up when a graph is compiled, never searched then.

A table belongs to one chip and one minor version of Triton. Some are shipped (`lowering/triton/tiles/*.json`);
`int8pass bench --tune` measures more and keeps them in the user's cache, where they come before the shipped ones. Where
no table has the layer, `lowering.triton.choice` has a rule for every size.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor

from lowering import numerics
from lowering.ops.linear import linear_w8a8
from lowering.triton.launch import FEW_ROWS

SHIPPED = Path(__file__).parent / "tiles"
WGMMA = "wgmma"  # instead of a tile: the kernel of `lowering.triton.hopper`
FEWEST, MOST = 16, 8192
WIDTHS = (32, 64, 128, 256)
MOST_COMPILED, WIDEST = 4096, WIDTHS[-1]
L2_BYTES = 64 * 2**20
WARM_UP = 0.05  # seconds of calls before those that are timed
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tile:
    """Rows, channels and depth of one program's tile, its warps and the depth of its software pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


Choice = Tile | str


@dataclass(frozen=True)
class Problem:
    """A W8A8 linear: rows (a power of two: those up to it share an entry), output and input channels."""

    rows: int
    n: int
    k: int


@dataclass(frozen=True)
class Entry:
    """The fastest choice for a problem, its median time and that of the rule's choice, in microseconds."""

    problem: Problem
    choice: Choice
    us: float
    rule_us: float


def bucket(rows: int) -> int:
    """The power of two whose entry `rows` rows take.

    By comparisons alone: of a symbolic number they make a plain one.
    """
    size = FEWEST
    while size < min(rows, MOST):
        size *= 2
    return size


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def cache_folder() -> Path:
    """Where tables measured here are kept: `$INT8PASS_CACHE/tiles`, else `~/.cache/int8pass/tiles`."""
    chosen = os.environ.get("INT8PASS_CACHE")
    return (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "int8pass") / "tiles"


def file_name(device: str) -> str:
    """Of a chip's table."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def load(path: Path) -> dict[Problem, Entry]:
    """The entries of a table; none if there is no such file, it is damaged, or it is of another Triton."""
    try:
        table = json.loads(path.read_text())
        if _minor(table["triton"]) != _minor(triton.__version__):
            return {}
        entries = [
            Entry(
                Problem(**e["problem"]),
                e["choice"] if isinstance(e["choice"], str) else Tile(**e["choice"]),
                float(e["us"]),
                float(e["rule_us"]),
            )
            for e in table["entries"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {entry.problem: entry for entry in entries}


def save(path: Path, device: str, entries: Iterable[Entry], measured: Iterable[Problem] = ()) -> None:
    """Add `entries` to the table at `path` (made if need be), in one step. Of what was `measured` only they stay."""
    gone = set(measured)
    known = {problem: entry for problem, entry in load(path).items() if problem not in gone}
    merged = known | {entry.problem: entry for entry in entries}
    table = {
        "device": device,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "entries": [asdict(merged[p]) for p in sorted(merged, key=lambda p: (p.n, p.k, p.rows))],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        file.write(json.dumps(table, indent=1) + "\n")
    os.replace(file.name, path)
    table_of.cache_clear()


@functools.cache
def table_of(device: str) -> dict[Problem, Entry]:
    """All entries for a chip, those measured here before the shipped ones."""
    name = file_name(device)
    return load(SHIPPED / name) | load(cache_folder() / name)


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else ""


def chosen(device: torch.device, rows: int, n: int | torch.SymInt, k: int | torch.SymInt) -> Choice | None:
    """What the tables say about a linear of `rows`, `n` output and `k` input channels on this device.

    Nothing about a layer whose size is symbolic.
    """
    if not isinstance(n, int) or not isinstance(k, int):
        return None
    return _entry(device, bucket(rows), n, k)


@torch.compiler.assume_constant_result  # Dynamo cannot look into files, nor ask for the name of a device
def _entry(device: torch.device, rows: int, n: int, k: int) -> Choice | None:
    name = _name(device)
    entry = table_of(name).get(Problem(rows, n, k)) if name else None
    return None if entry is None else entry.choice


# ---------------------------------------------------------------------------------------------------------------------
# The search


def candidates(problem: Problem, shared: int) -> Iterator[Tile]:
    """Tiles worth a measurement, of at most `shared` bytes of shared memory."""
    rows = problem.rows
    heights = {16: (16,), 32: (16, 32), 64: (32, 64)}.get(rows, (64, 128))
    widths = WIDTHS[:2] if rows <= 16 else WIDTHS[:3] if rows <= 64 else WIDTHS[1:]
    for m, n, k, stages in itertools.product(heights, widths, (128, 256), (3, 4, 5)):
        warps = 8 if m * n >= 128 * 128 else 4
        if m * n <= 128 * 256 and problem.k % k == 0 and (m + n) * k * stages <= shared and n <= problem.n:
            yield Tile(m, n, k, warps, stages)


def search(
    problem: Problem,
    choices: Iterable[Choice],
    call: Callable[[Choice | None], Tensor],
    time_of: Callable[[Choice | None], float],
    gain: float = 0.02,
) -> Entry | None:
    """The fastest of `choices` that gives the same result as the rule's choice (None).

    A choice that does not compile or fit is passed over, one with another result too. None when nothing is faster than
    the rule by at least `gain`.
    """
    expected, rule = call(None), time_of(None)
    best: tuple[float, Choice] | None = None
    for choice in choices:
        try:
            if not torch.equal(call(choice), expected):
                continue
            us = time_of(choice)
        except (RuntimeError, ValueError, triton.runtime.errors.OutOfResources, triton.CompilationError):
            continue
        if best is None or us < best[0]:
            best = us, choice
    if best is None:
        return None
    rule = min(rule, time_of(None))  # what is timed first must not lose by that
    if best[0] > rule * (1.0 - gain):
        return None
    return Entry(problem, best[1], round(best[0], 2), round(rule, 2))


class Bench:
    """Runs one problem with random codes; several weights in turn, more than the L2 cache holds."""

    def __init__(self, problem: Problem, device: torch.device, copies: int | None = None) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        x = torch.randn(problem.rows, problem.k, device=device, generator=generator)
        self._codes, self._scale = numerics.quantize_symmetric(x.bfloat16())
        count = copies or max(1, -(-3 * L2_BYTES // (problem.n * problem.k)))
        self._weights = [
            numerics.quantize_weight(torch.randn(problem.n, problem.k, device=device, generator=generator))
            for _ in range(count)
        ]

    def call(self, choice: Choice | None, which: int = 0) -> Tensor:
        """One linear with a given choice (None: the rule's)."""
        from lowering.triton import choice as choices
        from lowering.triton import linear

        weight, scale = self._weights[which]
        args = (self._codes, self._scale, None, weight, scale, None, None, None, None, None, torch.bfloat16)
        with choices.forced(choice):
            if choice == WGMMA:
                return linear.linear_w8a8_wgmma(*args)
            if choice is None:
                return linear_w8a8.choose("triton", args).function(*args)
            return linear.linear_w8a8_tiles(*args)

    def microseconds(self, choice: Choice | None, replays: int = 7) -> float:
        """Median time of one call."""
        return replayed([functools.partial(self.call, choice, which) for which in range(len(self._weights))], replays)


def replayed(calls: Sequence[Callable[[], object]], replays: int = 7) -> float:
    """Median microseconds of one call, from replays of a CUDA graph of all of them.

    Not from the first ones: those of a weight of 525 MB took up to 13 % longer just after it was made.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    rounds = max(1, 8 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:  # the first call of a weight does more (`lowering.triton.wgmma`)
            call()
        with torch.cuda.graph(graph, stream=stream):
            for call in [*calls] * rounds:
                call()
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)


def _choices(problem: Problem, device: torch.device) -> list[Choice]:
    from lowering.triton.choice import on_hopper, shared_memory

    found: list[Choice] = [*candidates(problem, shared_memory(device))]
    if problem.rows <= FEW_ROWS or not on_hopper(device) or problem.n % 16 or problem.k % 16:
        return found  # of few rows the Gluon kernel is the rule, where launches overlap
    return [*found, WGMMA]


def _compile_part(problem: Problem, choices: list[Choice], device: torch.device) -> None:
    bench = Bench(problem, device, copies=1)
    for choice in choices:
        try:
            bench.call(choice)
            torch.cuda.synchronize()
        except (RuntimeError, triton.runtime.errors.OutOfResources, triton.CompilationError):
            continue


def _batched(choices: list[Choice], size: int) -> list[list[Choice]]:
    return [choices[start : start + size] for start in range(0, len(choices), size)]


def distinct(problems: Iterable[Problem]) -> list[Problem]:
    """Problems that have all kernels of `problems`: of other channels they are the same, but for masks of the last
    tile. Few channels, as every process holds a weight."""
    return [*dict.fromkeys(replace(p, n=min(p.n, MOST_COMPILED + p.n % WIDEST)) for p in problems)]


def compile_all(problems: list[Problem], device: torch.device, workers: int, progress: Progress) -> None:
    """Fill Triton's cache on disk with every choice, in several processes: nearly all of a search is compilation."""
    parts = [(p, part) for p in distinct(problems) for part in _batched(_choices(p, device), 6)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_compile_part, problem, part, device) for problem, part in parts]
        for done, job in enumerate(jobs, 1):
            job.result()
            progress(done, len(jobs))


def tune(problems: list[Problem], device: torch.device, progress: Progress) -> list[Entry]:
    """Search every problem on `device`: the entries that beat the rule, and for the rest none.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tiles are not searched while a CUDA graph is captured")
    entries = []
    for done, problem in enumerate(problems, 1):
        bench = Bench(problem, device)
        entry = search(problem, _choices(problem, device), bench.call, bench.microseconds)
        entries += [entry] if entry else []
        progress(done, len(problems))
    return entries
