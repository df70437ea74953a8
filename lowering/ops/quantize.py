"""Quantize, dequantize and outlier split of activations; dequantize of weights.

The portable form of a graph is written in `quantize_per_token`, `quantize_per_tensor`, `dequantize`,
`dequantize_weight`, `dequantize_weight_groups`, `outlier_split` and `outlier_split_dynamic`; `split_quantize` and
`split_quantize_dynamic` are their fused forms.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowering import numerics
from lowering.registry import Sample, Tolerance, op, random_tensor


def _zero_points_like(scale: Tensor) -> Tensor:
    return torch.zeros_like(scale, dtype=torch.int32)


def row_samples(device: torch.device) -> Iterator[Sample]:
    """Odd and even rows, rank 2 and 3, symmetric and affine, a zero row, a strided view."""
    for label, shape, dtype in [
        ("2d", (17, 64), torch.float32),
        ("odd", (3, 123), torch.float32),
        ("one", (1, 7), torch.float32),
        ("3d_bf16", (2, 5, 576), torch.bfloat16),
        ("wide_f16", (4, 1536), torch.float16),
    ]:
        for symmetric in (True, False):
            x = random_tensor(*shape, device=device, dtype=dtype)
            x[..., 0, :] = 0  # a row with no range
            yield Sample(f"{label}-{'sym' if symmetric else 'affine'}", (x, symmetric))
    strided = random_tensor(6, 256, device=device)[:, 64:192]
    yield Sample("strided-affine", (strided, False))
    yield Sample("expanded-sym", (random_tensor(1, 64, device=device).expand(5, 64), True))


@op(samples=row_samples, tolerance=Tolerance(codes=1, rtol=1e-6, atol=0.0))
def quantize_per_token(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One scale per row of `x[..., K]`: int8 codes `[..., K]`, fp32 scale and int32 zero point `[..., 1]`.

    `x ≈ (codes - zero_point) · scale` within scale / 2. Symmetric codes have zero point 0. A row with NaN gets a NaN
    scale, so that NaN goes through to the result.
    """
    if symmetric:
        codes, scale = numerics.quantize_symmetric(x)
        return codes, scale, _zero_points_like(scale)
    return numerics.quantize_affine(x)


def _per_tensor_samples(device: torch.device) -> Iterator[Sample]:
    for sample in row_samples(device):
        x, symmetric = sample.args
        yield Sample(f"{sample.label}-dynamic", (x, None, symmetric))
        narrow = torch.tensor([-0.75, 1.5], device=device)  # some values lie outside
        yield Sample(f"{sample.label}-static", (x, narrow, symmetric))
    yield Sample(
        "positive-static", (random_tensor(5, 96, device=device).abs(), torch.tensor([0.5, 3.0]).to(device), False)
    )
    yield Sample("no_rows", (random_tensor(0, 32, device=device), None, False))


