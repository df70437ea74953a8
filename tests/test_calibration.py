"""Calibration: what it finds where outliers were planted, what that buys, and data it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import call, relative_error, run_pass
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import int8pass
from int8pass import folds
from int8pass.calibration import Calibration, observe
from int8pass.errors import CalibrationError, CalibrationWarning, OptionError
from int8pass.recipe import CALIBRATED, Recipe

WIDTH, HOT = 64, (3, 17, 40, 41)


class Model(nn.Module):
    """Two sites: one behind a norm with hot channels, one behind an activation that has them too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.norm.weight[list(HOT)] *= 30
            self.up.weight[:, list(HOT)] /= 30
            self.up.weight[list(HOT)] *= 30
            self.down.weight[:, list(HOT)] /= 30

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.relu(self.up(self.norm(x))))


def model() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().eval()


def batch(seed: int, tokens: int = 32) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


BATCHES = [batch(seed) for seed in range(3)]


def test_columns_are_found_where_they_were_planted() -> None:
    planted, done = model(), list[tuple[str, int, int]]()
    before = {name: p.detach().clone() for name, p in planted.named_parameters()}
    start = Recipe.preset("outlier-columns").override(smoothing="none")
    recipe = int8pass.calibrate(planted, BATCHES, start, columns=len(HOT), progress=lambda *step: done.append(step))
    assert [step for step in done if step[0] == "calibrate"] == [("calibrate", i, 3) for i in range(4)]
    assert all(i <= total for _, i, total in done)
    assert list(recipe.sites) == ["up", "down"]
    assert recipe.scheme.outliers == "static"
    assert {name: site.columns for name, site in recipe.sites.items()} == {"up": HOT, "down": HOT}
    assert recipe.versions["torch"] == torch.__version__
    assert all(torch.equal(p, before[name]) for name, p in planted.named_parameters())


def test_planted_channels_are_smoothed_most() -> None:
    recipe = int8pass.calibrate(model(), BATCHES, columns=len(HOT))
    assert recipe.scheme.smoothing == "calibrated"
    for site in recipe.sites.values():
        exponents = torch.tensor(site.exponents)
        assert len(exponents) == WIDTH
        cold = [i for i in range(WIDTH) if i not in HOT]
        assert exponents[list(HOT)].min() > exponents[cold].max()
        assert site.alpha == 0.5


def test_batches_of_every_form_say_the_same() -> None:
    recipes = [
        int8pass.calibrate(model(), form)
        for form in (BATCHES, [(b,) for b in BATCHES], [{"x": b} for b in BATCHES], iter(BATCHES))
    ]
    assert recipes[0] == recipes[1] == recipes[2] == recipes[3]


