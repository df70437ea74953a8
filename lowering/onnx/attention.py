"""Scaled dot-product attention: written out, or opset 23's one node.

torch's own translation looks for rows that are masked out in the `[B, H, T, S]` probabilities (IsNaN, Where), and
transposes keys through three reshapes. Here masks are finite, such rows are found in the mask, which has no heads, and
zeroed in the `[B, H, T, D]` result.

ONNX Runtime (1.31) computes exp of a masked score as the smallest denormal number, and takes four times as long for the
softmax of a causal mask as without; its Attention does the same. `clamped_attention` keeps every score within `NEAR` of
the largest of its row: a masked position has a probability of 1e-35 then, which no float32 sum notices. Three passes
over the scores cost more than that saves where only padding is masked: there it is the one node too.
"""

# Plain functions without annotations: torch.onnx reads annotations as an ONNX signature.
from __future__ import annotations

import math

import numpy as np
import onnx_ir
from onnxscript import opset21 as op
from onnxscript import opset23

from lowering.onnx.quantize import f32, i64

LOWEST = float(np.finfo(np.float32).min)
"""Added to a masked score: whatever a score is, the sum is finite."""
NEAR = 80.0
"""exp(-80) is a normal float32, also after the division by a sum of up to 1500; exp(-17) is lost beside 1."""


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # fmt: skip
    """softmax(q kᵀ · scale + mask) v on `[..., T, D]`, as `torch.nn.functional.scaled_dot_product_attention`.

    A row whose every position is masked is 0, as in torch.
    """
    return _attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, near=None)


def clamped_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # fmt: skip
    """The same, without denormal numbers in its softmax where every query has a mask of its own."""
    if not is_causal and (attn_mask is None or attn_mask.shape[-2] == 1):
        return attention_node(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, near=NEAR)


def attention_node(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # fmt: skip
    """The same as one node, of opset 23: its mask finite, as above, and with rows for every query, because ONNX
    Runtime's kernel (1.31) broadcasts no others."""
    if len(query.shape) != 4 or (is_causal and query.shape[2] != key.shape[2]):
        return _attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, near=None)
    valid = None
    if attn_mask is not None:
        one_row = attn_mask.shape[-2] == 1 and query.shape[2] != 1
        attn_mask, valid = _finite(attn_mask, query)
        if one_row:
            attn_mask = _with_rows(attn_mask, query, key)
    result, *_ = opset23.Attention(query, key, value, attn_mask, is_causal=int(is_causal), scale=scale)
    return result if valid is None else op.Mul(result, valid)


def _with_rows(mask, query, key):
    """`[..., 1, S]` ⇒ `[..., T, S]`"""
    # the sizes of the mask are those of all layers, so that there is one Expand for all of them
    length = op.Shape(mask, start=-1) if query.shape[2] == key.shape[2] else op.Shape(query, start=2, end=3)
    return op.Expand(mask, op.Concat(length, i64(1), axis=0))


def _attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, near):
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = _repeated(key, times), _repeated(value, times)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    rank = len(query.shape)
    swapped = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(op.Mul(query, _like(query, scale)), swapped)
    valid = None
    if is_causal:
        scores = op.Add(scores, _causal(query, key))
    elif attn_mask is not None:
        mask, valid = _finite(attn_mask, query)
        scores = op.Add(scores, mask)
    if near is not None and (is_causal or attn_mask is not None):
        lowest = op.Sub(op.ReduceMax(scores, i64(-1), keepdims=1), _like(query, near))
        scores = op.Max(scores, lowest)
    result = op.MatMul(op.Softmax(scores, axis=-1), value)
    return result if valid is None else op.Mul(result, valid)


def _like(x, number):
    return op.CastLike(f32(number), x)


def _repeated(x, times):
    """`[B, H, S, D]` ⇒ `[B, H · times, S, D]`, every head `times` times in a row."""
    if times == 1:
        return x
    wide = op.Expand(op.Unsqueeze(x, i64(2)), i64(1, 1, times, 1, 1))
    return op.Reshape(wide, op.Concat(i64(0, -1), op.Shape(x, start=2), axis=0))


def _finite(mask, query):
    """What is added to the scores, and 1 for every row with a position that counts, else 0: `[..., T, 1]`."""
    if mask.dtype == onnx_ir.DataType.BOOL:
        counts = op.Cast(mask, to=query.dtype)
        added = op.Where(mask, _like(query, 0.0), _like(query, LOWEST))
    else:
        counts = op.Cast(op.Greater(mask, op.CastLike(f32(-np.inf), mask)), to=query.dtype)
        added = op.Max(mask, _like(query, LOWEST))
    return added, op.ReduceMax(counts, i64(-1), keepdims=1)


def _causal(query, key):
    """Row t sees the positions 0 … t: `[T, S]`."""
    length = op.Concat(op.Shape(query, start=-2, end=-1), op.Shape(key, start=-2, end=-1), axis=0)
    ones = op.Expand(_like(query, LOWEST), length)
    return op.Trilu(ones, op.Constant(value=onnx_ir.tensor(np.asarray(1, np.int64))), upper=1)
