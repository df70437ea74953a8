"""Choices of one site and how columns are shared: on planted data, against what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_statistics import of

from int8pass.calibration import budget, observe, search
from int8pass.calibration.observe import Sample
from int8pass.calibration.search import Choice, Trial
from int8pass.recipe import Scheme


def evenly(rows: torch.Tensor) -> Sample:
    return Sample(rows, torch.ones(len(rows)))


def trial(scheme: Scheme, hot: int = 4) -> Trial:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 128, generator=generator)
    x[:, :hot] *= 40
    weights = [torch.randn(48, 128, generator=generator), torch.randn(16, 128, generator=generator)]
    return Trial(evenly(x[400:]), weights, scheme, of(x[:400]), None)


@given(tokens=st.integers(1, 700), each=st.integers(1, 64), extreme=st.integers(1, 16), seed=st.integers(0, 99))
def test_a_sample_stands_for_all_tokens(tokens: int, each: int, extreme: int, seed: int) -> None:
    rows = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))
    absmax = rows.abs().amax(0) / 2
    taken = observe._sample(rows, absmax, each, extreme)
    assert float(taken.weights.sum()) == pytest.approx(tokens, rel=1e-4)
    excess = (rows / absmax).abs().amax(1)
    furthest = excess.topk(min(extreme, tokens // 4)).values
    assert torch.equal((taken.rows / absmax).abs().amax(1)[: len(furthest)], furthest), "those come first, once"
    assert len(taken.rows) <= each + extreme
    assert all(bool((rows == row).all(1).any()) for row in taken.rows)


def test_tokens_that_leave_their_ranges_count_for_what_they_are() -> None:
    """One token in two hundred that a range clips: seen, with the weight it has, whatever is sampled evenly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 64, generator=generator)
    held = x[400:].clone()
    held[7::200] *= 8.0
    static = Scheme(activations="static", smoothing="none", outliers="none", clipping="output")
    seen = of(x[:400])
    weights = [torch.randn(32, 64, generator=generator)]
    drawn = observe._sample(held, seen.absmax.float(), 32, 8)
    blind, seeing, exact = (
        Trial(sample, weights, static, seen, None).best([Choice(torch.zeros(64, dtype=torch.float64))])
        for sample in (evenly(held[::13]), drawn, evenly(held))
    )
    assert blind.limits is not None
    assert exact.limits is not None
    assert seeing.limits == exact.limits
    assert blind.limits[1] < exact.limits[1]
    assert seeing.error == pytest.approx(exact.error, rel=0.3)
    assert blind.error < 0.5 * exact.error


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_a_range_clips_counts_more_than_rounding(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 32, generator=generator).abs(), torch.randn(16, 32, generator=generator)
    static = Scheme(activations="static", smoothing="none", outliers="none", clipping="output", symmetric=symmetric)
    made = Trial(evenly(x), [weight], static, of(x), None)
    for high in (float(x.max()), 1.5):
        choice = Choice(torch.zeros(32, dtype=torch.float64), limits=(0.0, high))
        q = search.fake_quantize(x, static, (0.0, high)) @ search.fake_quantize_weight(weight, static).t()
        y = x @ weight.t()
        lost = (x - x.clamp(-high if symmetric else 0.0, high)) @ search.fake_quantize_weight(weight, static).t()
        energy = y.square().sum(1)
        each = (q - y).square().sum(1) + (search.CLIPPED - 1) * lost.square().sum(1)
        expected = (each / (energy + energy.sort().values[31])).mean()
        assert made.error(choice) == pytest.approx(float(expected), rel=1e-3), high


def test_what_was_seen_is_clipped_only_where_that_pays() -> None:
    for spike, clipped in ((1.0, False), (100.0, True)):
        x = torch.randn(600, 128, generator=torch.Generator().manual_seed(0))
        x[::300, 5] *= spike
        static = Scheme(activations="static", smoothing="none", outliers="none", clipping="output")
        weights = [torch.randn(48, 128, generator=torch.Generator().manual_seed(1))]
        made = Trial(evenly(x), weights, static, of(x), None)
        plain = made.tried(Choice(torch.zeros(128, dtype=torch.float64)))
        best = made.clipped(plain)
        assert best.limits is not None
        assert plain.limits is not None
        assert (best.limits[1] < plain.limits[1]) is clipped
        if clipped:
            assert plain.error > search.WORTH * best.error


