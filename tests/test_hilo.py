"""Columns found in every call become blocks of outliers: the rewrite, its numbers, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from harness import relative_error, run_pass
from hypothesis import given, settings
from hypothesis import strategies as st
from test_real_model import FirstLayers, smollm2
from torch import Tensor, nn

import int8pass
from int8pass import hilo
from int8pass.recipe import PRESETS, Recipe, SiteSettings
from lowering import numerics
from lowering.ops import hilo as ops

DYNAMIC = ("split_quantize_dynamic", "norm_quantize_dynamic", "add_norm_quantize_dynamic", "act_mul_quantize_dynamic",
           "gated_linear_quantize_dynamic")  # fmt: skip


class Block(nn.Module):
    """Every kind of site: a plain input, a norm, a norm after a sum, a gate product with and without its linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.RMSNorm(64), nn.RMSNorm(64)
        self.q, self.k = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.o = nn.Linear(64, 64)
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.other = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        x = x + self.o(torch.sin(self.q(h)) * 4 * self.k(h))
        h = self.norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return x + self.other(F.silu(x.repeat(1, 1, 2)[..., :96]) * x.repeat(1, 1, 2)[..., 32:])


def block() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 64)
    x[..., 5] *= 40
    x[0, 3, 20] = 90.0
    return Block().requires_grad_(False), x


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU, with the references."""
    monkeypatch.setattr(hilo, "DEVICES", frozenset({"cuda", "cpu"}))
    yield
    torch._dynamo.reset()


def names(model: nn.Module, x: Tensor) -> list[str]:
    return [site.name for site in run_pass(model, x, "w8a8").facts[0].matches.sites]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("preset", ["llm.int8", "default", Recipe.preset("llm.int8").override(threshold=6)])
def test_every_site_is_rewritten(preset: str | Recipe) -> None:
    model, x = block()
    found = run_pass(model, x, preset).ops
    assert found["quantize_hilo"] == 1
    assert found["norm_quantize_hilo"] == 1
    assert found["add_norm_quantize_hilo"] == 1
    assert found["gated_linear_quantize_hilo"] == 1
    assert found["act_mul_quantize_hilo"] == 1
    assert found["linear_w8a8_hilo"] == 5
    assert not any(found[name] for name in (*DYNAMIC, "linear_w8a8"))


@pytest.mark.usefixtures("everywhere")
def test_the_largest_columns_are_blocks_as_of_llm_int8() -> None:
    model, x = block()
    largest, above = run_pass(model, x, "default"), run_pass(model, x, "llm.int8")
    assert largest.ops == above.ops
    assert largest.ops["linear_w8a8_hilo"] == 5
    assert torch.equal(largest.output, above.output)


@pytest.mark.usefixtures("everywhere")
def test_the_inspection_says_so() -> None:
    model, x = block()
    report = int8pass.inspect(model, x, recipe="default")
    assert {(site.scheme, site.columns) for site in report.sites} == {("w8a8 affine, outlier blocks", 0)}


def test_on_a_cpu_columns_stay() -> None:
    found = run_pass(*block(), "llm.int8").ops
    assert sum(found[name] for name in DYNAMIC) == 5
    assert not any(name.endswith("hilo") for name in found)


@pytest.mark.usefixtures("everywhere")
def test_a_block_keeps_more_than_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = block()
    expected = model(x)
    blocks = relative_error(run_pass(model, x, "llm.int8").output, expected)
    monkeypatch.setattr(hilo, "DEVICES", frozenset())
    columns = relative_error(run_pass(model, x, "llm.int8").output, expected)
    plain = relative_error(run_pass(model, x, "w8a8-asymmetric").output, expected)
    assert blocks < columns < plain


@pytest.mark.usefixtures("everywhere")
def test_no_capacity_is_exceeded() -> None:
    """Sixty columns above the threshold: places for eight are too few, blocks need none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    x = torch.randn(7, 64)
    x[:, :60] *= 50
    torch._dynamo.reset()
    options = {"recipe": "llm.int8", "capacity": 8}
    compiled = torch.compile(model, backend="int8", fullgraph=True, options=options)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 0.006
    assert int8pass.outlier_overflow(model) == 0
    assert int8pass.packed_bytes(model) > 0, "the model ran as it was"


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asymmetric"])
def test_without_columns_nothing_changes(scheme: str) -> None:
    assert not any(name.endswith("hilo") for name in run_pass(*block(), scheme).ops)


@pytest.mark.usefixtures("everywhere")
def test_a_gated_linear_goes_with_its_source_or_not_at_all() -> None:
    """Codes of one kind in, of another kind out: there is no such kernel, so both sites keep columns or have none."""
    model, x = block()
    plain = dataclasses.replace(PRESETS["w8a8"], symmetric=False)
    gate = next(name for name in names(model, x) if "gate" in name)
    down = next(name for name in names(model, x) if "down" in name)
    for other, kept in ((gate, "gated_linear_quantize_dynamic"), (down, "add_norm_quantize_dynamic")):
        recipe = Recipe(PRESETS["llm.int8"], sites={other: SiteSettings(scheme=plain)})
        found = run_pass(model, x, recipe).ops
        assert found[kept] == 1
        assert found["gated_linear_quantize_hilo"] == 0
        assert found["norm_quantize_hilo"] == 1


