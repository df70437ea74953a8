"""What the kernel tests and the GPU benchmark share: how results are compared, and shapes no sample has.

A norm of the difference, not an element-wise bound: where a sum cancels, one element says nothing about the kernel.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import attention_samples
import hilo_samples
import torch
from torch import Tensor

from lowering import numerics, ops  # noqa: F401  (declares the ops)
from lowering.ops.act import ACTIVATIONS
from lowering.ops.linear import linear_w8a8
from lowering.ops.norm import normalize
from lowering.ops.quantize import split_quantize
from lowering.registry import Op, Sample, Tolerance, random_tensor


def compare(got: Any, expected: Any, tolerance: Tolerance) -> float:
    """Largest error found: of floats relative to the norm, of codes in steps. AssertionError beyond the tolerance."""
    results, references = (r if isinstance(r, tuple) else (r,) for r in (got, expected))
    assert len(results) == len(references), f"{len(results)} results, the reference has {len(references)}"
    worst = 0.0
    for i, (result, reference) in enumerate(zip(results, references, strict=True)):
        where = f"result {i}"
        assert result.dtype == reference.dtype, f"{where}: {result.dtype}, the reference has {reference.dtype}"
        assert result.shape == reference.shape, f"{where}: {result.shape}, the reference has {reference.shape}"
        if reference.numel() == 0:
            continue
        if reference.dtype.is_floating_point:
            error = _float_error(result, reference, where)
            limit = max(tolerance.rtol, 2 * torch.finfo(reference.dtype).eps)
            small = torch.linalg.vector_norm(_finite(result) - _finite(reference)) <= tolerance.atol
            assert error <= limit or small, f"{where}: relative error {error:.3g}, allowed {limit:.3g}"
        else:
            difference = (result.long() - reference.long()).abs()
            # Codes of a row without a finite scale mean nothing: the scale carries the NaN or infinity.
            if reference.dtype == torch.int8:
                difference = difference * references[i + 1].isfinite()
            elif reference.dtype == torch.int32 and reference.dim() > 0:
                difference = difference * references[i - 1].isfinite()
            error = float(difference.max())
            limit = tolerance.codes if reference.dtype in (torch.int8, torch.int32) and reference.dim() > 0 else 0
            assert error <= limit, f"{where}: codes differ by {error:.0f}, allowed {limit}"
        worst = max(worst, error)
    return worst


def verify(op: Op, args: tuple[Any, ...], got: Any) -> float:
    """`compare` with the op's reference. Columns found per call may come in any order, and equal ones may swap."""
    if op.name.endswith("_hilo") and op.name != "linear_w8a8_hilo":
        return _verify_hilo(op, args, got)
    if op.name == "outlier_split_dynamic" or not op.name.endswith("_dynamic"):
        return compare(got, op.reference(*args), op.tolerance)
    *lead, codes, scale, zero_point, outliers, columns, overflow = got
    capacity, threshold, symmetric = args[-3:]
    y = _split_input(op.name, args)
    expected = op.reference(*args)
    taken = (outliers != 0).reshape(-1, len(columns)).any(0)  # a place without outliers may name any column
    chosen = columns[taken]
    assert len(chosen.unique()) == len(chosen) <= capacity, "a column twice"
    error = compare(
        (*lead, codes, scale, zero_point, outliers[..., taken]),
        (*expected[: len(lead)], *split_quantize.reference(y, chosen, symmetric)),
        op.tolerance,
    )
    assert torch.equal(overflow, expected[-1]), f"overflow {overflow}, the reference has {expected[-1]}"
    absmax = y.abs().reshape(-1, y.shape[-1]).amax(0) if y.numel() else y.new_zeros(y.shape[-1])
    best = torch.topk(absmax, len(columns)).values
    best = best[(best != 0) & ~(best <= threshold)] if threshold == 0 else best[best > threshold]
    order = absmax[chosen].sort(descending=True).values
    assert len(order) == len(best), f"{len(order)} columns, the reference has {len(best)}"
    torch.testing.assert_close(order, best, rtol=1e-2, atol=0.0, equal_nan=True)
    return error


