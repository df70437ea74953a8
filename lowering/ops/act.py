"""Activation products (gated MLPs) fused with the quantization of their result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lowering.ops.linear import linear_w8a8, w8a8_samples
from lowering.ops.norm import quantize_rows
from lowering.ops.quantize import split_quantize_dynamic
from lowering.registry import Sample, Tolerance, op, random_tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def _act_mul_samples(device: torch.device) -> Iterator[Sample]:
    for name in ACTIVATIONS:
        gate = random_tensor(3, 123, device=device)
        yield Sample(f"{name}-sym", (gate, random_tensor(3, 123, device=device, seed=1), name, None, True))
    both = random_tensor(2, 5, 2 * 192, device=device, dtype=torch.bfloat16)
    gate, up = both.chunk(2, -1)  # views with a row stride of 2K: what a merged gate/up linear gives
    columns = torch.tensor([1, 7], device=device)
    yield Sample("silu-affine-split-strided", (gate, up, "silu", columns, False))


@op(samples=_act_mul_samples, tolerance=Tolerance(codes=1, rtol=1e-2, atol=1e-5))
def act_mul_quantize(
    gate: Tensor, up: Tensor, act: str, columns: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize(act(gate) * up)` of `[..., K]` → codes, scale, zero point, outliers `[..., R]`.

    `act` is a key of `ACTIVATIONS`. Without `columns`, R = 0.
    """
    return quantize_rows(ACTIVATIONS[act](gate) * up, columns, symmetric)


def _act_mul_dynamic_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _act_mul_samples(device):
        gate, up, act, _, symmetric = sample.args
        yield Sample(sample.label, (gate, up, act, 4, 0.0 if symmetric else 1.5, symmetric))


@op(samples=_act_mul_dynamic_samples, tolerance=Tolerance(codes=1, rtol=1e-2, atol=1e-5))
def act_mul_quantize_dynamic(
    gate: Tensor, up: Tensor, act: str, capacity: int, threshold: float, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`split_quantize_dynamic(act(gate) * up)` → codes, scale, zero point, outliers, columns, overflow."""
    product = ACTIVATIONS[act](gate) * up
    return split_quantize_dynamic.reference(product, capacity, threshold, symmetric)


def _gated_linear_samples(device: torch.device) -> Iterator[Sample]:
    for sample in w8a8_samples(device):
        if sample.args[3].shape[0] % 2 == 0:
            columns = torch.tensor([1, 5], device=device) if "affine" in sample.label else None
            yield Sample(sample.label, (*sample.args, "silu", columns, columns is None))


def gated_linear(
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
    act: str,
) -> Tensor:
    """`act(gate) * up` with `gate, up` = the halves of `linear_w8a8(codes, …, dtype)`, `[..., N]` → `[..., N/2]`."""
    both = linear_w8a8.reference(
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype
    )
    gate, up = both.chunk(2, -1)
    return ACTIVATIONS[act](gate) * up


# Three roundings to 16 bits in a row: an error of one unit in each can move a code by two, and the zero point by one.
@op(samples=_gated_linear_samples, tolerance=Tolerance(codes=3, rtol=1e-2, atol=1e-5))
def gated_linear_quantize(
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
    act: str,
    split_columns: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize(gated_linear(…))` without the columns `split_columns` → codes, scale, zero point, outliers."""
    product = gated_linear(
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype, act
    )
    return quantize_rows(product, split_columns, symmetric)


def _gated_linear_dynamic_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _gated_linear_samples(device):
        *linear, act, columns, symmetric = sample.args
        yield Sample(sample.label, (*linear, act, 4, 0.0 if columns is None else 0.1, symmetric))


# Three roundings to 16 bits in a row: an error of one unit in each can move a code by two, and the zero point by one.
@op(samples=_gated_linear_dynamic_samples, tolerance=Tolerance(codes=3, rtol=1e-2, atol=1e-5))
def gated_linear_quantize_dynamic(
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
    act: str,
    capacity: int,
    threshold: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`split_quantize_dynamic(gated_linear(…))` → codes, scale, zero point, outliers, columns, overflow."""
    product = gated_linear(
        codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype, act
    )
    return split_quantize_dynamic.reference(product, capacity, threshold, symmetric)
