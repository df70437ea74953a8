"""Rewrites around attention that let a freshly translated graph run faster. All work in place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from int8pass.qdq.rewrite import constant_of, initializer


def simplify(model: ir.Model) -> None:
    """All of them."""
    mask_in_row_scale(model)
    rows_in_attention(model)
    drop_key_biases(model)
    values_after_softmax(model)


def rows_in_attention(model: ir.Model) -> int:
    """Attention of heads, `[B, H, T, D]` ⇒ Attention of rows, `[B, T, H·D]`, as linears make and take them; returns
    how many.

        Reshape[B, T, H, D] → Transpose → Attention → (· mask of rows) → Transpose → Reshape[B, T, H·D]

    The kernels find the heads in the rows: four copies less in ONNX Runtime.
    """
    masks: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in list(model.graph):
        if node.op_type != "Attention" or len(node.inputs) > 4 or len(node.outputs) != 1:
            continue
        splits, joined = [_split_before(value) for value in node.inputs[:3]], _rows_after(node)
        if None in splits or joined is None:
            continue
        for name, split in zip(("q_num_heads", "kv_num_heads"), splits):
            node.attributes[name] = ir.AttrInt64(name, split.outputs[0].shape[2])  # type: ignore[union-attr]
        for index, split in enumerate(splits):
            node.replace_input_with(index, split.inputs[0])  # type: ignore[union-attr]
        result = node.outputs[0]
        masked = _only_reader(node, "Mul")
        if masked is not None:
            mask = _mask_without_heads(model, masked, masks)
            result = _value(model, masked, ir.Node("", "Mul", [result, mask], name=masked.name))
        for value in (node.outputs[0], result):
            value.shape, value.type = joined.shape, joined.type
        ir.convenience.replace_all_uses_with(joined, result)
        count += 1
    passes.RemoveUnusedNodesPass()(model)
    return count


def _split_before(heads: ir.Value | None) -> ir.Node | None:
    """The Reshape that takes heads `[B, H, T, D]` from rows `[B, T, H·D]`; None where they are made otherwise."""
    turned = heads.producer() if heads is not None else None
    if turned is None or turned.inputs[0] is None or not _turns_heads(turned):
        return None
    split = turned.inputs[0].producer()
    if split is None or split.op_type != "Reshape" or not _same_rows(split.inputs[0], split.outputs[0]):
        return None
    return split


def _rows_after(attention: ir.Node) -> ir.Value | None:
    """The rows that attention's heads become, perhaps after a product with a mask of rows."""
    masked = _only_reader(attention, "Mul")
    if masked is not None and not _is_mask_of_rows(masked.inputs[1]):
        return None
    turned = _only_reader(masked or attention, "Transpose")
    joined = _only_reader(turned, "Reshape")
    if turned is None or joined is None or not _turns_heads(turned) or joined.outputs[0].is_graph_output():
        return None
    return joined.outputs[0] if _same_rows(joined.outputs[0], joined.inputs[0]) else None


def _turns_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def _same_rows(rows: ir.Value | None, heads: ir.Value | None) -> bool:
    """Whether a Reshape between these two only splits or joins the last axis: `[B, T, H·D]` and `[B, T, H, D]`."""
    if rows is None or heads is None or rows.shape is None or heads.shape is None:
        return False
    if len(rows.shape) != 3 or len(heads.shape) != 4 or not all(isinstance(size, int) for size in heads.shape[2:]):
        return False
    return all(_same_size(a, b) for a, b in zip(rows.shape[:2], heads.shape[:2]))


def _same_size(left: int | ir.SymbolicDim, right: int | ir.SymbolicDim) -> bool:
    return left == right and getattr(left, "value", left) is not None


def mask_in_row_scale(model: ir.Model) -> int:
    """Attention's result times its mask of rows, quantized per row ⇒ the mask times the inverse scales of the rows;
    returns how many.

        Mul(y[B, H, T, D], valid[B, 1, T, 1]) → Transpose → Reshape[B, T, H·D] → · 1/r → QuantizeLinear

    A row that is masked has codes of zero in both; the largest value of such a row is of no account.
    """
    count = 0
    masks: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        scaled = _scaled_rows(node)
        if scaled is None:
            continue
        position = next(i for i, v in enumerate(scaled.inputs) if _inverse(v))
        valid = _mask_without_heads(model, node, masks)
        inverse = ir.Node("", "Mul", [scaled.inputs[position], valid])
        scaled.replace_input_with(position, _value(model, scaled, inverse))
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        model.graph.remove(node, safe=True)
        count += 1
    return count


def _mask_without_heads(model: ir.Model, masked: ir.Node, done: dict[ir.Value, ir.Value]) -> ir.Value:
    """The mask `[B, 1, T, 1]` of a product with one as `[B, T, 1]`, made once."""
    valid = masked.inputs[1]
    assert valid is not None
    if valid not in done:
        turned = _value(model, masked, ir.Node("", "Transpose", [valid], [ir.AttrInt64s("perm", [0, 2, 1, 3])]))
        last = initializer(model, "last_axis", np.array([3], np.int64))
        done[valid] = _value(model, masked, ir.Node("", "Squeeze", [turned, last]))
    return done[valid]