def _verify_hilo(op: Op, args: tuple[Any, ...], got: Any) -> float:
    """Both halves are one code: a step over the border of two low halves moves both. Blocks are those of the result."""

    high, blocks = got[-2:]
    expected = op.reference(*args)
    finite = expected[-4].isfinite()
    assert (blocks.dtype, blocks.shape) == (torch.int32, expected[-1].shape)
    # A code more or less can move a value over the threshold only where it comes from a linear.
    same = op.tolerance.codes > 1 or torch.equal(blocks * finite, expected[-1] * finite)
    assert same, "other blocks than the reference's"
    codes, wanted = (r[-5].int() + 256 * r[-2].int() for r in (got, expected))
    # A code of 16 bits has more of them than what it stands for: there an error of the value is many steps.
    allowed = op.tolerance.codes + (op.tolerance.rtol * wanted.abs()).int()
    beyond = ((codes - wanted).abs() - allowed) * finite
    assert not codes.numel() or int(beyond.max()) <= 0, f"codes differ by {int(beyond.max())} more than allowed"
    assert not high[~numerics.in_blocks(blocks, high.shape[-1])].any(), "a high half in a block without outliers"
    return compare((*got[:-5], *got[-4:-2]), (*expected[:-5], *expected[-4:-2]), op.tolerance)


def _split_input(name: str, args: tuple[Any, ...]) -> Tensor:
    """What a `…_dynamic` op splits."""
    if name == "split_quantize_dynamic":
        return args[0]
    if name == "act_mul_quantize_dynamic":
        return ACTIVATIONS[args[2]](args[0]) * args[1]
    if name == "gated_linear_quantize_dynamic":
        gate, up = linear_w8a8.reference(*args[:11]).chunk(2, -1)
        return ACTIVATIONS[args[11]](gate) * up
    if name == "norm_quantize_dynamic":
        return normalize(*args[:6])
    return normalize(args[0] + args[1], *args[2:7])


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0).double()


def _float_error(result: Tensor, reference: Tensor, where: str) -> float:
    assert torch.equal(result.isnan(), reference.isnan()), f"{where}: NaN in other places than in the reference"
    infinite = reference.isinf()
    assert torch.equal(result.isinf(), infinite), f"{where}: infinities in other places than in the reference"
    assert torch.equal(result[infinite], reference[infinite]), f"{where}: infinities of another sign"
    difference = float(torch.linalg.vector_norm(_finite(result) - _finite(reference)))
    size = float(torch.linalg.vector_norm(_finite(reference)))
    return difference / size if size > 0 else (0.0 if difference == 0 else math.inf)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors start as NaN, or as the largest integer, so that an element nobody writes is found."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().item()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and values beyond the samples