def test_columns_default_to_a_share_of_the_channels_or_the_capacity() -> None:
    found = int8pass.calibrate(model(), BATCHES[:1]).sites.values()
    assert all(len(s.columns) == min(16, WIDTH) for s in found), "a twelfth, and never less than 16"
    everything = int8pass.calibrate(model(), BATCHES[:1], columns=10 * WIDTH).sites["up"]
    assert len(everything.columns) == WIDTH
    recipe = Recipe(scheme=int8pass.Scheme(capacity=5, outliers="static"))
    assert all(len(s.columns) == 5 for s in int8pass.calibrate(model(), BATCHES[:1], recipe).sites.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_folding_calibrated_exponents_preserves_the_function(dtype: torch.dtype) -> None:
    """γ' · (W · s) is γ · W within fp32 rounding in every dtype of γ: s moves to where γ / s is exact."""
    planted = model()
    recipe = int8pass.calibrate(planted, BATCHES)
    wished = torch.exp2(torch.tensor(recipe.sites["up"].exponents))
    assert (wished != 1).any()
    gamma, weight = planted.norm.weight.detach().to(dtype), planted.up.weight.detach()
    s = folds.representable(gamma, wished)
    torch.testing.assert_close(s, wished, rtol=2 * torch.finfo(dtype).eps, atol=0)
    folded = folds.divide(gamma, s)
    assert folded.dtype == dtype
    torch.testing.assert_close(folded.float() * (weight * s), gamma.float() * weight, rtol=1e-6, atol=0)
    inverse = folds.inverse(folds.representable_inverse(wished, dtype), dtype)
    torch.testing.assert_close(inverse.float() * folds.representable_inverse(wished, dtype), torch.ones_like(wished))


class Gelu(Model):
    """The same with an activation that no scale passes through."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def test_what_cannot_be_folded_is_multiplied() -> None:
    for planted, reasons in ((model(), {}), (Gelu().eval(), {"down": "no scale passes through gelu"})):
        recipe = int8pass.calibrate(planted, BATCHES)
        smoothing = run_pass(planted, batch(9), recipe, stage="portable").facts[0].smoothing
        assert set(smoothing.vectors) == {"up", "down"}
        assert smoothing.reasons == reasons


def test_quality_order_on_planted_outliers() -> None:
    planted, x = model(), batch(9)
    expected = call(planted, x) - x  # of the branch: the residual would hide it
    recipe = int8pass.calibrate(planted, BATCHES, columns=len(HOT))
    error = {
        name: relative_error(run_pass(planted, x, each).output - x, expected)
        for name, each in {"calibrated": recipe, "w8a8": "w8a8", "w8a16": "w8a16"}.items()
    }
    assert error["calibrated"] < 0.5 * error["w8a8"]
    columns_only = int8pass.calibrate(
        planted, BATCHES, Recipe(int8pass.Scheme(outliers="static", smoothing="none")), columns=len(HOT)
    )
    error["columns only"] = relative_error(run_pass(planted, x, columns_only).output - x, expected)
    assert error["columns only"] < 0.5 * error["w8a8"]


def test_a_number_of_columns_is_no_budget() -> None:
    """The preset "auto" with a number of columns smooths every site and gives it as many."""
    recipe = int8pass.calibrate(model(), BATCHES, "auto", columns=3)
    assert {len(site.columns) for site in recipe.sites.values()} == {3}
    assert not any(site.keep for site in recipe.sites.values())


def test_the_float_columns_hold_original_weights() -> None:
    recipe = int8pass.calibrate(model(), BATCHES, columns=len(HOT))
    result = run_pass(model(), batch(9), recipe, stage="portable")
    assert result.ops["outlier_split"] == 2
    assert result.ops["outlier_split_dynamic"] == 0
    assert result.ops["linear"] == 4, "an int8 and a float one per linear"


@pytest.mark.parametrize("preset", ["outlier-columns", "smoothquant-o3"])
def test_a_saved_recipe_compiles(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    planted, x = model(), batch(9, tokens=9)
    int8pass.calibrate(planted, BATCHES, preset).save(path)
    expected, harness = call(planted, x), run_pass(planted, x, str(path)).output
    torch._dynamo.reset()
    compiled = torch.compile(planted, backend="int8", fullgraph=True, options={"recipe": str(path)})
    with torch.no_grad():
        found = compiled(x)
    assert relative_error(found, expected) < 0.02
    # Not bit for bit: sums that differ in their last bit turn a code here or there.
    assert relative_error(found, harness) < 1e-3


def with_value(value: float) -> Tensor:
    x = batch(1)
    x[1, 2, 3] = value
    return x


BAD_BATCHES: dict[str, tuple[list[Any], str]] = {
    "none": ([], "no calibration batch was given"),
    "NaN": ([BATCHES[0], with_value(torch.nan)], "batch 1: the input of up holds NaN or Inf"),
    "Inf": ([with_value(torch.inf)], "batch 0: the input of up holds NaN or Inf"),
    "shape": ([BATCHES[0], torch.randn(2, 5, WIDTH + 1)], "batch 1 of 'calibrate' does not run through the model"),
    "argument": ([{"y": BATCHES[0]}], "batch 0 of 'calibrate' does not run through the model"),
    "no token": ([BATCHES[0][:, :0]], "no token reached up, down"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_data_that_is_refused(name: str) -> None:
    batches, message = BAD_BATCHES[name]
    with pytest.raises(CalibrationError, match=message):
        int8pass.calibrate(model(), batches)


def test_a_model_without_sites_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no site was found"):
        int8pass.calibrate(nn.LayerNorm(WIDTH), BATCHES)


def test_wrong_presets_are_refused_before_the_model_runs() -> None:
    with pytest.raises(OptionError, match="unknown preset"):
        int8pass.calibrate(model(), BATCHES, "int4")


class Wider(Model):
    """The same names, other sizes."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.norm, self.up, self.down = nn.LayerNorm(96), nn.Linear(96, 96), nn.Linear(96, 96)


class Renamed(nn.Module):
    """The same sizes, other names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.relu(self.fc1(self.norm(x))))


@pytest.mark.parametrize(("other", "width"), [(Wider, 96), (Renamed, WIDTH)])
def test_a_recipe_of_another_model_is_refused(other: type[nn.Module], width: int) -> None:
    recipe = int8pass.calibrate(model(), BATCHES)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="made for another model"):
        torch.compile(other(), backend="int8", options={"recipe": recipe})(torch.randn(2, 5, width))


@pytest.mark.parametrize("preset", CALIBRATED)
def test_presets_that_need_calibration_say_so_and_work_with_it(preset: str, tmp_path: Path) -> None:
    planted, x, path = model(), batch(9), tmp_path / "recipe.json"
    with pytest.raises(BackendCompilerFailed, match=r"needs calibration.*up \((range|smoothing vector)\), down"):
        run_pass(planted, x, preset)
    expected = call(planted, x) - x
    recipe = int8pass.calibrate(planted, BATCHES, preset)
    recipe.save(path)
    assert Recipe.load(path) == recipe
    assert all(site.error is not None and site.tokens > 0 for site in recipe.sites.values())
    found = relative_error(run_pass(planted, x, path).output - x, expected)
    plain = relative_error(run_pass(planted, x, "w8a8").output - x, expected)
    assert found < 0.5 * plain
    assert int8pass.inspect(planted, x, recipe=recipe).counts["taken"] == 2


def test_static_ranges_are_those_of_the_data() -> None:
    planted = model()
    start = Recipe.preset("smoothquant-o3").override(smoothing="none", alpha=0.5, symmetric=False, clipping="minmax")
    recipe = int8pass.calibrate(planted, BATCHES, start)
    x = torch.cat(BATCHES)
    with torch.no_grad():
        normed = planted.norm(x)
    limits = recipe.sites["up"].limits
    assert limits is not None
    assert limits == pytest.approx((float(normed.min()), float(normed.max())))
    wide, narrow = 3 * x, x
    ops = run_pass(planted, narrow, recipe, stage="portable").ops
    assert ops["quantize_per_tensor"] == 2
    assert ops["quantize_per_token"] == 0
    del wide


def test_a_dynamic_range_stays_within_what_calibration_found() -> None:
    planted, x = model(), batch(9)
    start = Recipe.preset("smoothquant-o2")
    recipe = int8pass.calibrate(planted, [batch(seed) for seed in range(12)], start)
    ran = run_pass(planted, x, recipe, stage="portable")
    assert ran.ops["quantize_per_tensor"] == ran.ops["clamp"] == 2
    free = dataclasses.replace(recipe, scheme=dataclasses.replace(recipe.scheme, clipping="minmax"))
    assert run_pass(planted, x, free, stage="portable").ops["clamp"] == 0
    x[0, 0, 5] = 1e4  # the norm makes 8 of it, twice what calibration saw: without a cap, the range of all other tokens
    expected = (call(planted, x) - x)[1:]
    capped, other = ((run_pass(planted, x, r).output - x)[1:] for r in (recipe, free))
    assert relative_error(capped, expected) < relative_error(other, expected)


def test_hessians_are_collected_within_their_memory() -> None:
    from int8pass.calibration.observe import within_bytes

    assert within_bytes({"a": 3, "b": 3, "c": 5, "d": 9, "e": 1}, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert within_bytes({}, 8) == []


@pytest.mark.parametrize("clipping", ["minmax", "moving_average", "percentile", "mse", "entropy", "output"])
def test_every_clipping_gives_ranges(clipping: str) -> None:
    planted, x = model(), batch(9)
    start = Recipe.preset("smoothquant-o3").override(clipping=clipping, alpha=0.5)
    recipe = int8pass.calibrate(planted, BATCHES, start)
    widest = int8pass.calibrate(planted, BATCHES, start.override(clipping="minmax"))
    for name, site in recipe.sites.items():
        assert site.limits is not None
        assert widest.sites[name].limits is not None
        most = 2.0 if clipping == "output" else 1.0
        low, high = widest.sites[name].limits  # type: ignore[misc]
        assert most * low <= site.limits[0] < site.limits[1] <= most * high
    assert relative_error(run_pass(planted, x, recipe).output, call(planted, x)) < 0.05


class Embedding(nn.Module):
    """A site whose input depends on the token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.table.weight[9] = 1000.0  # the padding token

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.up(self.table(ids))


def test_padding_is_ignored() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embedding = Embedding().eval()
    ids = torch.arange(9).repeat(2, 2)
    start = Recipe.preset("smoothquant-o3").override(clipping="minmax", alpha=0.5)
    plain = int8pass.calibrate(embedding, [{"ids": ids, "attention_mask": torch.ones_like(ids)}], start)
    padded, mask = torch.cat([ids, torch.full((2, 5), 9)], 1), torch.cat([torch.ones(2, 18), torch.zeros(2, 5)], 1)
    assert int8pass.calibrate(embedding, [{"ids": padded, "attention_mask": mask}], start) == plain
    unmasked = int8pass.calibrate(embedding, [{"ids": padded, "attention_mask": torch.ones_like(mask)}], start)
    assert unmasked.sites["up"].limits != plain.sites["up"].limits


def test_batches_of_several_lengths() -> None:
    x = torch.cat(BATCHES, 1)
    pieces = [piece.contiguous() for piece in (x[:, :7], x[:, 7:40], x[:, 40:])]
    start = Recipe.preset("smoothquant-o3").override(clipping="minmax", alpha=0.5)
    whole, cut = (int8pass.calibrate(model(), batches, start) for batches in ([x], pieces))
    for name, site in whole.sites.items():
        assert site.limits == pytest.approx(cut.sites[name].limits)
        assert site.exponents == cut.sites[name].exponents
        assert site.tokens == cut.sites[name].tokens == 2 * x.shape[1]


def test_one_batch_cannot_both_set_ranges_and_choose() -> None:
    with pytest.raises(CalibrationError, match="at least two batches"):
        int8pass.calibrate(model(), BATCHES[:1], "smoothquant-o1")


class Routed(nn.Module):
    """An expert that some inputs never reach."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.expert = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return self.shared(x), self.expert(x[chosen])


def test_sites_that_no_token_reaches_are_reported() -> None:
    x = torch.randn(8, WIDTH)
    with pytest.warns(CalibrationWarning, match="no calibration token reached expert"):
        recipe = int8pass.calibrate(Routed(), [(x, torch.empty(0, dtype=torch.int64))] * 2, "smoothquant-o3")
    assert recipe.sites["expert"].scheme == Recipe().scheme
    assert recipe.sites["expert"].tokens == 0
    assert recipe.sites["shared"].limits is not None


def test_gptq_codes_travel_with_the_recipe(tmp_path: Path) -> None:
    planted, x, path = model(), batch(9), tmp_path / "recipe.json"
    start = Recipe.preset("smoothquant-o1").override(alpha=0.5, activations="none")
    nearest = int8pass.calibrate(planted, BATCHES, start)
    rounded = int8pass.calibrate(planted, BATCHES, start.override(rounding="gptq"))
    assert sorted(rounded.tensors) == ["down", "up"]
    rounded.save(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.json", "recipe.json.pt"]
    expected = call(planted, x) - x
    errors = [relative_error(run_pass(planted, x, r).output - x, expected) for r in (nearest, Recipe.load(path))]
    assert errors[1] < errors[0]
    (tmp_path / "recipe.json.pt").write_bytes(b"PK")
    with pytest.raises(int8pass.errors.RecipeError, match="holds the rounded codes"):
        Recipe.load(path)


def test_hessians_are_summed_once_for_all_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    counted = observe.hessians
    monkeypatch.setattr(observe, "hessians", lambda *a: sums.append(sorted(a[2])) or counted(*a))
    planted = model()
    seen = Calibration(planted, BATCHES, hold_out=False)
    start = Recipe.preset("smoothquant-o1").override(alpha=0.5, rounding="gptq")
    first = seen.recipe(start)
    again = seen.recipe(start.override(alpha=0.7))
    assert sums == [["down", "up"]]
    alone = int8pass.calibrate(planted, BATCHES, start.override(alpha=0.7))
    assert len(first.tensors) == 2
    assert all(bool((again.tensors[n] == alone.tensors[n]).all()) for n in ("up", "down"))