def _value(model: ir.Model, before: ir.Node, node: ir.Node) -> ir.Value:
    """The result of a new node, placed before another."""
    result = node.outputs[0]
    result.name, result.dtype = f"{before.outputs[0].name}.{node.op_type}", ir.DataType.FLOAT
    model.graph.insert_before(before, node)
    return result


def _inverse(value: ir.Value | None) -> bool:
    made = value.producer() if value is not None else None
    return made is not None and made.op_type == "Reciprocal"


_REDUCTIONS = {"ReduceMax", "ReduceMin"}


def _scaled_rows(node: ir.Node) -> ir.Node | None:
    """The product with the inverse scales, of a product with a mask that `mask_in_row_scale` may take away."""
    attention = node.inputs[0].producer() if node.op_type == "Mul" and node.inputs[0] is not None else None
    if attention is None or attention.op_type not in {"MatMul", "Attention"} or not _is_mask_of_rows(node.inputs[1]):
        return None
    transpose = _only_reader(node, "Transpose")
    reshape = _only_reader(transpose, "Reshape")
    if transpose is None or reshape is None or not _turns_heads(transpose):
        return None
    if reshape.outputs[0].shape is None or len(reshape.outputs[0].shape) != 3:
        return None
    readers = [user for user, _ in reshape.outputs[0].uses() if user.op_type not in _REDUCTIONS]
    if len(readers) != 1 or readers[0].op_type != "Mul" or not any(_inverse(v) for v in readers[0].inputs):
        return None
    return readers[0]


def _is_mask_of_rows(value: ir.Value | None) -> bool:
    """The largest of each row of a mask of zeros and ones that all heads share."""
    largest = value.producer() if value is not None else None
    cast = largest.inputs[0].producer() if largest is not None and largest.op_type == "ReduceMax" else None
    mask = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    if mask is None or mask.dtype != ir.DataType.BOOL or mask.shape is None:
        return False
    return len(mask.shape) == 4 and mask.shape[1] == 1


def _only_reader(node: ir.Node | None, kind: str) -> ir.Node | None:
    if node is None or node.outputs[0].is_graph_output():
        return None
    users = [user for user, _ in node.outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == kind else None


def drop_key_biases(model: ir.Model) -> int:
    """`softmax(q (k + b)ᵀ · scale + mask)` ⇒ `softmax(q kᵀ · scale + mask)`; returns how many.

    q · b is one number for a whole row of scores, which softmax takes no notice of.
    """
    count = 0
    for node in list(model.graph):
        biases = [v for v in node.inputs if constant_of(v) is not None] if node.op_type == "Add" else []
        if len(biases) != 1 or constant_of(biases[0]).numpy().ndim != 1 or not _is_key(node):  # type: ignore[union-attr]
            continue
        product = next(v for v in node.inputs if v is not biases[0])
        ir.convenience.replace_all_uses_with(node.outputs[0], product)
        model.graph.remove(node, safe=True)
        count += 1
    return count


def _is_key(node: ir.Node) -> bool:
    """Whether `[B, S, H·D]` is split into heads, turned to `[B, H, D, S]`, and makes scores that only softmax reads; or
    Attention reads it as keys."""
    split = _only_reader(node, "Reshape")
    heads = _only_reader(split, "Transpose")
    attention = _only_reader(heads or node, "Attention")
    if attention is not None and (heads is None or _turns_heads(heads)):
        capped = "softcap" in attention.attributes and attention.attributes["softcap"].as_float() != 0.0
        return attention.inputs[1] is (heads or node).outputs[0] and not capped
    if split is None or split.outputs[0].shape is None or len(split.outputs[0].shape) != 4:
        return False
    axes, last = [0, 1, 2, 3], split
    while (turned := _only_reader(last, "Transpose")) is not None:
        axes, last = [axes[i] for i in turned.attributes["perm"].as_ints()], turned
    scores = _only_reader(last, "MatMul")
    if scores is None or axes != [0, 2, 3, 1] or scores.inputs[1] is not last.outputs[0]:
        return False
    scaled = _only_reader(scores, "Mul")
    if scaled is not None and any(constant_of(v) is not None and v.shape.rank() == 0 for v in scaled.inputs if v):
        scores = scaled
    softmax = _only_reader(_only_reader(scores, "Add") or scores, "Softmax")
    return softmax is not None and "axis" in softmax.attributes and softmax.attributes["axis"].as_int() in {-1, 3}


def values_after_softmax(model: ir.Model) -> int:
    """The last op on attention's values ⇒ right before the product that reads them; returns how many. Order only.

    Of two operands ONNX Runtime (1.31) computes first the one whose node comes later in the file. The product that
    makes values then runs next to those of queries and keys, while what it reads is in the cache.
    """
    count = 0
    for node in list(model.graph):
        made = [v.producer() if v is not None else None for v in node.inputs]
        if node.op_type != "MatMul" or None in made or made[0].op_type != "Softmax":  # type: ignore[union-attr]
            continue
        values = made[1]
        if values is None or _only_reader(values, "MatMul") is not node:
            continue
        model.graph.remove(values)
        model.graph.insert_before(node, values)
        count += 1
    return count
