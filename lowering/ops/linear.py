"""Linear layers on int8 weights `[N, K]`: int8 activations (W8A8, with outliers) and float activations (W8A16)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowering import numerics
from lowering.registry import Sample, Tolerance, op, random_tensor


def w8a8_samples(device: torch.device) -> Iterator[Sample]:
    """Decode and prefill rows, odd sizes, bias, zero points, float and int8 outlier columns, all output dtypes."""
    for label, (m, n, k), dtype in [
        ("decode", (1, 64, 128), torch.float32),
        ("prefill", (130, 96, 192), torch.bfloat16),
        ("odd", (17, 7, 123), torch.float32),
        ("tiny", (2, 1, 1), torch.float32),
        ("wide", (33, 320, 576), torch.float16),
    ]:
        x = random_tensor(m, k, device=device)
        w = random_tensor(n, k, device=device, seed=1)
        weight, weight_scale = numerics.quantize_weight(w)
        weight_sum = weight.sum(1, dtype=torch.int32)
        bias = random_tensor(n, device=device, seed=2).to(dtype)
        codes, scale = numerics.quantize_symmetric(x)
        yield Sample(f"{label}-sym", (codes, scale, None, weight, weight_scale, None, None, None, None, None, dtype))
        acodes, ascale, zero = numerics.quantize_affine(x)
        affine = (acodes, ascale, zero, weight, weight_scale, weight_sum, bias)
        yield Sample(f"{label}-affine-bias", (*affine, None, None, None, dtype))
        if k < 8:
            continue
        columns = torch.tensor([0, 1, 5], device=device)
        outliers = x[:, columns].to(dtype)
        yield Sample(f"{label}-float-outliers", (*affine, outliers, w[:, columns].to(dtype).contiguous(), None, dtype))
        yield Sample(f"{label}-int8-outliers", (*affine, outliers, None, columns, dtype))
    codes3 = random_tensor(2, 3, 64, device=device).clamp(-3, 3).mul(40).to(torch.int8)
    scale3 = torch.full((2, 3, 1), 0.01, device=device)
    weight, weight_scale = numerics.quantize_weight(random_tensor(16, 64, device=device))
    yield Sample("rank3", (codes3, scale3, None, weight, weight_scale, None, None, None, None, None, torch.float32))


@op(samples=w8a8_samples, tolerance=Tolerance(rtol=2e-5, atol=2e-5))
def linear_w8a8(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    outliers: Tensor | None,
    outlier_weight: Tensor | None,
    columns: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`y[..., N] = ((codes - zero_point)[..., K] @ weight[N, K]ᵀ) · scale · weight_scale + bias + outlier part`.

    The product accumulates in int32; the zero point is corrected exactly there by the int32
    `weight_sum[N] = Σ_k weight[n, k]`. The outlier part is `outliers[..., R] @ outlier_weight[N, R]ᵀ` with
    float weights, or with the int8 `columns[R]` of `weight` itself, under its scale, as in LLM.int8() (arXiv
    2208.07339, equation 8). Computed in fp32, rounded once to `dtype`.
    """
    # float64 holds every int32 sum exactly, and unlike an int32 matmul it exists on every device.
    acc = codes.double() @ weight.double().t()
    if zero_point is not None:
        assert weight_sum is not None
        acc = acc - zero_point.double() * weight_sum.double()
    y = acc.float() * scale * weight_scale
    if outliers is not None:
        wide = outliers.float()
        if columns is not None:
            y = y + (wide @ weight[:, columns].float().t()) * weight_scale
        else:
            assert outlier_weight is not None
            y = y + wide @ outlier_weight.float().t()
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def _add_samples(device: torch.device) -> Iterator[Sample]:
    for sample in w8a8_samples(device):
        codes, *_, weight, _, _, _, _, _, _, dtype = sample.args
        residual = random_tensor(*codes.shape[:-1], weight.shape[0], device=device, dtype=dtype, seed=5)
        yield Sample(sample.label, (*sample.args, residual))


@op(samples=_add_samples, tolerance=Tolerance(rtol=2e-5, atol=2e-5))
def linear_w8a8_add(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    outliers: Tensor | None,
    outlier_weight: Tensor | None,
    columns: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor,
) -> Tensor:
    """`linear_w8a8(…) + residual[..., N]`, rounded once to `dtype`."""
    linear = (codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns)
    return (linear_w8a8.reference(*linear, torch.float32) + residual.float()).to(dtype)


