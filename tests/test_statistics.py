"""Statistics, clipping ranges, smoothing vectors and rounding: pure functions, against what they promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from int8pass.calibration import clipping, search
from int8pass.calibration.clipping import Histogram
from int8pass.calibration.rounding import gptq, hessian
from int8pass.calibration.smoothing import column_absmax, exponents, grouped
from int8pass.calibration.statistics import ChannelStatistics
from int8pass.errors import CalibrationError
from int8pass.recipe import Scheme
from lowering import numerics

K = 24
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=5)


def tokens(count: int, seed: int, width: int = K) -> Tensor:
    """Channels of very different sizes."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-2, 2, width)


def of(*batches: Tensor) -> ChannelStatistics:
    made = ChannelStatistics(batches[0].shape[1])
    for batch in batches:
        made.update(batch)
    return made


# -- statistics


@settings(max_examples=25, deadline=None)
@given(lengths, st.integers(1, 4))
def test_merging_is_observing_together(counts: list[int], cut: int) -> None:
    batches = [tokens(n, seed) for seed, n in enumerate(counts)]
    together = of(*batches)
    first, second = of(*(batches[:cut] or [tokens(0, 0)])), of(*(batches[cut:] or [tokens(0, 0)]))
    first.merge(ChannelStatistics.from_state(second.state()))
    for name in ("low", "high", "counts", "tokens", "batches"):
        assert torch.equal(torch.as_tensor(getattr(first, name)), torch.as_tensor(getattr(together, name))), name
    for name in ("energy", "magnitude", "moving_low", "moving_high", "moving_weight"):
        torch.testing.assert_close(
            torch.as_tensor(getattr(first, name)), torch.as_tensor(getattr(together, name)), rtol=1e-12, atol=1e-12
        )


def test_statistics_are_what_they_are_called() -> None:
    x = tokens(500, 0)
    found = of(x[:100], x[100:101], x[101:])
    wide = x.double()
    torch.testing.assert_close(found.absmax, wide.abs().amax(0))
    robust = torch.minimum(wide.abs(), found.percentile()).square().mean(0).sqrt()
    torch.testing.assert_close(found.rms, robust, rtol=0.05, atol=0)
    torch.testing.assert_close(found.mean, wide.abs().mean(0))
    exact = wide.abs().sort(0).values[494]  # 495 of 500 tokens do not exceed it
    approximate = found.percentile(99.0)
    assert (approximate >= exact * 0.999).all()
    assert (approximate <= exact * 1.35).all(), "within a bin"
    assert (found.percentile(100.0) >= found.absmax * 0.999).all()


def test_memory_does_not_grow_with_tokens() -> None:
    sizes = []
    for count in (10, 1000):
        state = of(tokens(count, 0)).state()
        sizes.append(sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor)))
    assert sizes[0] == sizes[1] <= K * 1000


def test_a_moving_average_forgets() -> None:
    calm, wild = torch.ones(8, K), 100 * torch.ones(8, K)
    found = of(wild, *[calm] * 60)
    ones = torch.ones(K, dtype=torch.float64)
    assert found.limits(ones, ())[1] == 100
    assert found.limits(ones, (), moving_average=True)[1] < 1.5


def test_limits_are_of_smoothed_inliers() -> None:
    x = tokens(50, 1)
    s = torch.linspace(0.5, 2, K, dtype=torch.float64)
    inner = (x.double() / s)[:, [i for i in range(K) if i not in (3, 23)]]
    low, high = of(x).limits(s, (3, 23))
    assert (low, high) == pytest.approx((float(inner.min()), float(inner.max())), rel=1e-6)
    assert of(x).limits(s, tuple(range(K))) == (0.0, 0.0)


def test_statistics_of_another_width_are_refused() -> None:
    with pytest.raises(CalibrationError, match="24 channels cannot be merged into 8"):
        ChannelStatistics(8).merge(ChannelStatistics(24))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_noticed(value: float) -> None:
    x = tokens(5, 0)
    x[2, 3] = value
    assert not of(x).finite


# -- one massive token


