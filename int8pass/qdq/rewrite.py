"""Rewrites of ONNX graphs that change no number, or only where a number is stored. All work in place."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

if TYPE_CHECKING:
    from int8pass.qdq.linears import Linear

FOLD_BYTES = 1 << 24
"""Constants up to this size are folded: sums and scales of weights, not embedding tables."""
UNSIGNED_ZERO = "zero_point_u8"


def prepare(model: ir.Model, unsigned: bool) -> None:
    """What a freshly translated model needs: weights transposed and named linears, then torch's usual clean-up."""
    import onnxscript.optimizer

    transpose_weights(model)
    name_linears(model)
    onnxscript.optimizer.optimize(  # shapes are known from the translation
        model, 1, onnx_shape_inference=False, input_size_limit=FOLD_BYTES, output_size_limit=FOLD_BYTES
    )
    if unsigned:
        unsigned_activations(model)
        relu_as_max(model)
        fix_biases(model)  # TensorRT wants biases in float
    passes.RemoveUnusedNodesPass()(model)


def put_in_place(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Let `new` be what `old`, a node of one output, is in the graph: its value, name and metadata."""
    value, result = old.outputs[0], new.outputs[0]
    new.metadata_props.update(old.metadata_props)
    result.name, result.type, result.shape = value.name, value.type, value.shape
    model.graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(value, result)
    model.graph.remove(old, safe=True)


def relu_as_max(model: ir.Model) -> int:
    """`Q(Relu(x))` ⇒ `Q(Max(x, 0))` where x is a product and the zero point is in mid-range; returns how many (T3)."""
    from int8pass.qdq import linears, traps

    count = 0
    for linear in linears.find(model):
        relu = traps.relu_before_quantizer(linear)
        if relu is None or relu.op_type != "Relu":
            continue
        zero = initializer(model, "zero", np.zeros((), np.float32))
        largest = ir.Node("", "Max", [relu.inputs[0], zero], name=relu.name)
        put_in_place(model, relu, largest)
        count += 1
    return count


def fix_biases(model: ir.Model) -> int:
    """Biases in the form that fuses, wherever they are not (trap T1); returns how many were changed."""
    from int8pass.qdq import linears, traps

    opset, count = int(model.opset_imports.get("", 0)), 0
    for linear in linears.find(model):
        if traps.TRAPS["T1"] in traps.traps_of(linear, opset):
            add = traps.bias_node(linear)
            count += add is not None and fusing_bias(model, linear, add)
    return count


def name_linears(model: ir.Model) -> None:
    """Name every product with a quantized weight `m.weight_int8` after its module m."""
    taken: set[str] = set()
    for node in model.graph:
        read = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if read is None or read.op_type != "DequantizeLinear" or constant_of(read.inputs[0]) is None:
            continue
        name = path = str(read.inputs[0].name).split(".weight_int8")[0]
        uses = 1
        while name in taken:  # a weight that several linears share
            uses += 1
            name = f"{path}#{uses}"
        taken.add(name)
        node.name = name
        if node.outputs[0].name is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].name = f"{name}.product"


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind a value that is an initializer or a Constant; None for any other."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value
    return ir.convenience.get_const_tensor(value)


def block_size(node: ir.Node) -> int:
    """Elements that share a scale in a Q or DQ of blocks; 0 where it has none."""
    return node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0


def initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer of that name, or under a free name that begins with it."""
    names = model.graph.initializers
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    free = next(n for n in candidates if n not in names)
    value = ir.Value(
        name=free,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=free),
    )
    names[free] = value
    return value


def transpose_weights(model: ir.Model) -> int:
    """`Transpose(W int8)` and `Transpose(DequantizeLinear(W))` with constant W ⇒ Wᵀ stored; returns how many.

    A weight read in both forms is stored in both.
    """
    done: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in list(model.graph):
        if node.op_type != "Transpose" or len(node.inputs) != 1 or node.inputs[0] is None:
            continue
        source = node.inputs[0]
        if not _is_int8_matrix(source):
            count += _transpose_dequantized(model, node, done)
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], _transposed(model, source, done))
        model.graph.remove(node, safe=True)
        count += 1
    _drop_unread(model, done)
    return count


def _is_int8_matrix(value: ir.Value) -> bool:
    tensor = constant_of(value)
    return tensor is not None and tensor.dtype in {ir.DataType.INT8, ir.DataType.UINT8} and len(tensor.shape) == 2


