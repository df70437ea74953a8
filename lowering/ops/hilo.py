"""Outlier blocks, row by row: activations as int16 codes in two int8 planes, `code = 256 · high + low`.

LLM.int8() (arXiv 2208.07339, section 3.2) keeps the columns above a threshold in float, for all tokens of a call: to
find them takes a pass over the whole input, and to multiply them a copy of their weights. Here every row keeps its own,
in steps of the scale of its other values: what int8 has no code for goes on in a second plane, which is zero nearly
everywhere. A row needs nothing but itself, any number of columns may have outliers, and the product is one of int8
codes: `x Wᵀ = 256 (high Wᵀ) + low Wᵀ`, exact in int32. Of the second plane whole blocks of columns are multiplied,
those in which some row of a tile has outliers; therefore all values of such a block have codes of 16 bits, large or
not, and none of them counts in the scale. `blocks` says which: bit b is set where a row has outliers in block b of
`block_width(K)` columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowering import numerics
from lowering.ops.act import ACTIVATIONS
from lowering.ops.norm import normalize
from lowering.ops.quantize import row_samples
from lowering.registry import Sample, Tolerance, op, random_tensor

MAX_K = 2**16
"""Channels: so many products of inliers leave half of an int32 for the outliers."""


def _quantize_samples(device: torch.device) -> Iterator[Sample]:
    for sample in row_samples(device):
        x, symmetric = sample.args
        yield Sample(sample.label, (x, 3.0, symmetric))
    none = random_tensor(3, 96, device=device).clamp(-3, 3)
    yield Sample("no_outliers", (none, 3.0, False))
    yield Sample("all_outliers", (none + 100.0, 3.0, False))
    deep = random_tensor(2, 4100, device=device)  # blocks of more than 128 columns
    deep[1, ::7] *= 500.0
    yield Sample("deep", (deep, 6.0, True))


@op(samples=_quantize_samples, tolerance=Tolerance(codes=1, rtol=1e-6, atol=0.0))
def quantize_hilo(x: Tensor, threshold: float, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One scale per row of `x[..., K]`, made by its blocks within ±`threshold` → int8 low halves `[..., K]`, fp32 scale
    and int32 zero point `[..., 1]`, int8 high halves `[..., K]`, int32 blocks `[..., 1]`.

    `x ≈ (256 · high + low - zero_point) · scale` within scale / 2, beyond the threshold too. A row without outliers has
    the codes of `quantize_per_token`. The scale is larger than the inliers need only where an outlier would leave int16
    (beyond 255 times their range), or the row's magnitudes could overflow an int32 sum. Which blocks have outliers,
    says `numerics.outlier_blocks`: those beyond the threshold, and those at least twice as large as all smaller ones,
    be they below it; but no more than 8 in a row, since every block takes a product of its own.
    """
    return numerics.quantize_hilo(x, threshold, symmetric)


def _norm_samples(device: torch.device) -> Iterator[Sample]:
    for label, shape, dtype, mode in [
        ("rms", (5, 64), torch.float32, "rms"),
        ("rms_round_first_bf16", (2, 3, 576), torch.bfloat16, "rms_round_first"),
        ("layer_odd", (3, 123), torch.float32, "layer"),
    ]:
        x = random_tensor(*shape, device=device, dtype=dtype)
        weight = random_tensor(shape[-1], device=device, dtype=dtype, seed=1)
        bias = random_tensor(shape[-1], device=device, dtype=dtype, seed=2) if mode == "layer" else None
        yield Sample(label, (x, weight, bias, 1e-6, 0.0, mode, 3.0, mode == "rms"))


