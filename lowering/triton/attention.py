"""Attention on a GPU: a kernel of ours for few queries, else PyTorch's, which chooses between cuDNN's and its flash
kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lowering.ops.attention import attention
from lowering.triton.launch import (
    INTERPRETED,
    UNKNOWN_ROWS,
    empty,
    expected_rows,
    follow,
    linked,
    rounded,
    traceable,
    wrap_triton,
    writes,
)

MOST_ROWS = 64  # queries of all heads that share keys: the rows of a tile
MOST_CHANNELS = 256
# Keys are shared out until there is a program for each of 132 multiprocessors, unless one would get fewer keys.
PROGRAMS, FEWEST_KEYS = 132, 128
# Where heads share no keys and nothing is masked, PyTorch's kernels are as fast with one query, and faster with many.
MOST_KEYS_ALONE = 512
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load_rows(base, offsets, taken, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK]: rows at `offsets` from `base`, zero beyond `WIDTH` and where not `taken`."""
    channels = tl.arange(0, BLOCK)
    at = base + offsets[:, None] + channels[None, :]
    return tl.load(at, mask=taken[:, None] & (channels < WIDTH)[None, :], other=0.0)


@triton.jit
def _power(x, largest):
    """`exp(x - largest)`; 0 where there is nothing, also where the largest is nothing.

    Differences come before the factor: a mask of the least finite float stays finite, as in the reference.
    """
    return tl.exp2((x - tl.where(largest == float("-inf"), 0.0, largest)) * LOG2_E)


@triton.jit
def _product(a, b):
    """`tl.dot` of 16-bit floats."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b)


@writes("out", "extent")
@triton.jit
def _few_queries_kernel(
    query, q_batch, q_head, q_token, key, k_batch, k_head, k_token, value, v_batch, v_head, v_token,
    mask, m_batch, m_head, m_token, m_key, out, extent, scale, B, S, KEYS,
    H: tl.constexpr, T: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    """One batch element, one head of keys and the queries that share it; `KEYS` of its keys.

    Online softmax (arXiv 2205.14135, algorithm 1). Where keys are shared out among programs, `extent` takes the
    largest score of each part and its sum of powers, by which its result is weighed against those of other parts.
    """
    follow(LINKED)
    batch = (tl.program_id(0) // (H // SHARED)).to(tl.int64)
    group = (tl.program_id(0) % (H // SHARED)).to(tl.int64)  # a cache of many keys has heads 2^31 elements apart
    part = tl.program_id(1)
    row = tl.arange(0, ROWS)
    token, head = row // SHARED, group * SHARED + row % SHARED
    exists = row < T * SHARED
    q = _load_rows(query + batch * q_batch, head * q_head + token * q_token, exists, D, BLOCK_D)
    key += batch * k_batch + group * k_head
    value += batch * v_batch + group * v_head
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_E], tl.float32)
    last = tl.minimum(S, (part + 1) * KEYS)
    scale = tl.full([], scale, tl.float32)
    for start in range(part * KEYS, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        k = _load_rows(key, at.to(tl.int64) * k_token, at < last, D, BLOCK_D)
        v = _load_rows(value, at.to(tl.int64) * v_token, at < last, E, BLOCK_E)
        scores = _product(q, k.trans()) * scale
        seen = exists[:, None] & (at < last)[None, :]
        if CAUSAL:
            seen &= at[None, :] <= token[:, None]
        if mask is not None:
            places = mask + batch * m_batch + (head * m_head + token * m_token)[:, None]
            given = tl.load(places + at.to(tl.int64)[None, :] * m_key, mask=seen, other=0)
            if mask.dtype.element_ty.is_floating():
                scores += given.to(tl.float32)
            else:
                seen &= given != 0
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, 1))
        powers = _power(scores, above[:, None])
        before = _power(largest, above)
        total = total * before + tl.sum(powers, 1)
        sums = sums * before[:, None] + _product(rounded(powers, v.dtype), v)
        largest = above
    sums /= tl.where(total == 0, 1.0, total)[:, None]
    place = ((part * B + batch) * T + token) * H + head
    channels = tl.arange(0, BLOCK_E)
    kept = exists[:, None] & (channels < E)[None, :]
    tl.store(out + place[:, None] * E + channels[None, :], rounded(sums, out.dtype.element_ty), mask=kept)
    if extent is not None:
        tl.store(extent + place, largest, mask=exists)
        tl.store(extent + tl.num_programs(1).to(tl.int64) * B * T * H + place, total, mask=exists)


@writes("out")
@triton.jit
def _join_parts_kernel(
    parts, extent, out, COUNT, PARTS: tl.constexpr, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
    LINKED: tl.constexpr,
):  # fmt: skip
    """Results of `PARTS` parts of the keys → that of all, one query of one head to a program."""
    follow(LINKED)
    place = tl.program_id(0).to(tl.int64)
    part, channels = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_E)
    exists = part < PARTS
    largest = tl.load(extent + part * COUNT + place, mask=exists, other=float("-inf"))
    sums = tl.load(extent + (PARTS + part) * COUNT + place, mask=exists, other=0.0)
    weights = _power(largest, tl.max(largest, 0)) * sums
    total = tl.sum(weights, 0)
    kept = exists[:, None] & (channels < E)[None, :]
    values = tl.load(parts + (part * COUNT + place)[:, None] * E + channels[None, :], mask=kept, other=0.0)
    joined = tl.sum(values * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + place * E + channels, rounded(joined, out.dtype.element_ty), mask=channels < E)


def _on_old_gpu(query: Tensor) -> bool:
    on_gpu = query.device.type == "cuda" and torch.cuda.is_available()
    return on_gpu and torch.cuda.get_device_capability(query.device) < (8, 0)


attention.impl("triton", name="triton:scaled_dot_product_attention")(attention.reference)


def _shares_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> bool | str:
    """What PyTorch's flash and cuDNN kernels take: elsewhere shared heads would mean its plain form, which holds all
    T · S products, where repeated ones have a kernel."""
    if query.dtype not in (torch.bfloat16, torch.float16) or mask is not None:
        return "the kernels that share keys between heads take 16-bit floats without a mask"
    if _on_old_gpu(query):
        return "the kernels that share keys between heads need an Ampere GPU or a later one"
    if not statically_known_true(query.shape[-1] == value.shape[-1]) or not statically_known_true(
        query.shape[-1] <= MOST_CHANNELS
    ):
        return "the kernels that share keys between heads take equal head sizes up to 256"
    if causal and not statically_known_true(query.shape[2] == key.shape[2]):
        return "the kernels that share keys between heads mask as many keys as queries"
    return not statically_known_true(query.shape[1] == key.shape[1]) or "every head has keys of its own"


@attention.impl("triton", name="triton:scaled_dot_product_attention (grouped)", when=_shares_heads)
def attention_grouped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Keys and values stay as they are: to repeat them costs 31 µs a layer for 4096 tokens of a Llama-3-8B (H100)."""
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=True)