def _transpose_dequantized(model: ir.Model, node: ir.Node, done: dict[ir.Value, ir.Value]) -> int:
    """`Transpose(DequantizeLinear(W[N, K], s, z, axis=a))` ⇒ `DequantizeLinear(Wᵀ, s, z, axis=1-a)`"""
    read = node.inputs[0].producer()
    if read is None or read.op_type != "DequantizeLinear" or block_size(read):
        return 0
    weight = read.inputs[0]
    if weight is None or not _is_int8_matrix(weight) or len(read.outputs[0].uses()) != 1:
        return 0
    axis = read.attributes["axis"].as_int() % 2 if "axis" in read.attributes else 1
    read.replace_input_with(0, _transposed(model, weight, done))
    read.attributes["axis"] = ir.AttrInt64("axis", 1 - axis)
    if read.outputs[0].shape is not None:
        read.outputs[0].shape = ir.Shape(list(reversed(list(read.outputs[0].shape))))
    ir.convenience.replace_all_uses_with(node.outputs[0], read.outputs[0])
    model.graph.remove(node, safe=True)
    return 1


def _transposed(model: ir.Model, weight: ir.Value, done: dict[ir.Value, ir.Value]) -> ir.Value:
    if weight not in done:
        tensor = constant_of(weight)
        assert tensor is not None
        done[weight] = initializer(model, f"{weight.name}.T", np.ascontiguousarray(tensor.numpy().T))
    return done[weight]


def _drop_unread(model: ir.Model, replaced: dict[ir.Value, ir.Value]) -> None:
    """Forget the weights that are read transposed only, and let those have their names."""
    for old, new in replaced.items():
        if old.uses() or old.name not in model.graph.initializers:
            continue
        name, temporary = old.name, new.name
        assert name is not None
        assert temporary is not None
        del model.graph.initializers[name]
        del model.graph.initializers[temporary]
        new.name = name
        if new.const_value is not None:
            new.const_value.name = name
        model.graph.initializers[name] = new


def activation_quantizers(model: ir.Model) -> Iterator[ir.Node]:
    """Every QuantizeLinear of a value computed in the graph."""
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and constant_of(node.inputs[0]) is None:
            yield node


def unsigned_activations(model: ir.Model) -> int:
    """`Q(x, s, z int8)` and all its DQ ⇒ the same codes plus 128 as uint8; returns how many. No number changes.

    x86 kernels multiply unsigned activations by signed weights.
    """
    zeros: dict[int, ir.Value] = {}
    count = 0
    for node in activation_quantizers(model):
        zero = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        if zero is None or zero.dtype != ir.DataType.INT8 or zero.numpy().size != 1:
            continue
        readers = _readers(node)
        if readers is None or any(v.is_graph_output() for n in (node, *readers[0]) for v in n.outputs):
            continue
        passed, ends = readers
        point = int(zero.numpy().reshape(())) + 128
        if point not in zeros:
            zeros[point] = initializer(model, UNSIGNED_ZERO, np.array(point, np.uint8))
        node.replace_input_with(2, zeros[point])
        for value in [node.outputs[0], *(v for n in passed for v in n.outputs)]:
            value.dtype = ir.DataType.UINT8
        for end in ends:
            end.replace_input_with(2, zeros[point])
        if "output_dtype" in node.attributes:
            del node.attributes["output_dtype"]
        count += 1
    return count


_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Gather", "Slice", "Flatten", "Identity"}


def _readers(node: ir.Node) -> tuple[list[ir.Node], list[ir.Node]] | None:
    """The ops that only move the codes of a quantizer, and the DequantizeLinear that read them; None if others do."""
    passed: list[ir.Node] = []
    ends: list[ir.Node] = []
    todo = list(node.outputs[0].uses())
    while todo:
        user, index = todo.pop()
        if user.op_type == "DequantizeLinear" and index == 0:
            if len(user.inputs) > 2 and user.inputs[2] is not None:
                ends.append(user)
                continue
            return None
        if user.op_type == "MatMulInteger" and index == 0:
            user.resize_inputs(max(3, len(user.inputs)))  # its zero point may be left out
            ends.append(user)
            continue
        if user.op_type not in _MOVES or index != 0:
            return None
        passed.append(user)
        todo += user.outputs[0].uses()
    return passed, ends