@op(samples=_per_tensor_samples, tolerance=Tolerance(codes=1, rtol=1e-6, atol=0.0))
def quantize_per_tensor(x: Tensor, limits: Tensor | None, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One scale for all of `x[..., K]`, repeated per row: results as of `quantize_per_token`.

    `limits` [2] fp32 is a calibrated range (low, high), beyond which codes saturate (static quantization: O3 of
    SmoothQuant, arXiv 2211.10438, table 2); None takes the range of this call (O2).
    """
    if limits is not None:
        low, high = limits[0], limits[1]
    elif x.numel() == 0:  # amax over nothing is an error
        low = high = x.new_zeros((), dtype=torch.float32)
    else:
        low, high = x.float().amin(), x.float().amax()
    codes, scale, zero_point = numerics.quantize_to_range(x, low, high, symmetric)
    lead = (*x.shape[:-1], 1)
    return codes, scale.expand(lead).clone(), zero_point.expand(lead).clone()


def _dequantize_samples(device: torch.device) -> Iterator[Sample]:
    for sample in row_samples(device):
        x, symmetric = sample.args
        codes, scale, zero_point = quantize_per_token.reference(x, symmetric)
        yield Sample(sample.label, (codes, scale, None if symmetric else zero_point, x.dtype))


@op(samples=_dequantize_samples, tolerance=Tolerance(rtol=1e-6))
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`(codes[..., K] - zero_point[..., 1]) · scale[..., 1]`, computed in fp32, as `dtype`. None means zero point 0."""
    centred = codes.float() if zero_point is None else codes.float() - zero_point
    return (centred * scale).to(dtype)


def _weight_samples(device: torch.device) -> Iterator[Sample]:
    for label, (n, k), dtype in [("f32", (48, 64), torch.float32), ("odd_bf16", (7, 123), torch.bfloat16)]:
        codes, scale = numerics.quantize_weight(random_tensor(n, k, device=device))
        yield Sample(label, (codes, scale, dtype))


@op(samples=_weight_samples, tolerance=Tolerance(rtol=1e-6))
def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`codes[N, K] · scale[N, None]` as `dtype`."""
    return (codes.float() * scale.unsqueeze(-1)).to(dtype)


def _weight_group_samples(device: torch.device) -> Iterator[Sample]:
    for label, (n, k, group), dtype in [
        ("f32", (48, 128, 32), torch.float32),
        ("short_last_bf16", (7, 123, 64), torch.bfloat16),
        ("one_group", (5, 40, 256), torch.float32),
    ]:
        codes, scale = numerics.quantize_weight_groups(random_tensor(n, k, device=device), group)
        yield Sample(label, (codes, scale, group, dtype))


@op(samples=_weight_group_samples, tolerance=Tolerance(rtol=1e-6))
def dequantize_weight_groups(codes: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """`codes[N, K] · scale[N, k // group]` as `dtype`: group-wise weights (ZeroQuant, arXiv 2206.01861)."""
    spread = scale.repeat_interleave(group, 1)[:, : codes.shape[1]]
    return (codes.float() * spread).to(dtype)


def _static_split_samples(device: torch.device) -> Iterator[Sample]:
    for label, shape, dtype in [("2d", (17, 64), torch.float32), ("3d_bf16", (2, 3, 123), torch.bfloat16)]:
        columns = torch.tensor([1, 5, shape[-1] - 1], device=device)
        yield Sample(label, (random_tensor(*shape, device=device, dtype=dtype), columns))


def keep_columns(x: Tensor, kept: Tensor) -> Tensor:
    """`x[..., K]` where `kept[K]` is positive, else 0 (also for NaN and Inf: those columns are multiplied in float).

    `kept` is a float and compared here: selections by a stored bool do not vectorize on the CPU.
    """
    return torch.where(kept > 0, x, torch.zeros((), dtype=x.dtype, device=x.device))


def kept_without(x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`[K]` ones, with `values` (0 to take a column out) at `columns`."""
    return x.new_ones(x.shape[-1]).scatter(0, columns, values)


@op(samples=_static_split_samples, tolerance=Tolerance(rtol=0.0, atol=0.0))
def outlier_split(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """`x[..., K]`, `columns[R]` int64 → inliers (`x` with those columns 0) and outliers `x[..., columns]`.

    Mixed-precision decomposition of LLM.int8() (arXiv 2208.07339, section 3.2) with a set chosen in calibration.
    """
    return keep_columns(x, kept_without(x, columns, x.new_zeros(columns.shape))), x[..., columns]


def _dynamic_split_samples(device: torch.device) -> Iterator[Sample]:
    for label, shape, capacity, threshold in [
        ("top", (17, 64), 8, 0.0),
        ("threshold", (2, 9, 96), 16, 6.0),
        ("overflow", (32, 64), 2, 1.0),
        ("all", (3, 5), 8, 0.0),
        ("no_rows", (0, 32), 4, 6.0),
    ]:
        yield Sample(label, (random_tensor(*shape, device=device), capacity, threshold))


@op(samples=_dynamic_split_samples, tolerance=Tolerance(rtol=0.0, atol=0.0))
def outlier_split_dynamic(x: Tensor, capacity: int, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split by the columns of this call: `x[..., K]` → inliers, outliers `[..., R]`, columns `[R]`, overflow `[]`.

    A column is an outlier when its absmax over *all* tokens of the call exceeds `threshold` (6.0 in arXiv 2208.07339,
    section 3.2); 0 takes the largest columns whatever their size. Shapes stay static: R = min(capacity, K) columns of
    largest absmax are gathered, and those not above the threshold keep their values in `inliers` and are 0 in
    `outliers`. `overflow` (int32) counts the columns above the threshold that found no place; they stay in the int8
    part and only enlarge its scales.
    """
    width = x.shape[-1]
    if x.numel() == 0:  # no token, no outlier; amax over no rows is an error
        absmax = x.new_zeros(width)
    else:
        absmax = x.abs().reshape(-1, width).amax(0)
    values, columns = torch.topk(absmax, min(capacity, width))
    if threshold <= 0.0:
        inliers, outliers = outlier_split.reference(x, columns)
        return inliers, outliers, columns, torch.zeros((), dtype=torch.int32, device=x.device)
    taken = values > threshold
    outliers = torch.where(taken, x[..., columns], torch.zeros((), dtype=x.dtype, device=x.device))
    overflow = ((absmax > threshold).sum() - taken.sum()).to(torch.int32)
    return keep_columns(x, kept_without(x, columns, (~taken).to(x.dtype))), outliers, columns, overflow


def _split_quantize_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _static_split_samples(device):
        for symmetric in (True, False):
            yield Sample(f"{sample.label}-{'sym' if symmetric else 'affine'}", (*sample.args, symmetric))


@op(samples=_split_quantize_samples, tolerance=Tolerance(codes=1, rtol=1e-6, atol=0.0))
def split_quantize(x: Tensor, columns: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`outlier_split` then `quantize_per_token` of the inliers → codes, scale, zero point, outliers."""
    inliers, outliers = outlier_split.reference(x, columns)
    return (*quantize_per_token.reference(inliers, symmetric), outliers)


def _split_quantize_dynamic_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _dynamic_split_samples(device):
        yield Sample(f"{sample.label}-affine", (*sample.args, False))


@op(samples=_split_quantize_dynamic_samples, tolerance=Tolerance(codes=1, rtol=1e-6, atol=0.0))
def split_quantize_dynamic(
    x: Tensor, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`outlier_split_dynamic` then `quantize_per_token` → codes, scale, zero point, outliers, columns, overflow."""
    inliers, outliers, columns, overflow = outlier_split_dynamic.reference(x, capacity, threshold)
    return (*quantize_per_token.reference(inliers, symmetric), outliers, columns, overflow)