def _few_queries(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool | str:
    if query.dtype not in (torch.bfloat16, torch.float16) or not query.dtype == key.dtype == value.dtype:
        return "the kernel for few queries takes 16-bit floats of one kind"
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel for few queries takes masks of bool and float, not {mask.dtype}"
    if _on_old_gpu(query):
        return "the kernel for few queries needs an Ampere GPU or a later one"
    heads, tokens, groups = query.shape[1], query.shape[2], key.shape[1]
    sizes = (heads, tokens, groups, query.shape[3], value.shape[3])
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return "the kernel for few queries needs heads, queries and channels of fixed size, at least 1"
    if tokens * heads // groups > MOST_ROWS or max(sizes[3:]) > MOST_CHANNELS:
        return f"the kernel for few queries takes {MOST_ROWS} that share keys, of up to {MOST_CHANNELS} channels"
    if heads == groups and mask is None and not statically_known_true(key.shape[2] <= MOST_KEYS_ALONE):
        return f"of more than {MOST_KEYS_ALONE} keys the kernel for few queries takes what is shared or masked"
    return True


@attention.impl("triton", when=_few_queries)
@traceable
def attention_few_queries(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Keys and values are read once for all heads that share them, by as many programs as the GPU has room for."""
    batch, heads, tokens, depth = query.shape
    groups, keys, width = key.shape[1], key.shape[2], value.shape[3]
    query, key, value = (x if statically_known_true(x.stride(-1) == 1) else x.contiguous() for x in (query, key, value))
    shape = (batch, tokens, heads, width)
    out = torch.empty(shape, dtype=query.dtype, device=query.device)
    if empty(batch):
        return out.transpose(1, 2)
    parts, block = _parts(batch * groups, keys), _block(keys, depth, width)
    apart = extent = None
    overlaps = linked(query.device, batch * tokens)
    if parts > 1:
        apart = torch.empty((parts, *shape), dtype=torch.float32, device=query.device)
        extent = torch.empty((2, parts, *shape[:3]), dtype=torch.float32, device=query.device)
    wrap_triton(_few_queries_kernel)[(batch * groups, parts)](
        query, *query.stride()[:3], key, *key.stride()[:3], value, *value.stride()[:3],
        mask, *_mask_strides(mask), out if apart is None else apart, extent, scale, batch, keys,
        triton.cdiv(keys, parts * block) * block,
        H=heads, T=tokens, SHARED=heads // groups, D=depth, E=width, CAUSAL=causal,
        ROWS=_tile(tokens * heads // groups), BLOCK=block, BLOCK_D=_tile(depth), BLOCK_E=_tile(width),
        LINKED=overlaps, num_warps=4, num_stages=_stages(batch * groups),
    )  # fmt: skip
    if apart is not None:
        count = batch * tokens * heads
        wrap_triton(_join_parts_kernel)[(count,)](
            apart, extent, out, count, PARTS=parts, E=width, BLOCK_P=triton.next_power_of_2(parts),
            BLOCK_E=triton.next_power_of_2(width), LINKED=overlaps, num_warps=2,
        )  # fmt: skip
    return out.transpose(1, 2)


def _parts(pairs: Any, keys: Any) -> int:
    """Programs among which the keys of one batch element and head are shared out."""
    # A cache that grows is short when its graph is compiled: parts without keys cost nothing then.
    keys = keys if isinstance(keys, int) else max(expected_rows(keys), UNKNOWN_ROWS)
    pairs = expected_rows(pairs)
    return max(1, min(PROGRAMS // max(1, pairs), keys // FEWEST_KEYS))


def _stages(pairs: Any) -> int:
    """Blocks of keys under way: more where a multiprocessor has few programs."""
    return 3 if expected_rows(pairs) <= 2 * PROGRAMS else 2


def _block(keys: Any, depth: int, width: int) -> int:
    """Keys at a time: three blocks of both kinds in 96 KiB of shared memory."""
    most = 64 if depth + width <= MOST_CHANNELS else 32
    return min(most, _tile(keys)) if isinstance(keys, int) else most


def _tile(size: int) -> int:
    """What `tl.dot` takes: a power of two from 16 on."""
    return max(16, triton.next_power_of_2(size))


def _mask_strides(mask: Tensor | None) -> tuple[Any, ...]:
    """Of a mask that broadcasts to [B, H, T, S]: 0 where it has one value for all."""
    if mask is None:
        return (0, 0, 0, 0)
    own = [0 if statically_known_true(n == 1) else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    return (*([0] * (4 - len(own))), *own)
