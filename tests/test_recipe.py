"""Recipes: what is written is what is read, and what cannot be read says why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import int8pass
from int8pass.errors import Int8PassError, OptionError, RecipeError
from int8pass.recipe import CALIBRATED, PRESETS, Options, Recipe, Scheme, SiteSettings
from int8pass.recipe_file import FORMAT

positive = st.floats(min_value=1e-3, max_value=1e3, allow_nan=False)
schemes = st.builds(
    Scheme,
    activations=st.sampled_from(["per_token", "none"]),
    symmetric=st.booleans(),
    outliers=st.sampled_from(["none", "largest", "threshold", "static"]),
    threshold=positive,
    capacity=st.none() | st.integers(1, 4096),
    smoothing=st.sampled_from(["none", "outliers", "calibrated"]),
    smoothing_threshold=positive,
    one_row=st.sampled_from(["same", "weight_only"]),
)
settings = st.builds(
    SiteSettings,
    scheme=st.none() | schemes,
    keep=st.booleans(),
    columns=st.lists(st.integers(0, 4095), max_size=4).map(tuple),
    exponents=st.lists(st.integers(-128, 128).map(lambda e: e / 8), max_size=4).map(tuple),
)
recipes = st.builds(
    Recipe,
    schemes,
    st.booleans(),
    st.dictionaries(st.text(max_size=20), settings, max_size=3),
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2),
)


@given(recipes)
def test_json_round_trip(recipe: Recipe) -> None:
    found = Recipe.from_dict(json.loads(recipe.to_json()))
    assert found == recipe
    assert dict(found.versions) == dict(recipe.versions)
    assert found.to_json() == recipe.to_json()


@given(schemes, st.integers(1, 20_000))
def test_columns_fit_the_width(scheme: Scheme, width: int) -> None:
    columns = scheme.columns_for(width)
    assert 1 <= columns <= min(width, scheme.capacity or 64)
    assert scheme.capacity is not None or columns % 8 == 0 or columns == width


def test_files(tmp_path: Path) -> None:
    recipe = dataclasses.replace(Recipe.preset("w8a8"), sites={"layers.0.q": SiteSettings(keep=True, columns=(1, 5))})
    path = tmp_path / "recipe.json"
    recipe.save(path)
    recipe.save(path)  # over an existing file
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"], "nothing half-written is left"
    assert Recipe.load(path) == Recipe.load(str(path)) == recipe
    assert Options.parse({"recipe": path}, None).recipe == recipe
    assert Options.parse({"recipe": str(path)}, None).recipe == recipe


def test_presets() -> None:
    assert int8pass.presets() == (
        "default", "w8a8", "w8a8-asymmetric", "w8a16", "llm.int8", "zeroquant", "smoothquant-o1", "smoothquant-o2",
        "smoothquant-o3", "outlier-columns", "auto",
    )  # fmt: skip
    assert CALIBRATED == ("smoothquant-o1", "smoothquant-o2", "smoothquant-o3", "outlier-columns", "auto")
    assert len(set(PRESETS.values())) == len(PRESETS)
    assert Recipe() == Recipe.preset("default") == Options.parse(None, None).recipe == Options.parse({}, None).recipe
    for name, scheme in PRESETS.items():
        assert Recipe.preset(name) == Recipe(scheme) == Options.parse({"recipe": name}, None).recipe
        assert not Recipe.preset(name).quantize_head


def test_a_site_falls_back_to_the_scheme_of_the_recipe() -> None:
    own = Scheme(symmetric=True)
    recipe = Recipe(sites={"own": SiteSettings(own), "columns": SiteSettings(columns=(3,))})
    assert recipe.at("own").scheme == own
    assert recipe.at("columns") == SiteSettings(recipe.scheme, columns=(3,))
    assert recipe.at("unknown") == SiteSettings(recipe.scheme)


def test_settings_are_immutable() -> None:
    for value in (Scheme(), Recipe(), SiteSettings(), Options()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.scheme = None  # type: ignore[union-attr,misc]
    with pytest.raises(TypeError):
        PRESETS["default"] = Scheme()  # type: ignore[index]


def content(**changes: Any) -> str:
    return json.dumps(json.loads(Recipe().to_json()) | changes)


def without(key: str) -> str:
    return json.dumps({k: v for k, v in json.loads(Recipe().to_json()).items() if k != key})


BAD_FILES = {
    "truncated": (Recipe().to_json()[:-40], "is not valid JSON"),
    "empty": ("", "is not valid JSON"),
    "no recipe": ('{"model_type": "llama"}', "not an int8pass recipe"),
    "a list": ("[1, 2]", "not an int8pass recipe"),
    "newer": (content(int8pass_recipe=FORMAT + 1), f"format {FORMAT + 1}; this version of int8pass reads {FORMAT}"),
    "no scheme": (without("scheme"), "malformed recipe.*scheme"),
    "no sites": (without("sites"), "malformed recipe.*sites"),
    "unknown field": (content(scheme={"bits": 4}), "malformed recipe.*bits"),
    "wrong value": (content(scheme={"outliers": "some"}), "malformed recipe.*outliers must be one of"),
    "sites not a table": (content(sites=[1]), "malformed recipe"),
    "site not a table": (content(sites={"q": 3}), "malformed recipe"),
    "columns no numbers": (
        content(sites={"q": dict(scheme=None, keep=False, columns=["x"], exponents=[])}), "malformed recipe"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_no_recipe(name: str, tmp_path: Path) -> None:
    text, message = BAD_FILES[name]
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.load(path)
    assert "bad.json" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe .*missing\.json"):
        Recipe.load(tmp_path / "missing.json")
    with pytest.raises(RecipeError, match="cannot read recipe"):
        Recipe.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read recipe"):
        Recipe.load(tmp_path / "binary.json")


BAD_SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "activations": ({"activations": "int4"}, "must be one of 'per_token', 'per_tensor', 'static', 'none', got 'int4'"),
    "group size": ({"group_size": 16}, "group_size must be within 32 and 256, got 16"),
    "alpha": ({"alpha": 1.5}, "alpha must be within 0 and 1"),
    "static with dynamic columns": ({"activations": "static"}, "static activations take outliers 'none' or 'static'"),
    "groups with dynamic columns": ({"weights": "group"}, "group-wise weights take outliers 'none' or 'static'"),
    "symmetric": ({"symmetric": 1}, "symmetric must be bool, got 1"),
    "threshold": ({"threshold": -1.0}, "threshold and smoothing_threshold must be positive"),
    "threshold type": ({"threshold": "6"}, "threshold must be float or int, got '6'"),
    "threshold bool": ({"threshold": True}, "threshold must be float or int, got True"),
    "capacity": ({"capacity": 0}, "capacity must be at least 1, got 0"),
    "capacity type": ({"capacity": 1.5}, r"capacity must be int or NoneType, got 1\.5"),
    "one_row": ({"one_row": None}, "one_row must be one of 'same', 'weight_only', got None"),
}


@pytest.mark.parametrize("name", BAD_SCHEMES)
def test_wrong_fields(name: str) -> None:
    fields, message = BAD_SCHEMES[name]
    with pytest.raises(OptionError, match=message):
        Scheme(**fields)
    with pytest.raises(OptionError, match=message):
        Options.parse(fields, None)


def test_options() -> None:
    options = Options.parse({"recipe": "w8a8", "symmetric": False, "free_weights": True, "quantize_head": True}, None)
    assert options == Options(dataclasses.replace(Recipe.preset("w8a8-asymmetric"), quantize_head=True), True)
    assert Options.parse(None, "default").inductor == Options.parse({"mode": "default"}, None).inductor == {}
    assert Options.parse({"mode": "max-autotune"}, None) == Options.parse(None, "max-autotune")
    assert Options.parse({"recipe": Recipe(quantize_head=True)}, None).recipe.quantize_head
    with pytest.raises(OptionError, match=r"unknown option 'a', 'b'; options are recipe, .*inductor, activations"):
        Options.parse({"a": 1, "b": 2}, None)
    with pytest.raises(OptionError, match="unknown preset 'int4'; presets are default"):
        Recipe.preset("int4")
    assert issubclass(OptionError, Int8PassError)
    assert issubclass(OptionError, ValueError)


def test_parsing_does_not_change_the_callers_options() -> None:
    given_options = {"recipe": "w8a8", "inductor": {}, "threshold": 5}
    Options.parse(given_options, None)
    assert given_options == {"recipe": "w8a8", "inductor": {}, "threshold": 5}


def test_overrides_of_the_model_and_of_sites() -> None:
    recipe = Recipe.preset("w8a8").override("a", keep=True).override(["b", "c"], activations="per_tensor")
    assert recipe.at("a").keep
    assert (
        recipe.at("b").scheme == recipe.at("c").scheme == dataclasses.replace(recipe.scheme, activations="per_tensor")
    )
    changed = recipe.override(symmetric=False)
    assert not changed.scheme.symmetric
    assert changed.at("b").scheme == dataclasses.replace(changed.scheme, activations="per_tensor"), (
        "sites keep their own"
    )
    with pytest.raises(OptionError, match="Scheme has no field 'bits'"):
        recipe.override(bits=4)
    with pytest.raises(OptionError, match="keep is a setting of single sites"):
        recipe.override(keep=True)


def test_diff_says_what_changed_in_few_words() -> None:
    first = Recipe(
        sites={"a": SiteSettings(columns=(1, 2), exponents=(0.0, 1.0)), "b": SiteSettings(), "d": SiteSettings()}
    )
    second = dataclasses.replace(
        first.override(symmetric=True),
        quantize_head=True,
        sites={
            "a": SiteSettings(columns=(2, 3), exponents=(0.5, 1.0), alpha=0.7),
            "c": SiteSettings(),
            "d": SiteSettings(),
        },
    )
    assert first.diff(first) == []
    assert first.diff(second) == [
        "symmetric: False → True",
        "quantize_head: False → True",
        "a: columns: 1 removed, 1 added, 2 now",
        "a: smoothing vectors: up to 2^0.5 apart",
        "a: alpha: None → 0.7",
        "b: only in the first",
        "c: only in the second",
    ]


def test_a_recipe_of_the_first_format_is_read() -> None:
    old = json.loads(Recipe(sites={"q": SiteSettings(columns=(3,))}).to_json()) | {"int8pass_recipe": 1}
    for key in ("limits", "alpha", "error", "tokens"):
        del old["sites"]["q"][key]
    for key in ("weights", "group_size", "alpha", "statistic", "clipping", "rounding"):
        del old["scheme"][key]
    del old["tensors"]
    assert Recipe.from_dict(old) == Recipe(sites={"q": SiteSettings(columns=(3,))})


def test_files_are_read_line_by_line_by_people() -> None:
    lines = Recipe(sites={"q": SiteSettings(columns=tuple(range(64)))}).to_json().splitlines()
    assert len(lines) < 25
    assert '   "columns": [0, 1, 2' in "\n".join(lines)