@pytest.mark.usefixtures("everywhere")
def test_applied_twice_changes_nothing() -> None:
    result = run_pass(*block(), "llm.int8")
    assert hilo.columns_to_blocks(result.programs[0], hilo.DEVICES) == 0


# -- the codes


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5000), st.floats(0.5, 20), st.sampled_from([0.0, 7.0, 300.0, 1e5]), st.booleans(), st.integers(0, 99)
)
def test_codes_err_by_half_a_step_and_their_sum_fits(
    k: int, threshold: float, loud: float, symmetric: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, k, generator=generator)
    x[0, seed % k] = loud
    x[1] = loud
    low, scale, zero, high, blocks = ops.quantize_hilo.reference(x, threshold, symmetric)
    codes = low.long() + 256 * high.long()
    assert torch.all(((codes - zero) * scale - x).abs() <= scale * 0.5001 + 1e-6 * x.abs())
    assert int(codes.abs().sum(-1).max()) * 127 < 2**31
    assert not high[~numerics.in_blocks(blocks, k)].any()
    width = numerics.block_width(k)
    assert -(-k // width) <= 32
    for row in range(3):
        bits = {b for b in range(32) if (int(blocks[row]) >> b) & 1}
        reach = x[row].abs().split(width)
        expected = numerics.outlier_blocks(torch.stack([part.max() for part in reach]), threshold)
        assert bits == {int(b) for b in expected.nonzero()}
        assert len(bits) <= numerics.HILO_BLOCKS


def test_a_row_with_large_values_everywhere_has_plain_codes() -> None:
    x = torch.randn(2, 4096)
    x[0, 64 : 64 + 128 * 8 : 128] = 50.0  # eight blocks
    x[1, 64 : 64 + 128 * 9 : 128] = 50.0
    low, scale, zero, high, blocks = ops.quantize_hilo.reference(x, 6.0, False)
    assert int(blocks[0]) == 0xFF
    assert scale[0] < 10 / 255
    codes, own_scale, own_zero = numerics.quantize_affine(x[1])
    assert torch.equal(low[1], codes)
    assert torch.equal(scale[1], own_scale)
    assert torch.equal(zero[1], own_zero)
    assert not high[1].any()
    assert not blocks[1].any()


def test_blocks_that_stand_apart_have_outliers_below_the_threshold_too() -> None:
    reach = torch.tensor(
        [
            [1.0, 1.2, 0.9, 4.0, 1.1, 3.9, 1.0, 0.8, 1.0, 1.0],  # two, far above the others
            [1.0, 1.2, 0.9, 1.9, 1.1, 1.5, 1.0, 0.8, 1.0, 1.0],  # no gap
            [7.0, 7.2, 7.9, 8.0, 7.1, 8.9, 7.0, 9.8, 9.0, 40.0],  # all beyond the threshold, one apart
            [4.0, 4.2, 4.9, 4.0, 4.1, 4.9, 4.0, 4.8, 5.0, 1.0],  # nine apart from one: large values, no outliers
            [0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # nothing to be apart from
            [1.0, 1.2, 0.9, 7.0, 1.1, 3.9, 1.0, 0.8, 1.0, 1.0],  # one beyond the threshold, another apart
        ]
    )
    assert [row.nonzero().flatten().tolist() for row in numerics.outlier_blocks(reach, 6.0)] == [
        [3, 5], [], [9], [], [], [3, 5],
    ]  # fmt: skip


def test_without_outliers_codes_are_those_of_int8() -> None:
    x = torch.randn(5, 300).clamp(-2, 2)
    low, scale, zero, high, _ = ops.quantize_hilo.reference(x, 6.0, False)
    codes, own_scale, own_zero = numerics.quantize_affine(x)
    assert torch.equal(low, codes)
    assert torch.equal(scale, own_scale)
    assert torch.equal(zero, own_zero)
    assert not high.any()


def test_nan_goes_through_and_infinity_is_no_code() -> None:
    x = torch.randn(3, 32)
    x[0, 3], x[1, 4] = float("nan"), float("inf")
    _, scale, _, _, _ = ops.quantize_hilo.reference(x, 6.0, False)
    assert scale[0].isnan()
    assert scale[1].isinf()
    assert scale[2].isfinite()


# -- a trained model


@pytest.mark.slow
@pytest.mark.usefixtures("everywhere")
def test_on_trained_weights_blocks_keep_more_than_columns(
    smollm2: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = smollm2
    part, ids = FirstLayers(model, 6), ids[:, :192]
    expected = part(ids)
    blocks = run_pass(part, ids, "llm.int8")
    assert blocks.ops["linear_w8a8_hilo"] + blocks.ops["gated_linear_quantize_hilo"] == 6 * 4
    monkeypatch.setattr(hilo, "DEVICES", frozenset())
    columns = run_pass(part, ids, "llm.int8")
    plain = run_pass(part, ids, "w8a8-asymmetric")
    errors = [relative_error(r.output, expected) for r in (blocks, columns, plain)]
    assert errors[0] < 0.8 * errors[1] < errors[2]


__all__ = ["smollm2"]