@pytest.mark.parametrize("activations", ["per_token", "per_tensor", "static"])
def test_the_columns_that_cause_most_error_are_found(activations: str) -> None:
    made = trial(Scheme(activations=activations, outliers="static", smoothing="none"))
    plain = Choice(made.exponents("rms", None))
    assert made.columns(plain, 4) == (0, 1, 2, 3)
    without, split = made.tried(plain), made.best([plain], 4)
    assert split.error < 0.05 * without.error
    if activations == "static":
        assert without.limits is not None
        assert split.limits is not None
        assert split.limits[1] < 0.2 * without.limits[1]


def test_with_a_range_per_token_columns_are_those_of_most_energy() -> None:
    made = trial(Scheme(outliers="static", smoothing="calibrated"))
    for alpha in (None, 0.5, 0.9):
        found = made.columns(Choice(made.exponents("rms", alpha)), 9)
        assert found == tuple(sorted(made.statistics.energy.topk(9).indices.tolist()))


def test_a_call_may_be_capped_where_a_rare_token_would_set_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 128, generator=generator)
    x[::300, 5] *= 100.0  # rare tokens far out of line: clipping them costs less than their range
    weights = [torch.randn(48, 128, generator=generator)]
    capped, free = (
        Trial(
            evenly(x[200:]), weights, Scheme(activations="per_tensor", clipping=c, smoothing="none"), of(x[:400]), None
        )  # type: ignore[arg-type]
        for c in ("output", "minmax")
    )
    found, other = (t.best(t.smoothings()) for t in (capped, free))
    assert other.limits is None, "as published: the range of the call"
    assert found.limits is not None
    assert found.limits[1] < float(x[:400].amax())
    assert found.error < other.error


@pytest.mark.parametrize("activations", ["per_token", "per_tensor", "static"])
def test_alpha_is_searched_by_the_error_it_leaves(activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CLIPPED", 1.0)  # rounding alone
    made = trial(Scheme(activations=activations, outliers="none", smoothing="calibrated", alpha=None))
    best = made.best(made.smoothings())
    plain = made.tried(Choice(made.exponents("rms", None)))
    assert best.alpha is not None
    assert best.error < 0.2 * plain.error
    assert best.error == min(made.tried(c).error for c in made.smoothings())


def test_a_fixed_alpha_is_not_searched() -> None:
    made = trial(Scheme(outliers="none", smoothing="calibrated", alpha=0.7))
    assert [c.alpha for c in made.smoothings()] == [0.7]
    assert [c.alpha for c in trial(Scheme(smoothing="none")).smoothings()] == [None]
    grid = trial(Scheme(smoothing="calibrated", alpha=None, statistic="mean")).smoothings()
    assert [c.alpha for c in grid] == [None, *(i / 20 for i in range(1, 20))], "AWQ's grid"


def test_budgets() -> None:
    def choice(error: float, columns: int) -> budget.Option:
        return budget.option(Choice(torch.zeros(128), columns=tuple(range(columns)), error=error), 128)

    options = {
        "hard": [choice(1.0, 0), choice(0.2, 4), choice(0.1, 32), budget.kept()],
        "easy": [choice(0.01, 0), choice(0.009, 4), budget.kept()],
    }
    sizes = {"hard": 1000, "easy": 1000}

    def spent(**limits: float | None) -> tuple[float, float]:
        chosen = budget.spend(options, sizes, **limits)
        return sum(c.extra * sizes[n] for n, c in chosen.items()) / 2000, sum(c.error for c in chosen.values())

    assert spent(cost=1.0) == (0.0, 1.01)
    cost, error = spent(cost=1.1)
    assert cost <= 0.1
    assert error == pytest.approx(0.21), "the hard site first"
    assert spent(cost=None)[1] == 0.0, "both keep their dtype"
    assert spent(cost=None, error=0.15) == (pytest.approx(6 * 4 / 128 / 2), pytest.approx(0.21)), "and no further"


def test_what_a_massive_token_does_to_the_others_errors() -> None:
    """They count where one range serves all tokens; with a range per token they are small beside it."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[0] *= 1000
    counted = [
        Trial(
            evenly(x), [torch.ones(16, 32)], Scheme(activations=a, smoothing="none", outliers="none"), of(x), None
        )._token  # type: ignore[arg-type]
        for a in ("per_token", "static")
    ]
    assert counted[1][1:].median() > 10 * counted[0][1:].median()