def massive_case() -> tuple[Tensor, Tensor, Tensor]:
    """Activations with 4 hot channels, the same with one massive token, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 128, generator=generator)
    x[:, :4] *= 30
    poisoned = x.clone()
    poisoned[0, 100], poisoned[0, 101] = 3000.0, -2500.0
    return x, poisoned, torch.randn(96, 128, generator=generator)


def per_token_error(x: Tensor, weight: Tensor, powers: Tensor) -> float:
    """Relative error of a smoothed W8A8 product."""
    s = torch.exp2(powers).float()
    scheme = Scheme(symmetric=True, outliers="none", smoothing="calibrated")
    y = search.fake_quantize(x / s, scheme, None) @ search.fake_quantize_weight(weight * s, scheme).t()
    exact = x @ weight.t()
    return float((y - exact).norm() / exact.norm())


def test_one_massive_token_does_not_ruin_the_others() -> None:
    """With maxima it does (algorithms: fifty times worse); root mean squares and percentiles keep the gain."""
    x, poisoned, weight = massive_case()
    found, columns = of(poisoned), column_absmax([weight])
    others = x[1:]
    plain = per_token_error(others, weight, torch.zeros(128, dtype=torch.float64))
    vectors = {name: exponents(found.of(name), columns, 0.8) for name in ("absmax", "percentile", "rms")}
    errors = {name: per_token_error(others, weight, vector) for name, vector in vectors.items()}
    clean = per_token_error(others, weight, exponents(of(x).absmax, columns, 0.8))
    assert errors["absmax"] > 5 * clean
    assert errors["rms"] < 0.6 * plain
    assert errors["percentile"] < 1.2 * clean < plain


# -- smoothing vectors


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(0, 100))
def test_exponents_are_smoothquants(alpha: float, seed: int) -> None:
    x, w = tokens(40, seed).abs().amax(0).double(), tokens(40, seed + 1).abs().amax(0).double()
    found = exponents(x, w, alpha)
    s = x**alpha / w ** (1 - alpha)
    assert torch.equal(found * 8, (found * 8).round())
    ratio = (torch.exp2(found) / s).log2()
    assert float(ratio.max() - ratio.min()) <= 1 / 8 + 1e-9, "the same up to one factor and half a step"


def test_idle_channels_stay() -> None:
    x = torch.tensor([0.0, 1.0, 4.0, 16.0], dtype=torch.float64)
    w = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    assert exponents(x, w, 0.5).tolist() == [0.0, 0.0, 0.0, 1.0]
    assert exponents(x * 0, w, 0.5).tolist() == [0.0] * 4


def test_head_groups_share_their_largest_exponent() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 0.0])
    assert grouped(values, (0, 1, 0, 1)).tolist() == [3.0, 2.0, 3.0, 2.0]
    assert grouped(values, (3, 2, 1, 0)) is values
    assert grouped(values, None) is values


# -- clipping


def histogram(x: Tensor) -> Histogram:
    made = Histogram(float(x.min()), float(x.max()))
    made.update(x)
    return made


def test_histograms_add_up() -> None:
    x = tokens(300, 0).flatten()
    whole = histogram(x)
    parts = [Histogram(whole.low, whole.high) for _ in range(2)]
    parts[0].update(x[:1000])
    parts[1].update(x[1000:])
    parts[0].merge(parts[1])
    assert torch.equal(parts[0].counts, whole.counts)
    assert float(whole.counts.sum()) == x.numel()


def squared_error(x: Tensor, low: float, high: float) -> float:
    codes, scale, zero = numerics.quantize_to_range(x, torch.tensor(low), torch.tensor(high), False)
    return float(((codes.float() - zero) * scale - x).square().mean())


@pytest.mark.parametrize("method", ["percentile", "entropy"])
@pytest.mark.parametrize("one_sided", [False, True])
def test_clipping_a_spike_pays(method: str, one_sided: bool) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x = x.abs() if one_sided else x
    x[17] = 200.0
    found = histogram(x)
    low, high = clipping.limits(found, method, symmetric=False)
    assert found.low <= low <= 0 <= high <= found.high

    others = x[torch.arange(len(x)) != 17]
    assert squared_error(others, low, high) < 0.3 * squared_error(others, found.low, found.high)


def test_mse_clips_where_that_leaves_least_squared_error() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) ** 3
    found = histogram(x)
    low, high = clipping.mse_limits(found, symmetric=False)
    fractions = [squared_error(x, f * found.low, f * found.high) for f in clipping.FRACTIONS]
    assert squared_error(x, low, high) <= 1.02 * min(fractions) < 0.9 * fractions[0]


def test_an_even_distribution_is_hardly_clipped() -> None:
    x = torch.linspace(-3, 3, 50_000)
    for method in ("percentile", "mse", "entropy"):
        low, high = clipping.limits(histogram(x), method, symmetric=True)
        assert 2.4 <= -low <= 3.001
        assert 2.4 <= high <= 3.001, method


def test_a_tensor_of_zeros_has_limits() -> None:
    for method in ("percentile", "mse", "entropy"):
        assert clipping.limits(histogram(torch.zeros(10)), method, True) == (0.0, 0.0)


# -- rounding


@pytest.mark.parametrize("group", [None, 32])
def test_gptq_leaves_less_error_than_rounding_to_nearest(group: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(16, 96, generator=generator)
    x = torch.randn(400, 16, generator=generator) @ basis + 0.1 * torch.randn(400, 96, generator=generator)
    weight = torch.randn(40, 96, generator=generator)
    weight[:, [5, 60]] = 0.0  # outlier columns, taken out
    if group is None:
        nearest, scale = numerics.quantize_weight(weight)
        spread = scale[:, None]
    else:
        nearest, scale = numerics.quantize_weight_groups(weight, group)
        spread = scale.repeat_interleave(group, 1)
    codes = gptq(weight, scale, hessian(x[:200]) + hessian(x[200:]), group)
    assert codes.dtype == torch.int8
    assert codes[:, [5, 60]].abs().sum() == 0
    assert codes.abs().max() <= 127
    errors = [float((x @ (c * spread - weight).t()).norm()) for c in (codes.float(), nearest.float())]
    assert errors[0] < 0.7 * errors[1]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_gptq_does_not_depend_on_the_order_of_columns(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 48, generator=generator) * torch.rand(48, generator=generator).add(0.1)
    weight, order = torch.randn(8, 48, generator=generator), torch.randperm(48, generator=generator)
    scale, second = numerics.quantize_weight(weight)[1], hessian(x)
    moved = gptq(weight[:, order].contiguous(), scale, second[order][:, order])
    assert torch.equal(moved, gptq(weight, scale, second)[:, order])


def test_gptq_of_independent_inputs_is_rounding_to_nearest() -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    nearest, scale = numerics.quantize_weight(weight)
    assert torch.equal(gptq(weight, scale, torch.eye(12)), nearest)
    idle = torch.zeros(12, 12)
    assert torch.equal(gptq(weight, scale, idle), nearest), "inputs that are never active"
