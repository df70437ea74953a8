"""Traps: shapes of QDQ graphs that compute the right numbers and silently run in float, or worse.

Every check looks at the file alone. `Trap.id` is what reports and documentation call it; docs/onnx.md says which the
tests reproduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from int8pass.qdq.linears import Linear, signed_input
from int8pass.qdq.rewrite import block_size, constant_of


@dataclass(frozen=True)
class Trap:
    """One way not to run in int8."""

    id: str
    what: str
    fix: str
    safe: bool
    """`int8pass lint --fix` can rewrite it without changing a number."""
    runtimes: tuple[str, ...] = ("onnxruntime",)


TRAPS = {
    trap.id: trap
    for trap in (
        Trap("T1", "a float bias is added to a product of static shape or rank 2: it becomes a Gemm that is not fused",
             "write the bias [1, 1, N] for rank 3; for rank 2 a Gemm with an int32 bias of scale s_x * s_w", True),
        Trap("T2", "signed activations whose QuantizeLinear has several readers (q, k, v): not fused on x86",
             "uint8 activations with zero point + 128", True),
        Trap("T3", "QuantizeLinear after a Relu or Clip with a zero point in the middle of its range: not fused",
             "Max(x, 0) for the Relu, or a uint8 zero point of 0 and the scale of the positive half", True),
        Trap("T4", "MatMulInteger with signed activations: a slow generic path on x86", "uint8 activations", True),
        Trap("T5", "opset 21 or later, signed activations, static rank 3 and an int32 bias: does not load",
             "uint8 activations with zero point + 128", True),
        Trap("T6", "a QuantizeLinear or DequantizeLinear without zero point: not fused", "write the zero point", True),
        Trap("T7", "weights in blocks (block_size) with quantized activations: fused, then fails when run",
             "one scale per output channel, or float activations", False),
        Trap("T8", "float16 or bfloat16 around the integers: not fused on a CPU", "export in float32", False),
        Trap("T9", "the weight is stored [N, K] and transposed in the graph: minutes to load where it is large",
             "store [K, N]", True),
        Trap("DQL", "DynamicQuantizeLinear with MatMulInteger runs in float", "the row-max form (int8pass export)",
             False, ("openvino", "tensorrt")),
        Trap("TRT-zero", "activations with a zero point, or unsigned: TensorRT takes symmetric int8 only",
             "int8 with zero point 0 (int8pass export --target tensorrt)", False, ("tensorrt",)),
        Trap("TRT-axis", "activations with more than one scale: TensorRT takes one per tensor",
             "one scale per tensor", False, ("tensorrt",)),
        Trap("TRT-tiny", "a product with N or K below 16: int8 costs more than it saves in TensorRT",
             "leave it in float", False, ("tensorrt",)),
    )
}  # fmt: skip


def traps_of(linear: Linear, opset: int) -> list[Trap]:
    """The traps a linear is in, in the order of `TRAPS`."""
    return [TRAPS[name] for name, check in _CHECKS.items() if check(linear, opset)]


def _zero(linear: Linear) -> ir.TensorProtocol | None:
    q = linear.quantizer
    return constant_of(q.inputs[2]) if q is not None and len(q.inputs) > 2 else None


def signed(linear: Linear) -> bool:
    """The activation is quantized to int8."""
    if linear.quantizer is None or linear.quantizer.op_type != "QuantizeLinear":
        return False
    zero = _zero(linear)
    return (zero.dtype if zero is not None else linear.quantizer.outputs[0].dtype) == ir.DataType.INT8


def bias_node(linear: Linear) -> ir.Node | None:
    """The Add of a constant vector to the product, or the Gemm that has one in float."""
    node = linear.node
    if node.op_type == "Gemm":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        made = bias.producer() if bias is not None else None
        return node if bias is not None and (made is None or made.op_type != "DequantizeLinear") else None
    uses = node.outputs[0].uses()
    if len(uses) != 1 or uses[0][0].op_type != "Add":
        return None
    add = uses[0][0]
    other = add.inputs[1 - uses[0][1]]
    return add if constant_of(other) is not None else None


def bias_of(add: ir.Node) -> ir.Value:
    """The constant operand of what `bias_node` found."""
    if add.op_type == "Gemm":
        return add.inputs[2]
    return next(v for v in add.inputs if v is not None and constant_of(v) is not None)


def _quantized_output(node: ir.Node) -> bool:
    uses = node.outputs[0].uses()
    return len(uses) == 1 and uses[0][0].op_type == "QuantizeLinear"


def _static_rank(linear: Linear) -> tuple[int | None, bool]:
    """Rank of the product, and whether all its sizes are known."""
    shape = linear.shape
    if shape is None:
        return None, False
    return len(shape), all(isinstance(size, int) for size in shape)


def _float_bias(linear: Linear, opset: int) -> bool:
    if linear.form != "qdq":
        return False
    add = bias_node(linear)
    if add is None or _quantized_output(add):
        return False
    if add.op_type == "Gemm":
        return True
    bias = constant_of(bias_of(add))
    rank, static = _static_rank(linear)
    if bias is None or len(bias.shape) > 2:
        return False
    return rank == 2 or (rank == 3 and static)


def _shared_signed(linear: Linear, opset: int) -> bool:
    if linear.form != "qdq" or not signed(linear):
        return False
    assert linear.quantizer is not None
    readers = [user for user, _ in linear.quantizer.outputs[0].uses()]
    return len(readers) > 1 or any(len(r.outputs[0].uses()) > 1 for r in readers)


def relu_before_quantizer(linear: Linear) -> ir.Node | None:
    """The Relu or Clip between a product and a QuantizeLinear whose zero point is not its lowest code."""
    user = linear.node
    for _ in range(2):  # the product, then its bias
        uses = user.outputs[0].uses()
        if len(uses) != 1:
            return None
        user = uses[0][0]
        if user.op_type in {"Relu", "Clip"}:
            break
    if user.op_type not in {"Relu", "Clip"} or not _quantized_output(user):
        return None
    quantizer = user.outputs[0].uses()[0][0]
    zero = constant_of(quantizer.inputs[2]) if len(quantizer.inputs) > 2 else None
    if zero is None:
        return None
    lowest = -128 if zero.dtype == ir.DataType.INT8 else 0
    return user if int(zero.numpy().reshape(-1)[0]) != lowest else None


def _after_relu(linear: Linear, opset: int) -> bool:
    return relu_before_quantizer(linear) is not None


def _signed_integers(linear: Linear, opset: int) -> bool:
    return linear.node.op_type == "MatMulInteger" and signed_input(linear)


def _does_not_load(linear: Linear, opset: int) -> bool:
    rank, static = _static_rank(linear)
    uses = linear.node.outputs[0].uses()
    if opset < 21 or not signed(linear) or rank != 3 or not static or len(uses) != 1 or uses[0][0].op_type != "Add":
        return False
    bias = uses[0][0].inputs[1 - uses[0][1]]
    made = bias.producer() if bias is not None else None
    return made is not None and made.op_type == "DequantizeLinear"


def _no_zero_point(linear: Linear, opset: int) -> bool:
    q = linear.quantizer
    if linear.form != "qdq" or q is None or q.op_type == "DynamicQuantizeLinear":
        return False
    return len(q.inputs) < 3 or q.inputs[2] is None


def _blocks(linear: Linear, opset: int) -> bool:
    read = linear.read
    return linear.form == "qdq" and read is not None and bool(block_size(read))


def _half(linear: Linear, opset: int) -> bool:
    for node in (linear.quantizer, linear.read):
        scale = constant_of(node.inputs[1]) if node is not None and len(node.inputs) > 1 else None
        if scale is not None and scale.dtype in {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}:
            return True
    return False


def _transposed(linear: Linear, opset: int) -> bool:
    node = linear.node
    made = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return made is not None and made.op_type == "Transpose" and linear.form != "integer"


def _dynamic(linear: Linear, opset: int) -> bool:
    return linear.quantizer is not None and linear.quantizer.op_type == "DynamicQuantizeLinear"


def _zero_point(linear: Linear, opset: int) -> bool:
    zero = _zero(linear)
    if linear.form != "qdq" or zero is None:
        return False
    return zero.dtype != ir.DataType.INT8 or bool(zero.numpy().any())


def _many_scales(linear: Linear, opset: int) -> bool:
    q = linear.quantizer
    scale = constant_of(q.inputs[1]) if q is not None and len(q.inputs) > 1 else None
    return scale is not None and scale.numpy().size != 1


def _tiny(linear: Linear, opset: int) -> bool:
    tensor = constant_of(linear.weight)
    return linear.form == "qdq" and tensor is not None and min(tensor.shape.numpy()) < SMALLEST_TENSORRT


SMALLEST_TENSORRT = 16

_CHECKS: dict[str, Callable[[Linear, int], bool]] = {
    "T5": _does_not_load, "T7": _blocks, "T8": _half, "T6": _no_zero_point, "T4": _signed_integers,
    "T2": _shared_signed, "T1": _float_bias, "T3": _after_relu, "T9": _transposed, "DQL": _dynamic,
    "TRT-zero": _zero_point, "TRT-axis": _many_scales, "TRT-tiny": _tiny,
}  # fmt: skip
"""In the order in which they explain a fallback."""
