"""Tables of tiles: looked up by chip and bucket, searched with a fake clock, stored in one step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="tiles belong to the Triton kernels")
pytest.importorskip("typer")

from sm90 import launches, w8a8_args  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from int8pass import bench, bench_command, cli  # noqa: E402
from int8pass.errors import OptionError  # noqa: E402
from lowering.triton import choice, linear, tuning  # noqa: E402
from lowering.triton.tuning import WGMMA, Entry, Problem, Tile  # noqa: E402

CUDA = torch.device("cuda")
GPU = "NVIDIA Fake 9000"
SMALL = Problem(16, 256, 512)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A chip of which nothing is shipped, and an empty cache; returns where its table would be."""
    monkeypatch.setenv("INT8PASS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_name", lambda device: GPU)
    tuning.table_of.cache_clear()
    yield tuning.cache_folder() / tuning.file_name(GPU)
    tuning.table_of.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@given(st.integers(1, 20000))
def test_a_bucket_is_the_next_power_of_two(rows: int) -> None:
    found = tuning.bucket(rows)
    assert found & (found - 1) == 0
    assert tuning.FEWEST <= found <= tuning.MOST
    assert tuning.bucket(found) == found
    if tuning.FEWEST <= rows <= tuning.MOST:
        assert rows <= found < 2 * rows


def test_a_table_is_looked_up_by_chip_bucket_and_layer(fake_gpu: Path) -> None:
    tile = Tile(16, 32, 128, 4, 3)
    assert tuning.chosen(CUDA, 9, 256, 512) is None
    tuning.save(fake_gpu, GPU, [Entry(SMALL, tile, 1.0, 2.0)])
    assert tuning.chosen(CUDA, 9, 256, 512) == tile
    assert tuning.chosen(CUDA, 17, 256, 512) is None
    assert tuning.chosen(CUDA, 9, 512, 256) is None
    tuning.save(fake_gpu, GPU, [Entry(Problem(32, 256, 512), WGMMA, 1.0, 2.0)])
    assert tuning.chosen(CUDA, 9, 256, 512) == tile
    assert tuning.chosen(CUDA, 17, 256, 512) == WGMMA
    assert [path.name for path in fake_gpu.parent.iterdir()] == [fake_gpu.name]
    tuning.save(fake_gpu, GPU, [], [SMALL])  # measured again, and now the rule is as fast
    assert tuning.chosen(CUDA, 9, 256, 512) is None
    assert tuning.chosen(CUDA, 17, 256, 512) == WGMMA


@pytest.mark.parametrize("damage", ["not json", "{}", '{"triton": "0.1", "entries": []}'])
def test_a_table_that_cannot_be_used_counts_as_none(fake_gpu: Path, damage: str) -> None:
    fake_gpu.parent.mkdir(parents=True)
    fake_gpu.write_text(damage)
    assert tuning.chosen(CUDA, 9, 256, 512) is None