def _rows(device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Activations `[..., K]`: odd sizes, views of every kind, values without a range, no rows at all."""
    for m, k in [(1, 1), (1, 123), (17, 7), (3, 1), (123, 3)]:
        yield f"{m}x{k}", random_tensor(m, k, device=device)
    yield "bf16_7x123", random_tensor(7, 123, device=device, dtype=torch.bfloat16)
    yield "transposed", random_tensor(40, 9, device=device).t()
    yield "every_other", random_tensor(5, 80, device=device)[:, ::2]
    yield "expanded_rows", random_tensor(1, 48, device=device).expand(4, 48)
    yield "expanded_columns", random_tensor(5, 1, device=device).expand(5, 48)
    yield "permuted", random_tensor(3, 4, 2, 24, device=device).permute(2, 0, 1, 3)
    yield "vector", random_tensor(2, 33, device=device)[1]
    yield "no_rows", random_tensor(0, 48, device=device)
    yield "no_batch", random_tensor(0, 3, 48, device=device, dtype=torch.bfloat16)
    special = random_tensor(8, 40, device=device)
    special[1] = 0.0
    special[2, 7] = math.nan
    special[3, 5] = math.inf
    special[4, 6] = -math.inf
    special[5, 3] = -math.nan
    special[6] = 1e-38
    special[7] = special[7].abs()
    yield "special", special
    yield "huge", random_tensor(3, 40, device=device) * 1e37
    # More rows than programs choose columns for on their own.
    yield "many_rows", random_tensor(150, 96, device=device, dtype=torch.bfloat16)
    # Longer than a kernel holds in registers, and not a multiple of its pieces.
    yield "long_row", random_tensor(2, 16500, device=device, dtype=torch.bfloat16)


def _columns(x: Tensor) -> Tensor:
    return torch.tensor(sorted({0, x.shape[-1] // 2, x.shape[-1] - 1}), device=x.device)


def _row_op_samples(name: str, label: str, x: Tensor, index: int) -> Iterator[Sample]:
    symmetric = index % 2 == 0
    weight = random_tensor(x.shape[-1], device=x.device, dtype=x.dtype, seed=1)
    other = random_tensor(*x.shape, device=x.device, dtype=x.dtype, seed=3)
    columns = None if index % 3 == 0 else _columns(x)
    mode = ("rms", "rms_round_first", "layer")[index % 3]
    if name == "quantize_per_token":
        yield Sample(f"{label}-sym", (x, True))
        yield Sample(f"{label}-affine", (x, False))
    elif name == "quantize_per_tensor":
        if x.isfinite().all():  # a range taken from NaN or Inf says nothing of the codes; scales are compared elsewhere
            yield Sample(f"{label}-dynamic", (x, None, symmetric))
            yield Sample(f"{label}-static", (x, torch.tensor([-0.5, 3.0], device=x.device), not symmetric))
        else:
            yield Sample(f"{label}-dynamic", (x, None, True))
    elif name == "split_quantize":
        yield Sample(label, (x, _columns(x), symmetric))
        if label == "17x7":
            yield Sample("no_columns", (x, _columns(x)[:0], symmetric))
    elif name == "split_quantize_dynamic":
        yield Sample(label, (x, 4, 2.0 if index % 2 else 0.0, symmetric))
    elif name == "rms_norm":
        yield Sample(label, (x, weight, 1e-6, float(symmetric), index % 3 == 0))
    elif name == "norm_quantize":
        bias = weight.flip(0) if mode == "layer" else None
        yield Sample(f"{label}-{mode}", (x, weight, bias, 1e-5, 0.5, mode, columns, symmetric))
        if label == "17x7":
            yield Sample("layer-no_weight", (x, None, None, 1e-5, 0.0, "layer", columns, symmetric))
            wide = weight.float()
            half = x.to(torch.bfloat16)
            yield Sample("fp32_weight", (half, wide, None, 1e-5, 0.0, "rms_round_first", _columns(x), symmetric))
    elif name == "add_norm_quantize":
        yield Sample(f"{label}-{mode}", (x, other, weight, None, 1e-5, 0.0, mode, columns, symmetric))
    elif name == "norm_quantize_dynamic":
        bias = weight.flip(0) if mode == "layer" else None
        yield Sample(f"{label}-{mode}", (x, weight, bias, 1e-5, 0.5, mode, 4, 1.0 if index % 2 else 0.0, symmetric))
    elif name == "add_norm_quantize_dynamic":
        search = (4, 1.0 if index % 2 else 0.0)
        yield Sample(f"{label}-{mode}", (x, other, weight, None, 1e-5, 0.0, mode, *search, symmetric))
    elif name == "act_mul_quantize_dynamic":
        act = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")[index % 5]
        yield Sample(f"{label}-{act}", (x, other, act, 4, 1.0 if index % 2 else 0.0, symmetric))
    elif name == "quantize_hilo":
        yield Sample(label, (x, 2.0, symmetric))
    elif name == "norm_quantize_hilo":
        bias = weight.flip(0) if mode == "layer" else None
        yield Sample(f"{label}-{mode}", (x, weight, bias, 1e-5, 0.5, mode, 1.5, symmetric))
    elif name == "add_norm_quantize_hilo":
        yield Sample(f"{label}-{mode}", (x, other, weight, None, 1e-5, 0.0, mode, 1.5, symmetric))
    elif name == "act_mul_quantize_hilo":
        act = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")[index % 5]
        yield Sample(f"{label}-{act}", (x, other, act, 1.0, symmetric))
    elif name == "act_mul_quantize":
        act = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")[index % 5]
        yield Sample(f"{label}-{act}", (x, other, act, columns, symmetric))


def _w8a8_samples(device: torch.device) -> Iterator[Sample]:
    index = 0
    for m in (0, 1, 17, 123):
        # Of one row steps are loaded ahead, more where K is deep.
        several = [(40, 2048), (7, 2049), (5, 8320)] if m == 1 else []
        for n, k in [(1, 7), (7, 123), (123, 1), (123, 123), (40, 96), *several]:
            dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
            codes, scale, zero = numerics.quantize_affine(random_tensor(m, k, device=device))
            w = random_tensor(n, k, device=device, seed=1)
            weight, weight_scale = numerics.quantize_weight(w)
            columns = torch.arange(0, k, 3, device=device)
            outliers = random_tensor(m, len(columns), device=device, dtype=dtype, seed=4)
            part = (None, columns) if index % 2 else (w[:, columns].to(dtype), None)
            affine = (codes, scale, zero, weight, weight_scale, weight.sum(1, dtype=torch.int32), None)
            yield Sample(f"{m}x{n}x{k}", (*affine, outliers, *part, dtype))
            index += 1
    k, n, dtype = 96, 24, torch.float32
    x = random_tensor(5, k, device=device)
    codes, scale = numerics.quantize_symmetric(x)
    weight, weight_scale = numerics.quantize_weight(random_tensor(n, k, device=device, seed=1))
    none = (None,) * 5
    yield Sample("column_major", (codes.t().contiguous().t(), scale, None, weight, weight_scale, *none, dtype))
    yield Sample("strided_rows", (codes[::2], scale[::2], None, weight, weight_scale, *none, dtype))
    yield Sample("column_major_weight", (codes, scale, None, weight.t().contiguous().t(), weight_scale, *none, dtype))
    yield Sample("sliced_weight", (codes[:, :48], scale, None, weight[:, 48:], weight_scale, *none, dtype))
    one = scale[:1].expand(5, 1)
    yield Sample("expanded", (codes[:1].expand(5, k), one, None, weight, weight_scale[:1].expand(n), *none, dtype))
    scale = scale.clone()
    scale[1], scale[2] = math.nan, math.inf
    yield Sample("nan_scale", (codes, scale, None, weight, weight_scale, *none, dtype))
    wide = random_tensor(5, 40, device=device, dtype=torch.bfloat16)
    mixed = random_tensor(n, 40, device=device, seed=3)
    plain = (codes, scale[:1].expand(5, 1), None, weight, weight_scale, None, None)
    yield Sample("mixed_outliers", (*plain, wide, mixed, None, dtype))
    yield Sample("no_outliers", (codes, one, *plain[2:], wide[:, :0], mixed[:, :0], None, dtype))


def _large_samples(device: torch.device) -> Iterator[Sample]:
    """For the Gluon kernels: enough tiles for the persistent one, few rows for the other, ragged in every dimension."""
    for label, (m, n, k), r, code_columns in [
        ("even", (2048, 4096, 512), 0, False),
        ("ragged", (1999, 4640, 528), 0, False),
        ("float_outliers", (1999, 4640, 528), 24, False),
        ("code_outliers", (2100, 4128, 1040), 64, True),
        ("shallow", (4100, 2080, 16), 8, False),
        ("few-even", (64, 4096, 4096), 0, False),
        ("few-ragged", (17, 4640, 528), 0, False),
        ("few-float_outliers", (33, 6160, 1040), 24, False),
        ("few-code_outliers", (64, 27664, 528), 64, True),  # three pieces, and less for the last program
        ("few-shallow", (20, 2080, 16), 8, False),
        ("few-half", (32, 6160, 1040), 24, False),
        ("few-one", (1, 4112, 1040), 24, False),
        ("few-nine", (9, 4640, 528), 64, True),
        ("few-two_pieces", (41, 27664, 1040), 64, True),  # of rows
        ("few-turns", (5, 64016, 528), 24, False),  # more programs than multiprocessors
    ]:
        codes, scale, zero = numerics.quantize_affine(random_tensor(m, k, device=device))
        w = random_tensor(n, k, device=device, seed=1)
        weight, weight_scale = numerics.quantize_weight(w)
        sums, bias = weight.sum(1, dtype=torch.int32), random_tensor(n, device=device, dtype=torch.bfloat16, seed=2)
        if label.endswith("ragged"):
            sums, bias = (torch.stack([value, value + 9], 1)[:, 0] for value in (sums, bias))
        affine = (zero, sums, bias) if r or label.endswith("ragged") else (None, None, None)
        columns = torch.arange(r, device=device) * (k // max(r, 1))
        outliers = random_tensor(m, r, device=device, dtype=torch.bfloat16, seed=4) if r else None
        right = w[:, columns].bfloat16().contiguous() if r and not code_columns else None
        part = (outliers, right, columns if code_columns else None)
        yield Sample(label, (codes, scale, affine[0], weight, weight_scale, *affine[1:], *part, torch.bfloat16))


def _w8a8_group_samples(device: torch.device) -> Iterator[Sample]:
    for m in (0, 1, 123):
        for n, k, group in [(1, 7, 32), (7, 300, 256), (40, 96, 48)]:
            codes, scale, zero = numerics.quantize_affine(random_tensor(m, k, device=device))
            weight, weight_scale = numerics.quantize_weight_groups(random_tensor(n, k, device=device, seed=1), group)
            none = (None, None, None, torch.float32)
            yield Sample(f"{m}x{n}x{k}-{group}", (codes, scale, zero, weight, weight_scale, group, *none))
    x = random_tensor(6, 96, device=device)
    codes, scale = numerics.quantize_symmetric(x)
    weight, weight_scale = numerics.quantize_weight_groups(random_tensor(24, 96, device=device, seed=1), 32)
    rest = (weight, weight_scale, 32, None, None, None, torch.bfloat16)
    yield Sample("strided_rows", (codes[::2], scale[::2], None, *rest))
    yield Sample("one_scale", (codes, scale[:1].expand(6, 1), None, *rest))


def _w8a16_samples(device: torch.device) -> Iterator[Sample]:
    index = 0
    for m in (0, 1, 17, 123):
        # Of one row steps are loaded ahead, more where K is deep.
        several = [(40, 2048), (7, 2049), (5, 8320)] if m == 1 else []
        for n, k in [(1, 7), (7, 123), (123, 1), (123, 123), (40, 96), *several]:
            dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
            x = random_tensor(m, k, device=device, dtype=dtype)
            weight, weight_scale = numerics.quantize_weight(random_tensor(n, k, device=device, seed=1))
            bias = random_tensor(n, device=device, dtype=dtype, seed=2) if index % 2 else None
            yield Sample(f"{m}x{n}x{k}", (x, weight, weight_scale, bias))
            index += 1
    x = random_tensor(5, 96, device=device)
    weight, weight_scale = numerics.quantize_weight(random_tensor(24, 96, device=device, seed=1))
    yield Sample("column_major", (x.t().contiguous().t(), weight, weight_scale, None))
    yield Sample("one_strided", (x[::5], weight.t().contiguous().t(), weight_scale, None))
    yield Sample("expanded", (x[:1].expand(3, 5, 96), weight[::2], weight_scale[::2], None))
    special = x.clone()
    special[1, 3], special[2, 4] = math.nan, math.inf
    yield Sample("nan", (special, weight, weight_scale, None))


def few_columns(m: int, n: int, k: int, device: torch.device) -> tuple[Any, ...]:
    """Arguments of a gated linear whose product exceeds the threshold in 20 channels, for 48 places."""
    codes, scale = numerics.quantize_symmetric(random_tensor(m, k, device=device))
    weight, weight_scale = numerics.quantize_weight(random_tensor(n, k, device=device, seed=1))
    loud = torch.zeros(n // 2, device=device)
    loud[:: n // 40] = 1.0
    weight_scale = weight_scale * torch.where(loud > 0, 0.05, 0.001).repeat(2)
    none = (None, None, None, None, None)
    return (codes, scale, None, weight, weight_scale, *none, torch.bfloat16, "silu", 48, 4.0, True)


def hard_samples(name: str, device: torch.device) -> Iterator[Sample]:
    """Argument lists of the op `name` that its own samples leave out."""
    if name == "linear_w8a8":
        yield from _w8a8_samples(device)
        if device.type == "cuda":
            yield from _large_samples(device)
    elif name in ("linear_w8a8_add", "linear_w8a8_hilo_add"):
        for sample in hard_samples(name.removesuffix("_add"), device):
            weight, dtype = sample.args[5 if "hilo" in name else 3], sample.args[-1]
            shape = (*sample.args[0].shape[:-1], weight.shape[0])
            if device.type == "cuda" or len(weight) > 100:  # the interpreter takes its time, and sees the linear alone
                residual = random_tensor(*shape, device=device, dtype=dtype, seed=6)
                yield Sample(sample.label, (*sample.args, residual))
            if sample.label.endswith(("even", "ragged")):  # rows that TMA cannot read where they lie
                odd = random_tensor(*shape[:-1], shape[-1] + 3, device=device, dtype=dtype, seed=7)[..., :-3]
                yield Sample(f"{sample.label}-strided", (*sample.args, odd))
    elif name == "linear_w8a8_hilo":
        yield from hilo_samples.linear_samples(device)
    elif name == "gated_linear_quantize_hilo":
        for index, sample in enumerate(hilo_samples.linear_samples(device)):
            if device.type == "cuda" or index % 3 == 0:  # the interpreter takes its time, and sees the linear alone too
                yield Sample(sample.label, (*sample.args, "silu", 4.0, sample.args[2] is None))
    elif name.startswith("gated_linear"):
        if device.type == "cuda":
            for sample in _large_samples(device):
                search = (8, 0.5) if name.endswith("dynamic") else (torch.arange(2, 66, 2, device=device),)
                yield Sample(sample.label, (*sample.args, "silu", *search, sample.args[2] is None))
            if name.endswith("dynamic"):  # above, most channels find no place: here all do, or there is no threshold
                even = next(_large_samples(device))
                yield Sample("no_threshold", (*even.args, "silu", 8, 0.0, True))
                yield Sample("few_columns", few_columns(1999, 4640, 528, device))
    elif name == "linear_w8a8_groups":
        yield from _w8a8_group_samples(device)
    elif name == "linear_w8a16":
        yield from _w8a16_samples(device)
    elif name == "linear_w8a16_add":
        for sample in _w8a16_samples(device):
            x, weight, *_ = sample.args
            residual = random_tensor(*x.shape[:-1], len(weight) + 3, device=device, dtype=x.dtype, seed=6)[..., :-3]
            yield Sample(sample.label, (*sample.args, residual.contiguous()))
            if len(weight) > 1:
                yield Sample(f"{sample.label}-strided", (*sample.args, residual))
    elif name == "attention":
        yield from attention_samples.samples(device)
    else:
        for index, (label, x) in enumerate(_rows(device)):
            yield from _row_op_samples(name, label, x, index)
