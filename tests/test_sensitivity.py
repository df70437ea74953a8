"""What an error at a site costs the model's output: told by gradients, as far as measurements say."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_real_model import smollm2
from torch import Tensor, nn

import int8pass
from int8pass.calibration import Calibration, budget
from int8pass.calibration.search import Choice
from int8pass.calibration.sensitivity import NoGradient
from int8pass.calibration.session import Session
from int8pass.errors import CalibrationWarning
from int8pass.recipe import Recipe, Scheme


class Classifier(nn.Module):
    """Logits from two linears, of which the second matters `late` times as much."""

    def __init__(self, late: float = 1.0, named: bool = True, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 50)
        self.late, self.named, self.broken = late, named, broken

    def forward(self, x: Tensor) -> Any:
        h = self.first(F.relu(x))
        if self.broken:
            torch._dynamo.graph_break()
        y = self.head(F.relu(h + self.late * self.second(F.relu(h))))
        return {"logits": y} if self.named else y


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


def squares(model: nn.Module, batch: Any, seed: int = 0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    session = Session(model, Recipe(Scheme(), quantize_head=False))
    session.differentiated(batch, seed, lambda name, x, g: found.update({name: g}))
    return found


@contextmanager
def noise(linear: nn.Module, size: float) -> Iterator[None]:
    """Adds to a linear's output an error without direction, of this size relative to each token."""
    generator = torch.Generator().manual_seed(1)

    def disturb(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        error = torch.randn(y.shape, generator=generator) / y.shape[-1] ** 0.5
        return y + size * y.norm(dim=-1, keepdim=True) * error

    handle = linear.register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Graph facts


def test_no_gradient_reaches_the_parameters_or_the_model() -> None:
    model = Classifier()
    before = copy.deepcopy(model.state_dict())
    found = squares(model, tokens(0, 2, 9))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.is_inference_mode_enabled()
    assert {g.shape for g in found.values()} == {(2, 9, 1)}
    assert not any(g.requires_grad for g in found.values())


def test_a_caller_without_gradients_gets_the_same() -> None:
    x = tokens(0, 2, 9)
    for named in (True, False):
        expected = squares(Classifier(named=named), x)
        with torch.no_grad():
            found = squares(Classifier(named=named), x)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert all(bool(g.any()) for g in found.values())


def test_the_same_seed_gives_the_same_numbers() -> None:
    x = tokens(0, 2, 9)
    first, again, other = (squares(Classifier(), x, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("named", [True, False], ids=["prediction", "embedding"])
def test_what_matters_more_has_larger_gradients(named: bool) -> None:
    x = tokens(0, 4, 50)
    little, much = (squares(Classifier(late, named), x) for late in (0.1, 10.0))
    name = next(n for n in little if "second" in n)
    assert much[name].mean() > 20 * little[name].mean()


def test_the_divergence_of_a_small_error_is_foretold() -> None:
    """KL of noise at one linear, against ‖g‖² ‖δ‖² / 2N: the law itself, on a model where nothing else interferes."""
    model, x = Classifier().requires_grad_(False), tokens(0, 8, 400)
    name = next(n for n in squares(model, x) if "second" in n)
    g = torch.stack([squares(model, x, seed)[name].mean() for seed in range(4)]).mean()
    size = 0.02
    exact = model(x)["logits"].log_softmax(-1)
    captured: list[Tensor] = []
    handle = model.second.register_forward_hook(lambda m, i, y: captured.append(y))
    model(x)
    handle.remove()
    with noise(model.second, size):
        found = model(x)["logits"].log_softmax(-1)
    measured = (exact.exp() * (exact - found)).sum(-1).mean()
    foretold = g * size**2 * captured[0].square().sum(-1).mean() / (2 * 32)
    assert 0.7 < foretold / measured < 1.4


def test_a_real_model_depends_on_its_sites_as_foretold(smollm2: tuple[nn.Module, Tensor]) -> None:
    """SmolLM2's down projections: the same relative error costs fifty times as much in the last layer."""
    model, ids = smollm2
    ids = ids[:, :128]
    layers = {f"model.layers.{i}.mlp.down_proj": model.get_submodule(f"model.layers.{i}.mlp.down_proj")
              for i in (5, 15, 29)}  # fmt: skip
    captured: dict[str, Tensor] = {}
    handles = [m.register_forward_hook(lambda m, i, y, n=n: captured.update({n: y})) for n, m in layers.items()]
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    found = squares(model, {"input_ids": ids, "use_cache": False})
    measured = []
    for name, linear in layers.items():
        y, size = captured[name], 0.02
        foretold = float((found[name][..., 0] * y.square().sum(-1)).mean() * size**2 / (2 * y.shape[-1]))
        with torch.no_grad(), noise(linear, size):
            other = model(ids, use_cache=False).logits.log_softmax(-1)
        measured.append(float((exact.exp() * (exact - other)).sum(-1).mean()))
        assert 0.6 < foretold / measured[-1] < 1.6
    assert measured[-1] > 20 * max(measured[:-1])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 6))
def test_columns_cost_what_their_weights_do(seed: int, average: int, sites: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = {f"site{i}": int(torch.randint(1, 500, (), generator=generator)) for i in range(sites)}
    options = {}
    for name in outputs:
        counts = [0, average, *torch.randint(1, 200, (4,), generator=generator).tolist()]
        costs = torch.rand(len(counts), generator=generator).tolist()
        options[name] = [
            (Choice(torch.zeros(200), columns=tuple(range(n))), cost) for n, cost in zip(counts, costs, strict=True)
        ]
    chosen = budget.allotted(options, outputs, average)
    assert chosen.keys() == outputs.keys()
    assert sum(len(c.columns) * outputs[n] for n, c in chosen.items()) <= average * sum(outputs.values())


def test_columns_go_where_the_output_depends_on_them() -> None:
    """Two like linears, one of which hardly matters: columns by the output go to the other."""
    model = Classifier(late=0.01)
    x = [tokens(seed, 2, 64) * torch.linspace(0.2, 4.0, 32).exp() for seed in range(4)]
    recipe = Recipe.preset("smoothquant-o3").override(outliers="static", rounding="nearest")
    sites = int8pass.calibrate(model, x, recipe, columns=4).sites
    second = next(s for n, s in sites.items() if "second" in n)
    first = next(s for n, s in sites.items() if "first" in n)
    assert len(first.columns) > len(second.columns)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_a_model_of_several_graphs_says_so_and_is_calibrated_all_the_same() -> None:
    model = Classifier(broken=True)
    x = [tokens(seed, 2, 64) for seed in range(4)]
    with pytest.raises(NoGradient, match="2 graphs"):
        squares(model, x[0])
    with pytest.warns(CalibrationWarning, match="2 graphs made the output"):
        recipe = int8pass.calibrate(model, x, Recipe.preset("smoothquant-o3").override(outliers="static"), columns=4)
    assert any(site.columns for site in recipe.sites.values())


def test_an_output_that_is_no_tensor_of_tokens_is_refused() -> None:
    class Number(Classifier):
        def forward(self, x: Tensor) -> Any:
            return {"tokens": super().forward(x)["logits"].argmax(-1)}

    with pytest.raises(NoGradient, match="no float tensor"):
        squares(Number(), tokens(0, 2, 9))


def test_sensitivities_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Session.differentiated
    monkeypatch.setattr(Session, "differentiated", lambda *a: (calls.append(1), original(*a))[1])
    seen = Calibration(Classifier(), [tokens(seed, 2, 64) for seed in range(4)])
    assert not calls, "only where columns are shared"
    recipe = Recipe.preset("smoothquant-o3").override(outliers="static", rounding="nearest")
    for columns in (2, 4):
        seen.recipe(recipe, columns=columns)
    assert len(calls) == 1, "of the one batch held out"


__all__ = ["smollm2"]
