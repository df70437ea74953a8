"""The quantized linears of an ONNX graph, whatever tool wrote it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from int8pass.qdq.rewrite import constant_of

Form = Literal["qdq", "weight only", "integer"]

# Where ops that multiply integers directly take their weight, and their activations.
INTEGER_OPS = {
    "MatMulInteger": (1, 0), "MatMulIntegerToFloat": (1, 0), "DynamicQuantizeMatMul": (1, 0), "QLinearMatMul": (3, 0),
    "QGemm": (3, 0), "MatMulNBits": (1, 0),
}  # fmt: skip
MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Gather", "Slice", "Flatten", "Identity", "Split", "Cast"}


@dataclass(frozen=True)
class Linear:
    """One product with a quantized weight.

    `form`: both operands come from DequantizeLinear ("qdq"), only the weight does ("weight only"), or the op takes
    integers itself ("integer").
    """

    node: ir.Node
    form: Form
    weight: ir.Value
    """The stored integers."""
    read: ir.Node | None
    """The DequantizeLinear of the weight."""
    quantizer: ir.Node | None
    """The QuantizeLinear of the activation."""

    @property
    def path(self) -> str:
        """The module it comes from, as well as the file says."""
        return module_of(self.node)

    @property
    def shape(self) -> ir.Shape | None:
        """Shape of its result, the last size aside (that may be its input's); None where the file does not say."""
        values = [self.node.outputs[0], self.node.inputs[0], self.quantizer.inputs[0] if self.quantizer else None]
        return next((v.shape for v in values if v is not None and v.shape is not None), None)

    def aliases(self) -> set[str]:
        """Names a runtime may know it by: its node's, its result's, and those of what is fused onto it."""
        names = {str(self.node.name), str(self.node.outputs[0].name)}
        node = self.node
        while len(node.outputs[0].uses()) == 1:
            node = node.outputs[0].uses()[0][0]
            if node.op_type not in {"Add", "Cast", "Mul", "Sum"}:
                break
            names |= {str(node.name), str(node.outputs[0].name)}
        return names


def find(model: ir.Model) -> list[Linear]:
    """Every quantized linear of the main graph, in its order."""
    found = (_linear(node) for node in model.graph)
    return [linear for linear in found if linear is not None]


def _linear(node: ir.Node) -> Linear | None:
    if node.op_type in INTEGER_OPS:
        position, activation = INTEGER_OPS[node.op_type]
        weight = _through_moves(node.inputs[position])
        if weight is None or constant_of(weight) is None:
            return None
        form: Form = "weight only" if node.op_type == "MatMulNBits" else "integer"
        return Linear(node, form, weight, None, _producer(node.inputs[activation], {"DynamicQuantizeLinear"}))
    if node.op_type not in {"MatMul", "Gemm"}:
        return None
    read = _producer(node.inputs[1], {"DequantizeLinear"})
    weight = _stored(read)
    if read is None or weight is None:
        return None
    back = _producer(node.inputs[0], {"DequantizeLinear"})
    quantizer = _producer(back.inputs[0], {"QuantizeLinear", "DynamicQuantizeLinear"}) if back else None
    return Linear(node, "qdq" if quantizer else "weight only", weight, read, quantizer)


def _stored(read: ir.Node | None) -> ir.Value | None:
    """The constant under a DequantizeLinear, itself or before its QuantizeLinear."""
    if read is None or read.inputs[0] is None:
        return None
    value = read.inputs[0]
    writer = value.producer()
    if writer is not None and writer.op_type == "QuantizeLinear":
        value = writer.inputs[0]
    return value if constant_of(value) is not None else None


def _through_moves(value: ir.Value | None) -> ir.Value | None:
    while value is not None and constant_of(value) is None:
        node = value.producer()
        if node is None or node.op_type not in MOVES:
            return None
        value = node.inputs[0]
    return value


def _producer(value: ir.Value | None, kinds: set[str]) -> ir.Node | None:
    """The node of one of these kinds that made a value, through ops that only move it."""
    while value is not None:
        node = value.producer()
        if node is None or node.op_type in kinds:
            return node
        if node.op_type not in MOVES:
            return None
        value = node.inputs[0]
    return None


def signed_input(linear: Linear) -> bool:
    """Whether the activations of an integer product are int8, by the zero point of what made them or by their type."""
    value = linear.node.inputs[INTEGER_OPS[linear.node.op_type][1]] if linear.node.op_type in INTEGER_OPS else None
    made = _producer(value, {"QuantizeLinear"})
    if made is not None and made.op_type == "QuantizeLinear" and len(made.inputs) > 2:
        zero = constant_of(made.inputs[2])
        if zero is not None:
            return zero.dtype == ir.DataType.INT8
    return value is not None and value.dtype == ir.DataType.INT8


def module_of(node: ir.Node) -> str:
    """The module path a node carries: from int8pass by its name, from torch in its metadata, else from its name."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    if scopes and not str(node.name).startswith("node_") and "." in str(node.name):
        return str(node.name)
    try:
        parts = [p for p in json.loads(scopes.replace("'", '"')) if p] if scopes else []
    except ValueError:
        parts = []
    if len(parts) > 1:
        return str(parts[-2])  # the last is the FX node itself
    name = str(node.name or (node.outputs[0].name if node.outputs else ""))
    return re.sub(r"/(MatMul|Gemm)(_quant|_\d+)?$", "", name).strip("/").replace("/", ".") or name