@op(samples=_norm_samples, tolerance=Tolerance(codes=1, rtol=1e-2, atol=1e-5))
def norm_quantize_hilo(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A norm of `x[..., K]` (as `norm_quantize`), then `quantize_hilo` → its five results."""
    return quantize_hilo.reference(normalize(x, weight, bias, eps, offset, mode), threshold, symmetric)


def _add_norm_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _norm_samples(device):
        x, *rest = sample.args
        residual = random_tensor(*x.shape, device=device, dtype=x.dtype, seed=3)
        yield Sample(sample.label, (x, residual, *rest))


@op(samples=_add_norm_samples, tolerance=Tolerance(codes=1, rtol=1e-2, atol=1e-5))
def add_norm_quantize_hilo(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`h = x + residual`, then `norm_quantize_hilo(h)` → h and its five results."""
    h = x + residual
    return (h, *norm_quantize_hilo.reference(h, weight, bias, eps, offset, mode, threshold, symmetric))


def _act_mul_samples(device: torch.device) -> Iterator[Sample]:
    for name in ACTIVATIONS:
        gate = random_tensor(3, 123, device=device)
        yield Sample(f"{name}-sym", (gate, random_tensor(3, 123, device=device, seed=1), name, 2.0, True))
    both = random_tensor(2, 5, 2 * 192, device=device, dtype=torch.bfloat16)
    gate, up = both.chunk(2, -1)
    yield Sample("silu-affine-strided", (gate, up, "silu", 2.0, False))


@op(samples=_act_mul_samples, tolerance=Tolerance(codes=1, rtol=1e-2, atol=1e-5))
def act_mul_quantize_hilo(
    gate: Tensor, up: Tensor, act: str, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`quantize_hilo(act(gate) * up)` of `[..., K]` → its five results. `act` is a key of `ACTIVATIONS`."""
    return quantize_hilo.reference(ACTIVATIONS[act](gate) * up, threshold, symmetric)


def _linear_samples(device: torch.device) -> Iterator[Sample]:
    for label, (m, n, k), dtype, symmetric in [
        ("decode", (2, 64, 128), torch.float32, True),
        ("prefill", (130, 96, 192), torch.bfloat16, False),
        ("odd", (17, 7, 123), torch.float32, False),
        ("tiny", (2, 2, 1), torch.float32, True),
        ("wide", (33, 320, 576), torch.float16, False),
    ]:
        x = random_tensor(m, k, device=device)
        x[m // 2, k // 2] = 70.0
        yield Sample(label, linear_arguments(x, n, dtype, symmetric, 3.0))


def linear_arguments(x: Tensor, n: int, dtype: torch.dtype, symmetric: bool, threshold: float) -> tuple[Any, ...]:
    """Of `linear_w8a8_hilo`, for `x[M, K]` and random weights `[n, K]`; zero points and bias unless symmetric."""
    low, scale, zero, high, blocks = quantize_hilo.reference(x, threshold, symmetric)
    weight, weight_scale = numerics.quantize_weight(random_tensor(n, x.shape[-1], device=x.device, seed=1))
    bias = random_tensor(n, device=x.device, dtype=dtype, seed=2)
    affine = (None, None, None) if symmetric else (zero, weight.sum(1, dtype=torch.int32), bias)
    return (low, scale, affine[0], high, blocks, weight, weight_scale, *affine[1:], dtype)


@op(samples=_linear_samples, tolerance=Tolerance(rtol=2e-5, atol=2e-5))
def linear_w8a8_hilo(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    high: Tensor,
    blocks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`y[..., N] = ((256 · high + codes - zero_point)[..., K] @ weight[N, K]ᵀ) · scale · weight_scale + bias`.

    As `linear_w8a8`: accumulated in int32 (`quantize_hilo` sees to it that the sum fits), computed in fp32 from there,
    rounded once to `dtype`. Where `blocks` has no bit, `high` counts as 0.
    """
    wide = codes.double() + 256.0 * high.double()
    acc = wide @ weight.double().t()
    if zero_point is not None:
        assert weight_sum is not None
        acc = acc - zero_point.double() * weight_sum.double()
    y = acc.float() * scale * weight_scale
    return (y if bias is None else y + bias.float()).to(dtype)


def _add_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _linear_samples(device):
        m, n, dtype = sample.args[0].shape[0], sample.args[5].shape[0], sample.args[-1]
        yield Sample(sample.label, (*sample.args, random_tensor(m, n, device=device, dtype=dtype, seed=5)))


@op(samples=_add_samples, tolerance=Tolerance(rtol=2e-5, atol=2e-5))
def linear_w8a8_hilo_add(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    high: Tensor,
    blocks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor,
) -> Tensor:
    """`linear_w8a8_hilo(…) + residual[..., N]`, rounded once to `dtype`."""
    linear = (codes, scale, zero_point, high, blocks, weight, weight_scale, weight_sum, bias)
    return (linear_w8a8_hilo.reference(*linear, torch.float32) + residual.float()).to(dtype)


def _gated_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _linear_samples(device):
        if sample.args[5].shape[0] % 2 == 0:
            yield Sample(sample.label, (*sample.args, "silu", 0.5, sample.args[2] is None))


# Three roundings to 16 bits in a row: an error of one unit in each can move a code by two, and the zero point by one.
@op(samples=_gated_samples, tolerance=Tolerance(codes=3, rtol=1e-2, atol=1e-5))
def gated_linear_quantize_hilo(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    high: Tensor,
    blocks: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    act: str,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`quantize_hilo(act(gate) * up)` with `gate, up` = the halves of `linear_w8a8_hilo(codes, …, dtype)`."""
    both = linear_w8a8_hilo.reference(
        codes, scale, zero_point, high, blocks, weight, weight_scale, weight_sum, bias, dtype
    )
    gate, up = both.chunk(2, -1)
    return quantize_hilo.reference(ACTIVATIONS[act](gate) * up, threshold, symmetric)
