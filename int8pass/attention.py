"""Attention as one op, its keys and values before they are repeated for every head: a rule of `fuse`."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from int8pass.graph.pattern import Bind, Call, op_name
from int8pass.graph.rewrite import Edit
from lowering.ops import attention as attention_ops

_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
_REPEATED = Call("reshape", (Call("expand", (Bind("single"),)),))


def fuse_attention(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`scaled_dot_product_attention(q, repeat(k), repeat(v), mask)` ⇒ `attention(q, k, v, mask, causal, scale)`"""
    if op_name(node) != "scaled_dot_product_attention":
        return None
    query, key, value, *rest = node.args
    given: dict[str, Any] = {**_DEFAULTS, **dict(zip(_DEFAULTS, rest)), **node.kwargs}
    mask, causal, scale = given["attn_mask"], bool(given["is_causal"]), given["scale"]
    shapes = [_shape(n) for n in (query, key, value)]
    depth = shapes[0][-1]
    if {len(shape) for shape in shapes} != {4} or given["dropout_p"] or (causal and mask is not None):
        return None
    if not isinstance(depth, int):
        return None
    single_key, single_value = _before_repeat(key), _before_repeat(value)
    if _equal(_shape(single_key)[:2], _shape(single_value)[:2]):
        key, value = single_key, single_value
    if not _agree(_shape(query), _shape(key), _shape(value), _shape(node)):
        return None
    arguments = (query, key, value, mask, causal, depth**-0.5 if scale is None else float(scale))
    return edit.call(attention_ops.attention.overload, *arguments, before=node)


def _before_repeat(node: Any) -> fx.Node:
    """The `[B, G, S, D]` of which `node` [B, H, S, D] holds each head H / G times, side by side; else `node` itself."""
    assert isinstance(node, fx.Node)
    found = _REPEATED.match(node)
    if found is None:
        return node
    single = found["single"]
    while op_name(single) == "slice" and _equal(_shape(single), _shape(single.args[0])):
        single = single.args[0]  # of everything
    if op_name(single) != "unsqueeze" or single.args[1] not in (2, -3) or len(_shape(single)) != 5:
        return node
    source = single.args[0]
    (b, g, s, d), repeated = _shape(source), _shape(node.args[0])
    same = _equal((*repeated[:2], *repeated[3:]), (b, g, s, d)) and _equal(_shape(node), (b, g * repeated[2], s, d))
    return source if same else node


def _agree(query: tuple[Any, ...], key: tuple[Any, ...], value: tuple[Any, ...], result: tuple[Any, ...]) -> bool:
    """Provably nothing is broadcast: every sequence has queries, keys and values, every head its keys or a share."""
    heads, groups = query[1], key[1]
    if not (isinstance(heads, int) and isinstance(groups, int)) or groups == 0 or heads % groups:
        return False
    # Keys are as many as values in any call that is none of an error; of symbols that need not be known yet.
    return _equal(key[:2], (query[0], groups)) and _equal(value[:2], key[:2]) and _equal(result, (*query[:3], value[3]))


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Provably: no guard is added for symbolic sizes."""
    return len(a) == len(b) and statically_known_true(sym_eq(a, b))


__all__ = ["fuse_attention"]
