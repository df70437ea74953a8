"""The Triton kernels without a GPU: compiled ahead of time for an H100 (sm_90)."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need Triton")
if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels can be neither traced nor compiled", allow_module_level=True)

from sm90 import BF16, F16, F32, I8, Compiled, compile_for_sm90, empty, launches, one, w8a8_args  # noqa: E402

from lowering.triton import choice, hilo, linear, linear_w8a16, tuning  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Linear layers


def shapes(tiles: choice.Tiles) -> list[tuple[int, int]]:
    """Rows and channels that select each entry of a table."""
    return [(4096 if m == math.inf else int(m), 28672 if n == math.inf else int(n) // 128 * 128) for m, n, _ in tiles]


@pytest.mark.parametrize(("m", "n"), shapes(choice.W8A8_TILES))
@pytest.mark.parametrize("form", ["bare", "affine", "bf16-outliers", "int8-outliers"])
def test_w8a8(monkeypatch: pytest.MonkeyPatch, m: int, n: int, form: str) -> None:
    outlier = {"bf16-outliers": BF16, "int8-outliers": I8}.get(form)
    args = w8a8_args(m, n, 4096, outlier=outlier, bare=form == "bare")
    launch, code = one(monkeypatch, linear.linear_w8a8_tiles, *args)
    assert code.stack == 0, "spills"
    assert code.shared <= 227 * 1024
    # Large tiles: two programs share a multiprocessor (64 K registers, 228 KB), one computes while the other waits.
    if launch.arguments["BLOCK_M"] == 128:
        assert 2 * 32 * launch.options["num_warps"] * code.registers <= 65536
        assert 2 * (code.shared + 1024) <= 228 * 1024
    if launch.arguments["BLOCK_M"] >= 64:
        assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8", code.ptx)
    else:
        assert re.search(r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8", code.ptx)
    # Weights and codes stream through shared memory without passing registers.
    assert "cp.async" in code.ptx


def shipped_tiles() -> list[tuning.Tile]:
    """Every tile of a shipped table."""
    entries = [entry for path in tuning.SHIPPED.glob("*.json") for entry in json.loads(path.read_text())["entries"]]
    return sorted({tuning.Tile(**e["choice"]) for e in entries if e["choice"] != tuning.WGMMA}, key=str)


@pytest.mark.parametrize("tile", shipped_tiles(), ids=str)
@pytest.mark.parametrize("outlier", [None, BF16], ids=["affine", "bf16-outliers"])
def test_a_shipped_tile_fits(monkeypatch: pytest.MonkeyPatch, tile: tuning.Tile, outlier: torch.dtype | None) -> None:
    with choice.forced(tile):
        launch, code = one(monkeypatch, linear.linear_w8a8_tiles, *w8a8_args(tile.m, 4096, 4096, outlier=outlier))
    assert (launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]) == (tile.m, tile.n)
    assert code.stack == 0, "spills"
    assert code.shared <= 227 * 1024
    assert ("wgmma" in code.ptx) == (tile.m >= 64)


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "outlier", "r"),
    [
        (1, 7, 123, F32, F32, 3),
        (123, 123, 123, F32, F32, 17),
        (4096, 320, 576, F16, I8, 128),
        (123, 1, 1, F16, None, 0),
        (17, 4096, 7, BF16, I8, 8),
    ],
    ids=str,
)
def test_w8a8_odd(
    monkeypatch: pytest.MonkeyPatch, m: int, n: int, k: int, dtype: torch.dtype, outlier: torch.dtype | None, r: int
) -> None:
    _, code = one(monkeypatch, linear.linear_w8a8_tiles, *w8a8_args(m, n, k, dtype, outlier, r))
    assert code.stack == 0, "spills"


W8A16_CASES = [
    *((m, n, BF16) for m, n in [(1, 4096), *shapes(linear_w8a16.W8A16_TILES)]),
    *((m, n, F32) for m, n in [(1, 4096), *shapes(linear_w8a16.W8A16_FP32_TILES)]),
]


@pytest.mark.parametrize("residual", [False, True], ids=["bare", "residual"])
@pytest.mark.parametrize(("m", "n", "dtype"), W8A16_CASES, ids=str)
def test_w8a16(monkeypatch: pytest.MonkeyPatch, m: int, n: int, dtype: torch.dtype, residual: bool) -> None:
    args = (empty(m, 4096, dtype=dtype), empty(n, 4096, dtype=I8), empty(n, dtype=F32), empty(n, dtype=dtype))
    operator, more = linear_w8a16.linear_w8a16_tiles, ()
    if residual:
        operator, more = linear_w8a16.linear_w8a16_add_tiles, (empty(m, n, dtype=dtype),)
    _, code = one(monkeypatch, operator, *args, *more)
    assert code.stack == 0, "spills"
    assert code.shared <= 227 * 1024
    assert "cp.async" in code.ptx, "weights stream through shared memory, also of one row"
    assert ("mma" in code.ptx) == (m > 1 and dtype == BF16), "tensor cores for 16-bit floats, never for fp32 (tf32)"


@pytest.mark.parametrize("residual", [False, True], ids=["bare", "residual"])
def test_w8a16_of_one_deep_row(monkeypatch: pytest.MonkeyPatch, residual: bool) -> None:
    args = (empty(1, 14336), empty(4095, 14336, dtype=I8), empty(4095, dtype=F32), None)
    operator = linear_w8a16.linear_w8a16_add_tiles if residual else linear_w8a16.linear_w8a16_tiles
    launch, code = one(monkeypatch, operator, *args, *([empty(1, 4095)] if residual else []))
    assert launch.arguments["STAGES"] == linear_w8a16.GEMV_STAGES_DEEP
    assert code.stack == 0, "spills"


@pytest.mark.parametrize(("stride", "read"), [(2**31 // 128 - 1, 2**31 // 128 - 1), (2**31 // 128, 64)])
def test_rows_that_lie_far_apart_are_copied(monkeypatch: pytest.MonkeyPatch, stride: int, read: int) -> None:
    """Tiles count elements by 32 bits: the last token of 64 long prompts is further away than that."""
    x = torch.empty_strided((64, 64), (stride, 1), dtype=BF16, device="meta")
    args = (x, empty(64, 64, dtype=I8), empty(64, dtype=F32), None, x)
    (made,) = launches(monkeypatch, linear_w8a16.linear_w8a16_add_tiles, *args)
    assert (made.arguments["x_stride"], made.arguments["residual_stride"]) == (read, read)


def test_what_the_sum_in_the_linear_takes() -> None:
    x, weight, scale = empty(5, 64), empty(32, 64, dtype=I8), empty(32, dtype=F32)
    for shape, composed in [((5, 32), False), ((32,), True), ((5, 1), True)]:
        chosen = linear_w8a16.linear_w8a16_add.choose("triton", (x, weight, scale, None, empty(*shape)))
        assert chosen.composed is composed
    assert linear_w8a16.linear_w8a16_add.choose("triton", (x, weight[:0], scale[:0], None, empty(5, 0))).composed


# ---------------------------------------------------------------------------------------------------------------------
# Row kernels


def global_reads(code: Compiled) -> int:
    return len(re.findall(r"ld\.global", code.ptx))


@pytest.mark.parametrize("k", [123, 4096, 14336, 53248])
def test_row_kernels(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    from lowering.triton import act, norm, quantize

    x, columns = empty(64, k), empty(32, dtype=torch.int64)
    for operator, args in [
        (quantize.split_quantize_rows, (x, columns, False)),
        (norm.add_norm_quantize_rows, (x, x, empty(k), empty(k), 1e-5, 0.0, "layer", columns, False)),
        (act.act_mul_quantize_rows, (x, x, "silu", columns, True)),
    ]:
        _, code = one(monkeypatch, operator, *args)
        assert code.stack == 0, f"{operator.__name__} spills"


def test_a_row_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes over a row that fits share their loads: 4096 bf16 elements on 256 threads are two 16-byte loads."""
    from lowering.triton import norm, quantize

    x = empty(64, 4096)
    _, code = one(monkeypatch, quantize.quantize_rows, x, True)
    assert global_reads(code) == 2
    assert "ld.global.v4" in code.ptx
    _, code = one(
        monkeypatch, norm.add_norm_quantize_rows, x, x, empty(4096), None, 1e-5, 0.0, "rms_round_first", None, True
    )
    assert global_reads(code) == 6  # x, residual and gamma


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_column_absmax(monkeypatch: pytest.MonkeyPatch, threshold: float) -> None:
    from lowering.triton import quantize

    passes = launches(monkeypatch, quantize.split_quantize_rows_dynamic, empty(64, 14336), 64, threshold, True)
    assert [launch.kernel.__name__ for launch in passes] == [
        "_column_absmax_kernel", "_choose_columns_kernel", "_quantize_rows_kernel"
    ]  # fmt: skip
    codes = [compile_for_sm90(launch) for launch in passes]
    assert all(code.stack == 0 for code in codes)
    assert re.search(r"(red|atom)\.global\S*\.max\.s32", codes[0].ptx)
    # Only under a threshold may there be few enough to list.
    assert bool(re.search(r"(red|atom)\.global\S*\.add\.", codes[1].ptx)) == (threshold > 0.0)