def explicit_zero_points(nodes: Iterable[ir.Node], model: ir.Model) -> int:
    """Q and DQ without zero point ⇒ with one of 0 in their type (unfused without); returns how many changed."""
    count = 0
    for node in nodes:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"} or block_size(node):
            continue
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            continue
        coded = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        scale = constant_of(node.inputs[1])
        stored = constant_of(coded)
        kind = stored.dtype if stored is not None else coded.dtype if coded is not None else None
        if scale is None or kind not in {ir.DataType.INT8, ir.DataType.UINT8}:
            continue
        zero = initializer(model, "zero_point", np.zeros(scale.shape.numpy(), kind.numpy()))
        inputs = [node.inputs[0], node.inputs[1], zero]
        node.resize_inputs(3)
        node.replace_input_with(2, inputs[2])
        node.attributes.pop("output_dtype", None)
        count += 1
    return count


def fusing_bias(model: ir.Model, linear: Linear, add: ir.Node) -> bool:
    """A float bias on a product that would become an unfused Gemm ⇒ the form that fuses; False where there is none.

    Rank 3: the bias as `[1, 1, N]`, which is no Gemm's. Rank 2: `Gemm(DQ(x), DQ(W), DQ(bias int32, s_x · s_W))`; the
    bias moves by at most half a step of the accumulator.
    """
    constants = (v for v in add.inputs if v is not None and constant_of(v) is not None)
    bias = next((v for v in constants if v is not linear.weight), None)
    rank = len(linear.shape) if linear.shape is not None else None
    if add.op_type == "Add" and rank == 3 and bias is not None:
        array = constant_of(bias).numpy()  # type: ignore[union-attr]
        wide = initializer(model, f"{bias.name}.wide", array.reshape(1, 1, -1))
        add.replace_input_with(list(add.inputs).index(bias), wide)
        return True
    if rank != 2 and linear.node.op_type != "Gemm":
        return False
    return _integer_bias(model, linear, add)


def _integer_bias(model: ir.Model, linear: Linear, add: ir.Node) -> bool:
    """Rank 2: product and bias ⇒ one Gemm whose bias is int32."""
    scales = [constant_of(n.inputs[1]) for n in (linear.quantizer, linear.read) if n is not None]
    is_gemm = add.op_type == "Gemm"
    bias = add.inputs[2] if is_gemm else next(v for v in add.inputs if v is not None and constant_of(v) is not None)
    values = constant_of(bias)
    if len(scales) != 2 or any(s is None for s in scales) or values is None or values.numpy().ndim != 1:
        return False
    if is_gemm and any(name in add.attributes and add.attributes[name].as_float() != 1.0 for name in ("alpha", "beta")):
        return False
    scale = (scales[0].numpy().reshape(-1)[0] * scales[1].numpy()).astype(np.float32)  # type: ignore[union-attr]
    codes = np.clip(np.rint(values.numpy() / scale), -(2**31), 2**31 - 1).astype(np.int32)
    stored = initializer(model, f"{bias.name}.int32", codes)
    step = initializer(model, f"{bias.name}.scale", np.broadcast_to(scale, codes.shape).copy())
    zero = initializer(model, f"{bias.name}.zero_point", np.zeros(codes.shape, np.int32))
    read = ir.Node("", "DequantizeLinear", [stored, step, zero], [ir.AttrInt64("axis", 0)])
    read.outputs[0].name = f"{bias.name}.dequantized"
    read.outputs[0].dtype, read.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(codes.shape)
    model.graph.insert_before(add, read)
    if linear.read is not None:
        explicit_zero_points([linear.read], model)  # a Gemm is fused only with one for its weight
    if is_gemm:
        add.replace_input_with(2, read.outputs[0])
        return True
    product = linear.node
    gemm = ir.Node("", "Gemm", [product.inputs[0], product.inputs[1], read.outputs[0]], name=product.name)
    gemm.metadata_props.update(product.metadata_props)
    gemm.outputs[0].dtype, gemm.outputs[0].shape = add.outputs[0].dtype, add.outputs[0].shape
    gemm.outputs[0].name = f"{product.name}.sum"
    model.graph.insert_before(add, gemm)
    output = add.outputs[0]
    if output.is_graph_output():
        name, index = output.name, list(model.graph.outputs).index(output)
        model.graph.outputs[index] = gemm.outputs[0]
        output.name, gemm.outputs[0].name = None, name
    ir.convenience.replace_all_uses_with(output, gemm.outputs[0])
    model.graph.remove([add, product], safe=True)
    return True
