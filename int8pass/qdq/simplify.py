"""Rewrites that let a freshly translated graph run faster in the runtimes, and change no number. All work in place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from int8pass.qdq.rewrite import constant_of, initializer, put_in_place


def simplify(model: ir.Model, unsigned: bool) -> None:
    """All of them; sums only where x86 kernels will run (`unsigned`): TensorRT has no Sum."""
    constant_reshapes(model)
    mask_in_row_scale(model)
    drop_key_biases(model)
    values_after_softmax(model)
    if unsigned:
        split_adds(model)
    passes.RemoveUnusedNodesPass()(model)


def split_adds(model: ir.Model) -> int:
    """`LayerNormalization(Add(a, b))` and `Gelu(Add(a, b))` ⇒ the same of `Sum(a, b)`; returns how many.

    ONNX Runtime (1.31) fuses the first into SkipLayerNormalization, whose CPU kernel takes several times as long as
    the two ops, and the second into BiasGelu, which takes a fifth longer.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type not in {"LayerNormalization", "Gelu"} or node.inputs[0] is None:
            continue
        add = node.inputs[0].producer()
        if add is None or add.op_type != "Add" or add.outputs[0].is_graph_output():
            continue
        if node.op_type != "Gelu" and any(constant_of(v) is not None for v in add.inputs):
            continue
        put_in_place(model, add, ir.Node("", "Sum", list(add.inputs), name=add.name))
        count += 1
    return count


def constant_reshapes(model: ir.Model) -> int:
    """`Reshape(x, [size of x's axis 0, size of its axis 1, 12, 32])` ⇒ `Reshape(x, [0, 0, 12, 32])`; returns how many.

    A runtime then knows the shapes without running the graph, and has no sizes to gather.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Reshape" or constant_of(node.inputs[1]) is not None:
            continue
        sizes = _sizes(node.inputs[0], node.outputs[0])
        if sizes is None:
            continue
        node.replace_input_with(1, initializer(model, "sizes", np.array(sizes, np.int64)))
        node.attributes.pop("allowzero", None)  # there 0 would mean an empty axis
        count += 1
    return count


def _sizes(x: ir.Value | None, result: ir.Value) -> list[int] | None:
    """A constant shape for `result` in which 0 stands for an axis that is as long as that of `x`."""
    if x is None or x.shape is None or result.shape is None:
        return None
    sizes: list[int] = []
    for axis, size in enumerate(result.shape):
        if isinstance(size, int) and size > 0:
            sizes.append(size)
        elif _is_named(size) and axis < len(x.shape) and x.shape[axis] == size:
            sizes.append(0)
        else:
            return None
    return sizes


def _is_named(size: object) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value is not None


def mask_in_row_scale(model: ir.Model) -> int:
    """Attention's result times its mask of rows, quantized per row ⇒ the mask times the inverse scales of the rows;
    returns how many.

        Mul(y[B, H, T, D], valid[B, 1, T, 1]) → Transpose → Reshape[B, T, H·D] → · 1/r → QuantizeLinear

    A row that is masked has codes of zero in both; the largest value of such a row is of no account.
    """
    count = 0
    rows: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        found = _masked_attention(node)
        if found is None:
            continue
        valid, scaled = found
        if valid not in rows:
            turned = _value(model, scaled, ir.Node("", "Transpose", [valid], [ir.AttrInt64s("perm", [0, 2, 1, 3])]))
            last = initializer(model, "last_axis", np.array([3], np.int64))
            rows[valid] = _value(model, scaled, ir.Node("", "Squeeze", [turned, last]))
        position = next(i for i, v in enumerate(scaled.inputs) if _inverse(v))
        inverse = ir.Node("", "Mul", [scaled.inputs[position], rows[valid]])
        scaled.replace_input_with(position, _value(model, scaled, inverse))
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        model.graph.remove(node, safe=True)
        count += 1
    return count


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


def _masked_attention(node: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """The mask, and the product with the inverse scales, of a product that `mask_in_row_scale` may take away."""
    attention = node.inputs[0].producer() if node.op_type == "Mul" and node.inputs[0] is not None else None
    if attention is None or attention.op_type != "MatMul" or not _is_mask_of_rows(node.inputs[1]):
        return None
    transpose = _only_reader(node, "Transpose")
    reshape = _only_reader(transpose, "Reshape")
    if transpose is None or reshape is None or list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    if reshape.outputs[0].shape is None or len(reshape.outputs[0].shape) != 3:
        return None
    readers = [user for user, _ in reshape.outputs[0].uses() if user.op_type not in _REDUCTIONS]
    if len(readers) != 1 or readers[0].op_type != "Mul" or not any(_inverse(v) for v in readers[0].inputs):
        return None
    return node.inputs[1], readers[0]


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
    """Whether `[B, S, H·D]` is split into heads, turned to `[B, H, D, S]`, and makes scores that only softmax reads."""
    split = _only_reader(node, "Reshape")
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
