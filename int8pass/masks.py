"""Masks: what models compute from positions → views of what it is computed from.

Inductor sees through `arange`. An ONNX runtime gathers by it, compares it and combines what it found, op by op, at each
call, and then adds a mask of `[T, S]` where one of `[1, S]` says the same.

Requires: any program. Ensures: no `index` by all positions of a tensor is left, and no `and` with a mask that is True
everywhere where its result may be smaller; the function computed is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from int8pass.capture import Program, mutated_values
from int8pass.graph.pattern import op_name
from int8pass.graph.rewrite import Edit, RewriteLog, apply_rules, same_layout

aten = torch.ops.aten


def simplify_masks(program: Program) -> RewriteLog:
    """Run all rules of this module."""
    frozen = mutated_values(program.graph)

    def view(node: fx.Node, edit: Edit) -> fx.Node | None:
        return None if node in frozen or (node.args and node.args[0] in frozen) else index_to_view(node, edit)

    view.__name__ = index_to_view.__name__
    return apply_rules(program, (view, drop_all_true))


def index_to_view(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`x[arange(B)[:, None], arange(S)[None, :]]`, every position of every axis in order ⇒ `x`, unsqueezed"""
    if op_name(node) != "index":
        return None
    x: Any = node.args[0]
    axes = _axes_of_positions(x, node)
    if axes is None:
        return None
    for axis in range(node.meta["val"].dim()):
        if axis not in axes:
            x = edit.call(aten.unsqueeze.default, x, axis, before=node)
    return x


def _axes_of_positions(x: fx.Node, index: fx.Node) -> list[int] | None:
    """Axis of the result that each axis of `x` comes to lie on; None where it is not all of `x` in its order."""
    sizes, rank = x.meta["val"].shape, index.meta["val"].dim()
    indices: Any = index.args[1]
    axes: list[int] = []
    for size, entry in zip(sizes, indices):
        found = positions(entry)
        if found is None or entry.meta["val"].dim() != rank or not statically_known_true(found[0] == size):
            return None
        axes.append(found[1])
    return axes if len(axes) == len(sizes) and axes == sorted(set(axes)) else None


def positions(node: object) -> tuple[Any, int] | None:
    """n and the axis of `arange(n)` along one axis with all other sizes 1; None for anything else."""
    axes: list[int] = []
    while isinstance(node, fx.Node) and (op_name(node) == "unsqueeze" or _adds_zero(node)):
        if op_name(node) == "unsqueeze":
            axes.append(int(node.args[1]))  # type: ignore[arg-type]
        node = node.args[0]
    if not isinstance(node, fx.Node) or op_name(node) != "arange":
        return None
    start = node.args[0] if len(node.args) > 1 else 0
    if start != 0 or len(node.args) > 2:
        return None
    axis = 0
    for rank, new in enumerate(reversed(axes), start=2):
        axis += new % rank <= axis
    return node.meta["val"].shape[0], axis


def _adds_zero(node: fx.Node) -> bool:
    return op_name(node) == "add" and isinstance(node.args[1], int) and node.args[1] == 0


def drop_all_true(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`a & b` with a True everywhere ⇒ `b`, where that has the shape of both or only attention reads it, which
    broadcasts its mask itself"""
    if op_name(node) not in _ANDS:
        return None
    for constant, other in (node.args[:2], node.args[1::-1]):
        if not isinstance(other, fx.Node) or not _all_true(constant) or other.meta["val"].dtype != torch.bool:
            continue
        same_rank = other.meta["val"].dim() == node.meta["val"].dim()
        if same_layout(other.meta["val"], node.meta["val"]) or (same_rank and _only_masks_attention(node)):
            return other
    return None


_ANDS = {"__and__", "bitwise_and", "logical_and"}


def _all_true(node: object) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    name = op_name(node)
    if name in _ANDS:
        return _all_true(node.args[0]) and _all_true(node.args[1])
    if name in {"new_ones", "ones", "ones_like"}:
        return bool(node.meta["val"].dtype == torch.bool)
    limit = node.args[1] if name == "ge" else None
    return isinstance(limit, int) and limit <= 0 and positions(node.args[0]) is not None


def _only_masks_attention(node: fx.Node) -> bool:
    def masks(user: fx.Node) -> bool:
        given = user.args[3] if len(user.args) > 3 else user.kwargs.get("attn_mask")
        return op_name(user) == "scaled_dot_product_attention" and given is node and node not in user.args[:3]

    return all(masks(user) for user in node.users)
