"""Rewrites that let a freshly translated graph run faster in the runtimes, and change no number. All work in place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from int8pass.qdq import attention
from int8pass.qdq.rewrite import constant_of, initializer, put_in_place


def simplify(model: ir.Model, unsigned: bool) -> None:
    """All of them; sums only where x86 kernels will run (`unsigned`): TensorRT has no Sum."""
    constant_reshapes(model)
    attention.simplify(model)
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
