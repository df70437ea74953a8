"""Laws of the quantization arithmetic."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from lowering import numerics

SHAPES = st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 7, 64, 123]))


def rows(shape: tuple[int, int], seed: int, scale: float, shift: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * scale + shift


@settings(max_examples=80, deadline=None)
@given(SHAPES, st.integers(0, 999), st.sampled_from([1e-20, 1e-3, 1.0, 1e6]), st.sampled_from([0.0, 1.0, -5.0]))
def test_error_of_a_round_trip_is_at_most_half_a_step(
    shape: tuple[int, int], seed: int, scale: float, shift: float
) -> None:
    x = rows(shape, seed, scale, shift)
    codes, step = numerics.quantize_symmetric(x)
    slack = 1 + 1e-4  # of the reciprocal's rounding, at codes up to 127
    assert ((codes.float() * step - x).abs() <= step / 2 * slack).all()
    codes, step, zero = numerics.quantize_affine(x)
    # Half a step for the code and half a step for the rounded zero point, at the ends of the range.
    assert (((codes.float() - zero) * step - x).abs() <= step * slack).all()


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 999), st.sampled_from([1e-3, 1.0, 1e4]))
def test_quantizing_what_was_dequantized_changes_nothing(shape: tuple[int, int], seed: int, scale: float) -> None:
    codes, step = numerics.quantize_symmetric(rows(shape, seed, scale, 0.0))
    again, same_step = numerics.quantize_symmetric(codes.float() * step)
    assert torch.equal(codes, again)
    torch.testing.assert_close(step, same_step, rtol=1e-6, atol=0)


def test_rows_without_range() -> None:
    x = torch.zeros(2, 5)
    x[1] = 3.0
    codes, step, zero = numerics.quantize_affine(x)
    assert torch.equal((codes.float() - zero)[0] * step[0], torch.zeros(5))  # zero stays exact
    torch.testing.assert_close((codes.float() - zero)[1] * step[1], x[1])
    codes, step = numerics.quantize_symmetric(x)
    assert torch.equal(codes[0], torch.zeros(5, dtype=torch.int8))
    assert torch.isfinite(step).all()


def test_nan_goes_through_to_the_scale_of_its_row_only() -> None:
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    _, step = numerics.quantize_symmetric(x)
    assert torch.equal(step.isnan().squeeze(-1), torch.tensor([False, True, False]))


def test_weights_have_one_scale_per_output_channel() -> None:
    w = torch.randn(6, 40)
    codes, scale = numerics.quantize_weight(w)
    assert codes.shape == (6, 40)
    assert codes.is_contiguous()
    assert scale.shape == (6,)
    torch.testing.assert_close(scale, w.abs().amax(1) / 127)