def test_dynamic_prologues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes over the rows, the choice of columns between them; nothing spills."""
    from lowering.triton import act, norm

    x, wide = empty(512, 4096), empty(512, 14336)
    for operator, args, first in [
        (norm.add_norm_quantize_rows_dynamic, (x, x, empty(4096), None, 1e-5, 0.0, "rms", 64, 0.0, False), "norm"),
        (act.act_mul_quantize_rows_dynamic, (wide, wide, "silu", 64, 6.0, True), "product"),
    ]:
        passes = launches(monkeypatch, operator, *args)
        assert passes[0].kernel.__name__ == f"_{first}_absmax_kernel"
        assert len(passes) == 3
        for launch in (passes[0], passes[2]):
            assert compile_for_sm90(launch).stack == 0, f"{launch.kernel.__name__} spills"


# ---------------------------------------------------------------------------------------------------------------------
# Codes in two planes


@pytest.mark.parametrize(("m", "n"), shapes(choice.W8A8_TILES))
def test_hilo(monkeypatch: pytest.MonkeyPatch, m: int, n: int) -> None:
    args = w8a8_args(m, n, 4096)
    operands = (*args[:3], empty(m, 4096, dtype=I8), empty(m, 1, dtype=torch.int32), *args[3:7], args[-1])
    _, code = one(monkeypatch, hilo.linear_w8a8_hilo_tiles, *operands)
    assert code.stack == 0, "spills"
    assert code.shared <= 227 * 1024


@pytest.mark.parametrize("k", [4096, 14336])
@pytest.mark.parametrize("symmetric", [True, False])
def test_hilo_rows(monkeypatch: pytest.MonkeyPatch, k: int, symmetric: bool) -> None:
    x, gamma = empty(16, k), empty(k)
    for wrapper, args in [
        (hilo.quantize_hilo_rows, (x, 6.0, symmetric)),
        (hilo.add_norm_quantize_hilo_rows, (x, x, gamma, None, 1e-5, 0.0, "rms_round_first", 6.0, symmetric)),
        (hilo.act_mul_quantize_hilo_rows, (x, x, "silu", 6.0, symmetric)),
    ]:
        launch, code = one(monkeypatch, wrapper, *args)
        assert code.stack == 0, f"{wrapper.__name__} spills"
        # The pass over the gate product is the longest: two programs share a multiprocessor.
        shared = 2 if wrapper is hilo.quantize_hilo_rows else 1
        assert shared * 32 * launch.options["num_warps"] * code.registers <= 65536
        assert re.search(r"ld\.global\.v4\.b32", code.ptx), "16-byte loads"


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "tokens", "keys", "channels"),
    [(1, 32, 8, 1, 1, 128), (64, 32, 8, 1, 4096, 128), (1, 32, 8, 16, 4096, 128), (4, 16, 16, 64, 512, 256)],
)
def test_few_queries(
    monkeypatch: pytest.MonkeyPatch, batch: int, heads: int, groups: int, tokens: int, keys: int, channels: int,
    masked: bool,
) -> None:  # fmt: skip
    from lowering.triton import attention

    query = empty(batch, heads, tokens, channels)
    cache = empty(batch, groups, keys, channels)
    mask = empty(batch, 1, 1, keys, dtype=torch.bool) if masked else None
    args = (query, cache, cache, mask, False, 0.1)
    found = [compile_for_sm90(launch) for launch in launches(monkeypatch, attention.attention_few_queries, *args)]
    assert len(found) == (2 if keys > 1 and batch < 64 else 1), "parts of the keys are joined by a second kernel"
    assert all(code.stack == 0 for code in found), "spills"
    assert all(code.shared <= 227 * 1024 for code in found)
    assert re.search(r"(wgmma\.mma_async\.sync\.aligned\.m64n\d+k16|mma\.sync\.aligned\.m16n8k16).*bf16", found[0].ptx)
    assert "cp.async" in found[0].ptx or keys == 1
