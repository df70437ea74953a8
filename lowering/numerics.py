"""Quantization arithmetic, apart from graphs and devices.

Conventions (shared by every reference, kernel and exporter):

* weights: symmetric per output channel, `scale[N] = absmax / 127`, codes in [-127, 127];
* weights may also have one scale in all, or one per group of adjacent columns of each row;
* activations: per token (one scale per row of K channels) or per tensor, symmetric or affine;
* rounding is to nearest, ties to even; scales are fp32; products accumulate in int32.

Sources: LLM.int8() (arXiv 2208.07339, section 3: vector-wise quantization) for the symmetric form;
Jacob et al. (arXiv 1712.05877, section 2.1) for the affine one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INT8_MAX = 127
INT8_MIN = -128

# Below this absmax a row counts as zero: 127 / absmax would overflow fp32 for a subnormal row. A NaN row stays NaN.
SMALLEST_ABSMAX = 1e-30


def symmetric_scale(absmax: Tensor) -> Tensor:
    """`absmax / 127`, never zero. fp32 in, fp32 out, any shape."""
    return absmax.clamp_min(SMALLEST_ABSMAX) / INT8_MAX


def quantize_symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `x[..., K]` → int8 codes `[..., K]` and fp32 scales `[..., 1]`; error ≤ scale / 2 per element."""
    x = x.float()
    scale = symmetric_scale(x.abs().amax(-1, keepdim=True))
    # A reciprocal and a product: what a kernel does. Half-even rounding; |x / scale| ≤ 127 needs no clamp.
    return torch.round(x * scale.reciprocal()).to(torch.int8), scale