def w8a16_samples(device: torch.device) -> Iterator[Sample]:
    """One row and many, odd sizes, with and without bias."""
    for label, (m, n, k), dtype in [
        ("decode", (1, 64, 128), torch.float32),
        ("decode_bf16", (1, 96, 576), torch.bfloat16),
        ("prefill_bf16", (33, 64, 192), torch.bfloat16),
        ("decode_odd_bf16", (1, 7, 123), torch.bfloat16),
        ("decode_tiny", (1, 1, 1), torch.float32),
        ("decode_f16", (1, 33, 96), torch.float16),
        ("odd", (3, 7, 123), torch.float32),
        ("tiny", (2, 1, 1), torch.float16),
    ]:
        x = random_tensor(m, k, device=device, dtype=dtype)
        weight, weight_scale = numerics.quantize_weight(random_tensor(n, k, device=device, seed=1))
        yield Sample(label, (x, weight, weight_scale, None))
        yield Sample(f"{label}-bias", (x[None], weight, weight_scale, random_tensor(n, device=device).to(dtype)))


@op(samples=w8a16_samples, tolerance=Tolerance(rtol=2e-5, atol=2e-5))
def linear_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Weight-only int8: `y[..., N] = (x[..., K] @ weight[N, K]ᵀ) · weight_scale[N] + bias`, in fp32, as `x.dtype`."""
    return _weight_only(x, weight, weight_scale, bias).to(x.dtype)


def _weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    y = (x.float() @ weight.float().t()) * weight_scale
    return y if bias is None else y + bias.float()


def _w8a16_add_samples(device: torch.device) -> Iterator[Sample]:
    for sample in w8a16_samples(device):
        x, weight, *_ = sample.args
        residual = random_tensor(*x.shape[:-1], weight.shape[0], device=device, dtype=x.dtype, seed=5)
        yield Sample(sample.label, (*sample.args, residual))


@op(samples=_w8a16_add_samples, tolerance=Tolerance(rtol=2e-5, atol=2e-5))
def linear_w8a16_add(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`linear_w8a16(…) + residual[..., N]`, rounded once to `x.dtype`."""
    return (_weight_only(x, weight, weight_scale, bias) + residual.float()).to(x.dtype)


def w8a8_group_samples(device: torch.device) -> Iterator[Sample]:
    """Group sizes from 32 to 256, a last group cut short, zero points, float outlier columns, all output dtypes."""
    for label, (m, n, k, group), dtype in [
        ("decode", (1, 64, 128, 32), torch.float32),
        ("prefill", (130, 96, 192, 64), torch.bfloat16),
        ("short_last", (17, 7, 123, 32), torch.float32),
        ("one_group", (3, 5, 64, 256), torch.float32),
        ("wide", (33, 80, 576, 128), torch.float16),
    ]:
        x = random_tensor(m, k, device=device)
        w = random_tensor(n, k, device=device, seed=1)
        weight, weight_scale = numerics.quantize_weight_groups(w, group)
        codes, scale = numerics.quantize_symmetric(x)
        yield Sample(f"{label}-sym", (codes, scale, None, weight, weight_scale, group, None, None, None, dtype))
        acodes, ascale, zero = numerics.quantize_affine(x)
        affine = (acodes, ascale, zero, weight, weight_scale, group, random_tensor(n, device=device, seed=2).to(dtype))
        yield Sample(f"{label}-affine-bias", (*affine, None, None, dtype))
        columns = torch.tensor([0, 1, 5], device=device)
        outlier_weight = w[:, columns].to(dtype).contiguous()
        yield Sample(f"{label}-outliers", (*affine, x[:, columns].to(dtype), outlier_weight, dtype))


@op(samples=w8a8_group_samples, tolerance=Tolerance(rtol=2e-5, atol=2e-5))
def linear_w8a8_groups(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    group: int,
    bias: Tensor | None,
    outliers: Tensor | None,
    outlier_weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`linear_w8a8` with one weight scale per `group` adjacent columns: `weight_scale[N, ceil(K / group)]`.

    Every group's product accumulates in int32, zero point included (it is taken off the codes, which makes them 9 bits
    wide); its scale is applied to the sum, and the groups add up in fp32. Outlier weights are floats `[N, R]`.
    """
    n, k = weight.shape
    centred = codes.double() if zero_point is None else codes.double() - zero_point.double()
    y = torch.zeros((*codes.shape[:-1], n), dtype=torch.float32, device=codes.device)
    for index, start in enumerate(range(0, k, group)):
        part = slice(start, start + group)
        y = y + (centred[..., part] @ weight[:, part].double().t()).float() * weight_scale[:, index]
    y = y * scale
    if outliers is not None:
        assert outlier_weight is not None
        y = y + outliers.float() @ outlier_weight.float().t()
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)
