"""Normalizations: RMSNorm in all its cast orders, and norms fused with the residual add and the quantization."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lowering.ops.quantize import quantize_per_token, split_quantize, split_quantize_dynamic
from lowering.registry import Sample, Tolerance, op, random_tensor


def _rms_samples(device: torch.device) -> Iterator[Sample]:
    for label, shape, dtype, offset, round_first in [
        ("f32", (5, 64), torch.float32, 0.0, True),
        ("bf16-round-first", (2, 3, 576), torch.bfloat16, 0.0, True),
        ("bf16-offset", (2, 3, 123), torch.bfloat16, 1.0, False),
        ("f16", (4, 96), torch.float16, 0.0, False),
    ]:
        x = random_tensor(*shape, device=device, dtype=dtype)
        weight = random_tensor(shape[-1], device=device, dtype=dtype, seed=1)
        yield Sample(label, (x, weight, 1e-6, offset, round_first))
    yield Sample("no-weight", (random_tensor(3, 64, device=device), None, 1e-6, 0.0, False))


@op(samples=_rms_samples, tolerance=Tolerance(rtol=2e-5, atol=2e-5))
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · (weight + offset)` over the last axis, normalized in fp32 (arXiv 1910.07467).

    Models differ in where gamma meets the cast, and bf16 shows it. `round_first` casts the normalized value to
    `x.dtype` and multiplies there (Llama); else gamma multiplies in fp32 and the product is cast (`aten.rms_norm`).
    """
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normalized.to(x.dtype)
    if round_first:
        return normalized.to(x.dtype) * (weight + offset if offset else weight)
    return (normalized * (weight.float() + offset)).to(x.dtype)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, mode: str) -> Tensor:
    if mode == "layer":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return rms_norm.reference(x, weight, eps, offset, mode == "rms_round_first")


def _norm_quantize_samples(device: torch.device) -> Iterator[Sample]:
    for label, shape, dtype, mode in [
        ("rms", (5, 64), torch.float32, "rms"),
        ("rms_round_first_bf16", (2, 3, 576), torch.bfloat16, "rms_round_first"),
        ("layer_odd", (3, 123), torch.float32, "layer"),
        ("layer_f16", (17, 192), torch.float16, "layer"),
    ]:
        x = random_tensor(*shape, device=device, dtype=dtype)
        weight = random_tensor(shape[-1], device=device, dtype=dtype, seed=1)
        bias = random_tensor(shape[-1], device=device, dtype=dtype, seed=2) if mode == "layer" else None
        columns = torch.tensor([1, 4, 9], device=device)
        offset = 1.0 if mode == "rms" else 0.0
        yield Sample(f"{label}-sym", (x, weight, bias, 1e-5, offset, mode, None, True))
        yield Sample(f"{label}-affine-split", (x, weight, bias, 1e-5, offset, mode, columns, False))


def quantize_rows(y: Tensor, columns: Tensor | None, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if columns is None:
        return (*quantize_per_token.reference(y, symmetric), y.new_empty((*y.shape[:-1], 0)))
    return split_quantize.reference(y, columns, symmetric)


# bf16 and fp16 references round the norm before quantizing: one code of difference is a rounding tie, not an error.
@op(samples=_norm_quantize_samples, tolerance=Tolerance(codes=1, rtol=1e-2, atol=1e-5))
def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    columns: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A norm of `x[..., K]` quantized in the same pass → codes, scale, zero point, outliers `[..., R]`.

    `mode` is "layer" (LayerNorm), "rms" or "rms_round_first" (see `rms_norm`). Without `columns`, R = 0.
    """
    return quantize_rows(normalize(x, weight, bias, eps, offset, mode), columns, symmetric)


def _add_norm_quantize_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _norm_quantize_samples(device):
        x = sample.args[0]
        residual = random_tensor(*x.shape, device=device, dtype=x.dtype, seed=3)
        yield Sample(sample.label, (x, residual, *sample.args[1:]))


@op(samples=_add_norm_quantize_samples, tolerance=Tolerance(codes=1, rtol=1e-2, atol=1e-5))
def add_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    columns: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`h = x + residual`, then `norm_quantize(h)` → h, codes, scale, zero point, outliers."""
    h = x + residual
    return (h, *norm_quantize.reference(h, weight, bias, eps, offset, mode, columns, symmetric))


def _norm_quantize_dynamic_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _norm_quantize_samples(device):
        *norm, columns, symmetric = sample.args
        search = (8, 0.0) if columns is None else (4, 1.5)
        yield Sample(sample.label, (*norm, *search, symmetric))


@op(samples=_norm_quantize_dynamic_samples, tolerance=Tolerance(codes=1, rtol=1e-2, atol=1e-5))
def norm_quantize_dynamic(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    capacity: int,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A norm of `x[..., K]`, then `split_quantize_dynamic` → codes, scale, zero point, outliers, columns, overflow."""
    y = normalize(x, weight, bias, eps, offset, mode)
    return split_quantize_dynamic.reference(y, capacity, threshold, symmetric)


def _add_norm_quantize_dynamic_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _norm_quantize_dynamic_samples(device):
        x = sample.args[0]
        residual = random_tensor(*x.shape, device=device, dtype=x.dtype, seed=3)
        yield Sample(sample.label, (x, residual, *sample.args[1:]))


@op(samples=_add_norm_quantize_dynamic_samples, tolerance=Tolerance(codes=1, rtol=1e-2, atol=1e-5))
def add_norm_quantize_dynamic(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    capacity: int,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`h = x + residual`, then `norm_quantize_dynamic(h)` → h and its six results."""
    h = x + residual
    rest = norm_quantize_dynamic.reference(h, weight, bias, eps, offset, mode, capacity, threshold, symmetric)
    return (h, *rest)