def quantize_affine(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `x[..., K]` → int8 codes, fp32 scales `[..., 1]` and int32 zero points `[..., 1]`.

    The range is widened to contain 0, so that 0 stays exact and a constant row has a scale.
    """
    x = x.float()
    return quantize_to_range(x, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), symmetric=False)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight[N, K]` → int8 `[N, K]` row-major and fp32 scales `[N]`, one per output channel."""
    codes, scale = quantize_symmetric(weight.detach())
    return codes.contiguous(), scale.squeeze(-1)


def affine_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (both fp32) of codes that cover `low`…`high`, 0 included; any shape."""
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = (high - low).clamp_min(SMALLEST_ABSMAX) / (INT8_MAX - INT8_MIN)
    return scale, torch.round(INT8_MIN - low * scale.reciprocal())


def quantize_to_range(x: Tensor, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`x` of any shape → int8 codes, and the fp32 scale and int32 zero point of the range `low`…`high`.

    What lies outside the range takes its nearest end. `low` and `high` broadcast to `x`; symmetric codes cover
    ±max(-low, high). NaN in `x` has no code: a range taken from `x` carries it in its scale.
    """
    x = x.float()
    if symmetric:
        scale = symmetric_scale(torch.maximum(-low, high).clamp_min(0.0))
        codes = torch.round(x * scale.reciprocal()).clamp(-INT8_MAX, INT8_MAX)
        return codes.to(torch.int8), scale, torch.zeros_like(scale, dtype=torch.int32)
    scale, zero_point = affine_range(low, high)
    codes = (torch.round(x * scale.reciprocal()) + zero_point).clamp(INT8_MIN, INT8_MAX)
    return codes.to(torch.int8), scale, zero_point.to(torch.int32)


def quantize_weight_per_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight[N, K]` → int8 codes `[N, K]` and fp32 scales `[N]`, all equal: the layout of `quantize_weight`."""
    weight = weight.detach().float()
    codes, scale, _ = quantize_to_range(weight, weight.amin(), weight.amax(), symmetric=True)
    return codes.contiguous(), scale.reshape(1).repeat(weight.shape[0])


def quantize_weight_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`weight[N, K]` → int8 codes `[N, K]` and fp32 scales `[N, ceil(K / group)]`, one per `group` adjacent columns."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.detach().float(), (0, -k % group))
    codes, scale = quantize_symmetric(padded.view(n, -1, group))
    return codes.view(n, -1)[:, :k].contiguous(), scale.squeeze(-1)


def rows(x: Tensor) -> int | None:
    """Rows (tokens) of `x[..., K]` where that is known when compiling, else None."""
    sizes = x.shape[:-1]
    return None if any(isinstance(size, torch.SymInt) for size in sizes) else math.prod(sizes)


HILO_REACH = 32500
"""Largest code of an outlier without its zero point: int16, less a zero point and half a low plane."""
HILO_BLOCKS = 8
"""Blocks of columns, of at most 32, in which a row may keep outliers."""


def quantize_hilo(x: Tensor, threshold: float, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of `x[..., K]` → low halves int8, fp32 scale and int32 zero point `[..., 1]`, high halves int8, and the
    int32 `[..., 1]` whose bit b is set where a row has outliers in its block b of `block_width(K)` columns.

    Values in the other blocks make the scale, and have codes of 8 bits; those in blocks with outliers have codes of 16.
    The scale is made larger where one would be beyond `HILO_REACH`, or where Σ|code| · 127 could leave an int32.
    """
    x = x.float()
    magnitude = x.abs()
    width = block_width(x.shape[-1])
    padded = torch.nn.functional.pad(magnitude, (0, -x.shape[-1] % width))
    used = outlier_blocks(padded.unflatten(-1, (-1, width)).amax(-1), threshold)
    bits = (used.long() << torch.arange(used.shape[-1], device=x.device)).sum(-1, keepdim=True)
    blocks = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    wide = in_blocks(blocks, x.shape[-1])
    inliers = torch.where(wide, 0.0, x)
    low, high = inliers.amin(-1, keepdim=True), inliers.amax(-1, keepdim=True)
    if symmetric:
        scale = symmetric_scale(torch.maximum(-low, high).clamp_min(0.0))
    else:
        scale, _ = affine_range(low, high)
    needed = magnitude.amax(-1, keepdim=True) / HILO_REACH
    needed = torch.maximum(needed, magnitude.sum(-1, keepdim=True) / hilo_sum(x.shape[-1]))
    scale = torch.where(used.any(-1, keepdim=True), torch.maximum(scale, needed), scale)
    zero_point = torch.zeros_like(scale)
    if not symmetric:
        zero_point = torch.round(INT8_MIN - low.clamp_max(0.0) * scale.reciprocal())
    codes = torch.round(x * scale.reciprocal()) + zero_point
    # An inlier that rounds to 128 must not take a high half: its block is not multiplied.
    codes = torch.where(wide, codes.clamp(-32768, 32639), codes.clamp(INT8_MIN, INT8_MAX)).to(torch.int32)
    upper = (codes + 128) >> 8
    return (codes - 256 * upper).to(torch.int8), scale, zero_point.to(torch.int32), upper.to(torch.int8), blocks


def outlier_blocks(reach: Tensor, threshold: float) -> Tensor:
    """Largest magnitudes of the blocks of rows, `[..., blocks]` → which have outliers, bool.

    Those above the threshold, and those that stand apart: at least twice as large as any that is smaller than they are.
    Either may be in at most `HILO_BLOCKS` blocks of a row: large values everywhere are no outliers.
    """
    own, others = reach.unsqueeze(-1), reach.unsqueeze(-2)
    next_lower = torch.where(others < own, others, 0.0).amax(-1)
    few = (others >= own).sum(-1) <= HILO_BLOCKS
    gap = (next_lower > 0) & (reach >= 2 * next_lower) & few
    apart = reach >= torch.where(gap, reach, torch.inf).amin(-1, keepdim=True)
    either = apart | (reach > threshold)
    return torch.where(either.sum(-1, keepdim=True) <= HILO_BLOCKS, either, apart & reach.isfinite())


def hilo_sum(k: int) -> int:
    """How large Σ|x| / scale over `k` channels may be: with zero points and rounding of them all, times 127, it fits an
    int32."""
    return int(2**24 - 129 * k)


def block_width(k: int) -> int:
    """Columns of one of at most 32 blocks of `k`: a power of two, at least 128."""
    return max(128, (1 << (k - 1).bit_length()) // 32)


def in_blocks(blocks: Tensor, k: int) -> Tensor:
    """bool `[..., K]`: the columns of the blocks whose bits are set in `blocks[..., 1]`."""
    return (blocks >> (torch.arange(k, device=blocks.device) // block_width(k))) & 1 != 0
