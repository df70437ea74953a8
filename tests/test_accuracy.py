"""Methods in the order of their quality, on trained weights: naive < smoothed < smoothed + split."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from harness import relative_error
from test_real_model import LAYERS, FirstLayers, smollm2
from torch import Tensor, nn

from benchmarks.cpu import stress
from int8pass.calibration import Calibration
from int8pass.calibration.session import Session
from int8pass.recipe import Recipe

pytestmark = pytest.mark.slow
__all__ = ["smollm2"]

SCHEMES: Mapping[str, tuple[Recipe, int | None]] = {
    "naive": (Recipe.preset("smoothquant-o3").override(smoothing="none", clipping="minmax", symmetric=True), None),
    "smoothed": (Recipe.preset("smoothquant-o3"), None),
    "smoothed + split": (Recipe.preset("smoothquant-o3").override(outliers="static"), 32),
    "per token": (Recipe.preset("smoothquant-o1"), None),
    "per token + split": (Recipe.preset("smoothquant-o1").override(outliers="static"), 32),
    "smoothed, weights to nearest": (Recipe.preset("smoothquant-o3").override(rounding="nearest"), None),
}


def median_token_error(found: Tensor, expected: Tensor) -> float:
    """Relative error of the median token, which a massive one does not decide."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def errors(
    part: nn.Module,
    ids: Tensor,
    names: tuple[str, ...] = tuple(SCHEMES),
    error: Callable[[Tensor, Tensor], float] = relative_error,
) -> dict[str, float]:
    """Error of every scheme on windows that calibration did not see."""
    windows = ids.view(-1, 64)
    seen, session = Calibration(part, [w[None] for w in windows[:3]]), Session(part, Recipe())
    with torch.no_grad():
        expected = session.plain(windows[3:])
        return {
            name: error(session.quantized(windows[3:], seen.recipe(recipe, columns=columns)), expected)
            for name, (recipe, columns) in SCHEMES.items()
            if name in names
        }


def test_quality_order(smollm2: tuple[nn.Module, Tensor]) -> None:
    assert LAYERS > 4
    model, ids = smollm2
    found = errors(FirstLayers(model, 4), ids, error=median_token_error)
    assert found["smoothed + split"] < found["smoothed"] < 0.7 * found["naive"], found
    assert found["per token + split"] < found["per token"] < found["smoothed"], found


def test_second_order_rounding_lowers_the_error_it_minimizes(smollm2: tuple[nn.Module, Tensor]) -> None:
    model, ids = smollm2
    # By the median token: the Hessian weighs tokens alike, and what a range clips of a massive one it cannot mend.
    names = ("smoothed", "smoothed, weights to nearest")
    found = errors(FirstLayers(model, 4), ids, names, error=median_token_error)
    assert found["smoothed"] < found["smoothed, weights to nearest"], found


def test_outliers_of_large_models_change_little(smollm2: tuple[nn.Module, Tensor]) -> None:
    """What smoothing undoes exactly costs no more than half of the loss again."""
    model, ids = smollm2
    planted = copy.deepcopy(model)
    with torch.no_grad():
        stress(planted)
    names = ("naive", "smoothed", "per token")
    plain, stressed = (errors(FirstLayers(m, 2), ids, names) for m in (model, planted))
    for name in ("smoothed", "per token"):
        assert stressed[name] < 1.5 * plain[name], (name, plain, stressed)
    assert stressed["naive"] > 1.5 * stressed["smoothed"], stressed
