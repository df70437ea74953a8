"""Inspecting calibrated recipes: static ranges, searched α, folds into linears, columns, groups and rounded codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import run_pass
from test_inspect import Model
from torch import Tensor, nn

pytest.importorskip("transformers")
import tiny_llama

import int8pass
from int8pass.inspect.numbers import Noise
from int8pass.inspect.variants import comparable, key_of
from int8pass.recipe import Recipe, Scheme, SiteSettings
from lowering import numerics

O, GATE, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"


def batches() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 256, (1, 32), generator=generator), "use_cache": False} for _ in range(3)]


def planted() -> nn.Module:
    """Channels forty times larger than the others behind a norm, and in the product that `down_proj` reads."""
    made = tiny_llama.model(1)
    layer = made.model.layers[0]
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter *= 5
        layer.post_attention_layernorm.weight[[3, 17]] *= 40
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[:, [3, 17]] /= 40
        layer.mlp.up_proj.weight[[5, 50]] *= 40
        layer.mlp.down_proj.weight[:, [5, 50]] /= 40
    return made


@dataclasses.dataclass
class Case:
    model: nn.Module
    recipe: Recipe
    report: int8pass.Report

    def site(self, name: str) -> Any:
        return next(site for site in self.report.sites if site.name == name)


@pytest.fixture(scope="module", params=["smoothquant-o1", "smoothquant-o3"])
def case(request: pytest.FixtureRequest) -> Case:
    torch._dynamo.reset()
    model = planted()
    recipe = int8pass.calibrate(model, batches(), request.param)
    return Case(model, recipe, int8pass.inspect(model, batches()[0], recipe=recipe, data=batches()[:2], profile=False))


def test_names_and_alphas_are_those_of_the_calibration(case: Case) -> None:
    ranges = ", static range, gptq" if case.recipe.scheme.activations == "static" else ""
    assert f"w8a8 affine{ranges}, 4 sites calibrated)" in case.report.recipe
    for site in case.report.sites:
        assert site.scheme == f"w8a8 affine{ranges}"
        settings = case.recipe.sites[site.name]
        smoothed = any(settings.exponents)
        assert site.smoothing == ("folded" if smoothed else "")
        assert site.alpha == (settings.alpha if smoothed else None)
        assert (site.smoothed_channels > 0) == smoothed
    assert "recipe made with int8pass" in case.report.settings


@torch.no_grad()
def test_a_linear_that_carries_a_fold_is_compared_as_if_it_did_not(case: Case) -> None:
    """`up_proj`, in the site of `gate_proj`, has its rows divided for `down_proj`: per-row scales make that free."""
    assert case.site(DOWN).smoothing == "folded"
    mlp, norm = case.model.model.layers[0].mlp, case.model.model.layers[0].post_attention_layernorm
    settings, expected, local = case.recipe.sites[GATE], Noise(), Noise()
    s = torch.exp2(torch.tensor(settings.exponents))
    for batch in batches()[:2]:
        seen: list[Tensor] = []
        with norm.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output)):
            case.model(**batch)
        x = seen[0] / s
        if settings.limits:
            low, high = map(torch.tensor, settings.limits)
            codes, scale, zero = numerics.quantize_to_range(x, low, high, symmetric=False)
        else:
            codes, scale, zero = numerics.quantize_affine(x)
        for linear in (mlp.gate_proj, mlp.up_proj):
            packed, step = numerics.quantize_weight(linear.weight * s)
            exact = F.linear(seen[0], linear.weight)
            local.add(exact, F.linear((codes.float() - zero) * scale, packed.float() * step[:, None]))
            expected.add(linear.weight * s, packed.float() * step[:, None])
    assert case.site(GATE).errors.final == pytest.approx(local.sqnr, abs=0.1)
    assert 30 < case.site(GATE).errors.weight < 60
    assert case.site(GATE).errors.cumulative > 15


@torch.no_grad()
def test_the_output_is_that_of_the_quantized_model(case: Case) -> None:
    output = Noise()
    for batch in batches()[:2]:
        exact = case.model(**batch).logits
        output.add(exact, run_pass(case.model, batch, case.recipe, stage="portable").output.logits)
    assert case.report.output_sqnr == pytest.approx(output.sqnr, abs=0.1)
    assert min(site.errors.alone for site in case.report.sites) > case.report.output_sqnr - 1
    assert case.site(GATE).errors.final > case.site(GATE).errors.naive + 3, "the planted outliers are smoothed away"


def test_histograms_show_the_range_in_force(case: Case) -> None:
    for site in case.report.sites:
        assert sum(site.histogram.codes) == 64 * site.shape[1]
        limits = case.recipe.sites[site.name].limits
        assert (limits is not None) == (case.recipe.scheme.activations == "static")
        if limits:
            step = (max(limits[1], 0) - min(limits[0], 0)) / 255
            assert site.histogram.clip == pytest.approx((min(limits[0], 0), max(limits[1], 0)), abs=step)


def test_schemes_that_the_calibration_is_enough_for_are_compared(case: Case) -> None:
    names = [point.name for point in case.report.schemes]
    assert names[0] == "this recipe"
    assert "smoothquant-o2, with these vectors" in names
    assert "w8a8" in names
    static = case.recipe.scheme.activations == "static"
    assert ("smoothquant-o1, with these vectors" in names) == static
    assert "outlier-columns, with these vectors" not in names, "no columns were chosen"
    assert "smoothquant-o3, with these vectors" not in names, "o1 has no ranges, o3 is this recipe"


def test_the_text_shows_it(case: Case) -> None:
    text = str(case.report)
    alphas = {site.alpha for site in case.report.sites if site.alpha is not None}
    assert all(f"folded α={alpha:g}" in text for alpha in alphas)
    assert case.report.sites[0].scheme in text


SCHEMES = {
    "columns": Scheme(outliers="static", smoothing="calibrated", capacity=8),
    "columns of a static range": Scheme(
        outliers="static", smoothing="calibrated", capacity=8, activations="static", rounding="gptq"
    ),
    "groups": Scheme(outliers="none", smoothing="calibrated", weights="group", group_size=32, rounding="gptq"),
    "weights alone": Scheme(
        outliers="none", smoothing="calibrated", weights="group", group_size=32, activations="none"
    ),
    "plain groups": Scheme(outliers="none", smoothing="none", weights="group", group_size=32),
}  # fmt: skip
SHOWN = {
    "columns": "w8a8 affine, static columns",
    "columns of a static range": "w8a8 affine, static range, gptq, static columns",
    "groups": "w8a8 affine, groups of 32, gptq",
    "weights alone": "w8a16, groups of 32",
    "plain groups": "w8a8 affine, groups of 32",
}


def outliers() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    made = Model().eval()
    with torch.no_grad():
        made.norm.weight[[3, 17]] *= 40
    return made, [torch.randn(2, 20, 32) for _ in range(2)]


@pytest.mark.parametrize("name", SCHEMES)
def test_every_kind_of_calibrated_recipe_is_measured(name: str) -> None:
    torch._dynamo.reset()
    model, data = outliers()
    recipe = Recipe(SCHEMES[name])
    if name != "plain groups":
        recipe = int8pass.calibrate(model, data, recipe)
    report = int8pass.inspect(model, data[0], recipe=recipe, data=data, schemes=False, profile=False)
    noise = Noise()
    for x in data:
        with torch.no_grad():
            noise.add(model(x), run_pass(model, x, recipe, stage="portable").output)
    assert report.output_sqnr == pytest.approx(noise.sqnr, abs=0.1)
    for site in report.sites:
        assert site.scheme == SHOWN[name]
        assert site.errors.weight > 25
        errors = (site.errors.naive, site.errors.smoothed, site.errors.final, site.errors.alone)
        assert all(error is not None and error > 5 for error in errors)
        assert len(site.outlier_columns) == (8 if "columns" in name else 0)
        for _, sqnr, code in site.fixes:  # what is proposed can be made
            assert sqnr > 5
            dataclasses.replace(SCHEMES[name], **eval(f"dict({code})"))
    if "columns" in name:
        gate = report.sites[0]
        assert gate.errors.final > gate.errors.naive + 3


def test_a_calibrated_recipe_without_weights() -> None:
    recipe = int8pass.calibrate(*outliers(), Recipe(SCHEMES["columns of a static range"]))
    recipe = dataclasses.replace(recipe, scheme=dataclasses.replace(recipe.scheme, rounding="nearest"))
    with torch.device("meta"):
        report = int8pass.inspect(Model(), torch.empty(2, 20, 32), recipe=recipe)
    assert [len(site.outlier_columns) for site in report.sites] == [8, 8]


def test_recipes_that_give_one_graph_are_compared_once() -> None:
    plain = Recipe(int8pass.recipe.PRESETS["w8a8"], sites={"a": SiteSettings(keep=True)})
    found = comparable(plain, ["b"])
    assert "w8a8" not in found
    assert all(recipe.at("a").keep for recipe in found.values()), "what is kept stays kept"
    assert not [name for name in found if "vectors" in name]
    assert key_of(plain) == key_of(plain.override(alpha=0.7))
    assert key_of(plain) != key_of(plain.override(symmetric=False))