def test_one_own_entry_hides_one_shipped_entry(fake_gpu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    shipped, own = Tile(16, 64, 128, 4, 3), Tile(16, 32, 128, 4, 3)
    other = Problem(64, 256, 512)
    tuning.save(tmp_path / "shipped" / tuning.file_name(GPU), GPU, [Entry(p, shipped, 1, 2) for p in (SMALL, other)])
    tuning.save(fake_gpu, GPU, [Entry(SMALL, own, 1, 2)])
    assert tuning.chosen(CUDA, 16, 256, 512) == own
    assert tuning.chosen(CUDA, 64, 256, 512) == shipped


def test_shipped_tables_fit_their_chips() -> None:
    """Every tile divides the layer's depth and fits an H100's shared memory."""
    tables = sorted(tuning.SHIPPED.glob("*.json"))
    assert tables
    for path in tables:
        table = json.loads(path.read_text())
        assert path.name == tuning.file_name(table["device"])
        for entry in table["entries"]:
            assert entry["us"] < entry["rule_us"]
            if entry["choice"] != WGMMA:
                tile = Tile(**entry["choice"])
                assert entry["problem"]["k"] % tile.k == 0
                assert (tile.m + tile.n) * tile.k * tile.stages <= 227 * 1024


def test_a_launch_takes_the_measured_tile(fake_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tile() -> tuple[int, int, int]:
        (launch,) = launches(monkeypatch, linear.linear_w8a8_tiles, *w8a8_args(12, 256, 512, bare=True))
        return tuple(launch.arguments[f"BLOCK_{side}"] for side in "MNK")

    rule = tile()
    tuning.save(fake_gpu, GPU, [Entry(SMALL, Tile(16, 64, 128, 4, 3), 1.0, 2.0)])
    assert tile() == (16, 64, 128) != rule
    with choice.forced(None):
        assert tile() == rule


# ---------------------------------------------------------------------------------------------------------------------
# The search


def test_the_fastest_right_choice_wins() -> None:
    choices = [Tile(16, n, 128, 4, 3) for n in (32, 64, 128, 256)]
    times = {None: 10.0, choices[0]: 9.0, choices[1]: 7.0, choices[2]: 1.0, choices[3]: 5.0}

    def call(choice: tuning.Choice | None) -> torch.Tensor:
        if choice == choices[3]:
            raise RuntimeError("does not compile")
        return torch.full((2,), 1.0 if choice == choices[2] else 0.0)  # wrong, and fast

    found = tuning.search(SMALL, choices, call, times.__getitem__)
    assert found == Entry(SMALL, choices[1], 7.0, 10.0)


def test_a_rule_that_was_slow_when_it_was_timed_first_is_timed_again() -> None:
    tile = Tile(16, 32, 128, 4, 3)
    times = {None: iter([13.0, 10.0]), tile: iter([9.9])}
    assert tuning.search(SMALL, [tile], lambda choice: torch.zeros(1), lambda choice: next(times[choice])) is None


@pytest.mark.parametrize(("us", "kept"), [(9.9, False), (9.0, True)])
def test_a_gain_within_the_noise_is_none(us: float, kept: bool) -> None:
    tile = Tile(16, 32, 128, 4, 3)
    found = tuning.search(SMALL, [tile], lambda choice: torch.zeros(1), {None: 10.0, tile: us}.__getitem__)
    assert (found is not None) == kept


@pytest.mark.parametrize("rows", [16, 32, 64, 128, 512, 4096])
def test_candidates_fit(rows: int) -> None:
    tiles = [*tuning.candidates(Problem(rows, 4096, 14336), 227 * 1024)]
    assert len(tiles) == len(set(tiles)) >= 5
    for tile in tiles:
        assert 14336 % tile.k == 0
        assert (tile.m + tile.n) * tile.k * tile.stages <= 227 * 1024
    assert not [*tuning.candidates(Problem(rows, 4096, 14336), 1024)]


@pytest.mark.parametrize(("rows", "listed"), [(16, False), (64, False), (128, True), (4096, True)])
def test_the_gluon_kernel_competes_where_it_is_not_the_rule(
    monkeypatch: pytest.MonkeyPatch, rows: int, listed: bool
) -> None:
    monkeypatch.setattr(choice, "on_hopper", lambda device: True)
    assert (WGMMA in tuning._choices(Problem(rows, 4096, 4096), CUDA)) is listed
    assert WGMMA not in tuning._choices(Problem(rows, 4100, 4096), CUDA), "channels in multiples of 16"


@given(st.lists(st.tuples(st.sampled_from([16, 128]), st.integers(1, 300_000)), min_size=1, max_size=8))
def test_kernels_are_compiled_for_few_channels(layers: list[tuple[int, int]]) -> None:
    """Of all problems, with the same masks: a vocabulary in every process does not fit a GPU's memory."""
    problems = [Problem(rows, n, 4096) for rows, n in layers]
    compiled = tuning.distinct(problems)
    assert len(compiled) == len(set(compiled)) <= len(problems)
    assert all(p.n <= tuning.MOST_COMPILED + tuning.WIDEST for p in compiled)
    for p in problems:
        same = [c for c in compiled if (c.rows, c.k) == (p.rows, p.k)]
        assert any([c.n % w == 0 for w in tuning.WIDTHS] == [p.n % w == 0 for w in tuning.WIDTHS] for c in same)
    assert len(tuning.distinct([Problem(16, n, 4096) for n in (4096, 6144, 28672, 128256)])) == 1


def test_no_search_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="captured"):
        tuning.tune([SMALL], CUDA, lambda done, total: None)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_shapes_are_read() -> None:
    assert bench.parse_shapes(["4096x14336", "8X16"]) == ((4096, 14336), (8, 16))
    for wrong in ("4096", "4096x", "0x4", "axb", "1x2x3"):
        with pytest.raises(OptionError, match="--shape"):
            bench.parse_shapes([wrong])


def test_the_command_tunes_stores_and_prints(fake_gpu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tile = Tile(16, 32, 128, 4, 3)
    monkeypatch.setattr(bench_command, "device_of", lambda text: CUDA)
    monkeypatch.setattr(bench, "require_gpu", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(tuning, "compile_all", lambda problems, device, workers, progress: progress(1, 1))
    monkeypatch.setattr(tuning, "tune", lambda problems, device, progress: [Entry(p, tile, 1, 2) for p in problems])
    speeds = [bench.Speed(16, 256, 512, 2.0, 5.0, "rule")]
    monkeypatch.setattr(bench, "speeds", lambda shapes, rows, device, progress: speeds)
    arguments = ["bench", "--tune", "--shape", "256x512", "--rows", "9", "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "1 of 1 layers" in result.output
    assert "2.50x" in result.output
    assert tuning.chosen(CUDA, 16, 256, 512) == tile
    assert json.loads((tmp_path / "out.json").read_text())[0]["bf16_us"] == 5.0


def test_the_command_says_what_it_lacks(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        result = CliRunner().invoke(cli.app, ["bench"])
        assert result.exit_code == 1
        assert "no CUDA device" in result.output
    result = CliRunner().invoke(cli.app, ["bench", "--table", str(tmp_path / "t.json")])
    assert result.exit_code == 1
    assert "--tune" in result.output
