"""Quantize, dequantize and outlier split as ONNX nodes.

A per-token scale cannot be an argument of QuantizeLinear, whose scale the int8 kernels want constant. So the row is
divided by its largest value first and quantized with the constant scale 1/127 ("row-max form"): a static QDQ pair for
every runtime, one scale per token in effect. Codes with a zero point of their own are scaled and shifted first, and
quantized with the constant scale 1.
"""

# Plain functions without annotations: torch.onnx reads annotations as an ONNX signature.
from __future__ import annotations

import numpy as np
from onnxscript import opset21 as op

from lowering.numerics import INT8_MAX, INT8_MIN, SMALLEST_ABSMAX
from lowering.ops import quantize as ops

FLOAT, INT8, INT32 = 1, 3, 6  # onnx.TensorProto.DataType


def f32(value):
    """A float32 constant, of any shape."""
    return op.Constant(value=_tensor(np.asarray(value, np.float32)))


def i64(*values):
    """A list of int64."""
    return op.Constant(value=_tensor(np.asarray(values, np.int64)))


def int8_zero():
    """The zero point of signed codes: written out, because QuantizeLinear without one stays unfused."""
    return op.Constant(value=_tensor(np.asarray(0, np.int8)))


def _tensor(array):
    import onnx_ir

    return onnx_ir.tensor(array)


def to_codes(scaled, step=1.0):
    """Codes of multiples of a constant: rounded half to even, saturated."""
    return op.QuantizeLinear(scaled, f32(step), int8_zero())


def from_codes(codes):
    """Codes as floats: the DequantizeLinear that mirrors their QuantizeLinear, as int8 kernels are matched by."""
    made = codes.producer()
    if made is not None and made.op_type == "QuantizeLinear":
        return op.DequantizeLinear(codes, made.inputs[1], made.inputs[2])
    return op.DequantizeLinear(codes, f32(1.0), int8_zero())


def is_static(codes):
    """Whether the scale of these codes is computed from calibrated limits, and not a factor of each row."""
    made = codes.producer()
    return made is not None and made.op_type == "QuantizeLinear" and made.inputs[1].producer().op_type != "Constant"


def row_factor(codes, scale):
    """What the product with dequantized codes, which are in units of their constant step, is multiplied by."""
    made, scaled = codes.producer(), scale.producer()
    if made is None or made.op_type != "QuantizeLinear" or scaled is None or scaled.op_type != "Mul":
        return scale
    return scaled.inputs[0] if scaled.inputs[1] is made.inputs[1] else scale


@ops.quantize_per_token.impl("onnx")
def quantize_per_token(x, symmetric):
    if symmetric:
        absmax = _row_absmax(x)
        codes = to_codes(op.Mul(x, op.Reciprocal(absmax)), step=1.0 / INT8_MAX)
        scale = op.Mul(absmax, codes.producer().inputs[1])  # unread where the product is multiplied by absmax
        return codes, scale, op.Cast(op.Mul(scale, f32(0.0)), to=INT32)
    low = op.Min(op.ReduceMin(x, i64(-1), keepdims=1), f32(0.0))
    high = op.Max(op.ReduceMax(x, i64(-1), keepdims=1), f32(0.0))
    scale = op.Div(op.Max(op.Sub(high, low), f32(SMALLEST_ABSMAX)), f32(INT8_MAX - INT8_MIN))
    inverse = op.Reciprocal(scale)
    zero_point = op.Round(op.Sub(f32(INT8_MIN), op.Mul(low, inverse)))
    # Rounded once, after the zero point is added: another code than the reference's only at a tie.
    codes = to_codes(op.Add(op.Mul(x, inverse), zero_point))
    return codes, scale, op.Cast(zero_point, to=INT32)


LOWEST_OF = {"Gelu": -0.1701, "Relu": 0.0, "Sigmoid": 0.0, "Softmax": 0.0}
"""No result of these ops is less. Gelu's minimum is -0.16997, -0.17004 where it is computed by tanh."""
LOWEST_SILU = -0.2785
"""No result of x · sigmoid(x) is less: its minimum is -0.27846."""


def _lowest(x):
    """A bound not far below zero that no value of `x` is below, by the op that made it; None where there is none."""
    made = x.producer()
    if made is None:
        return None
    if made.op_type == "Mul":
        factors = [value.producer() for value in made.inputs]
        gates = zip(factors, reversed(made.inputs))
        if any(gate is not None and gate.op_type == "Sigmoid" and gate.inputs[0] is other for gate, other in gates):
            return LOWEST_SILU
    return LOWEST_OF.get(made.op_type)


def _row_absmax(x):
    """The largest absolute value of each row, at least SMALLEST_ABSMAX: `[..., 1]`.

    Two reductions read x; Abs would write as much again, and took longer in OpenVINO. Where x cannot be far below zero
    one will do: its bound counts as a value of the row, which changes codes only in rows with nothing above it.
    """
    high = op.ReduceMax(x, i64(-1), keepdims=1)
    if (lowest := _lowest(x)) is not None:
        return op.Max(high, f32(max(-lowest, SMALLEST_ABSMAX)))
    # Beside any other value SMALLEST_ABSMAX is lost in the difference; a third operand of Max would cost more.
    return op.Max(high, op.Sub(f32(SMALLEST_ABSMAX), op.ReduceMin(x, i64(-1), keepdims=1)))


def _per_row(x, value):
    """A scalar once per row of `x`: `[..., 1]`."""
    return op.Expand(value, op.Concat(op.Shape(x, start=0, end=-1), i64(1), axis=0))


def _range_codes(low, high, symmetric):
    """Scale and zero point, float scalars, of codes that cover `low`…`high`."""
    if symmetric:
        absmax = op.Max(op.Max(op.Neg(low), high), f32(SMALLEST_ABSMAX))  # of three, it is not folded
        return op.Div(absmax, f32(INT8_MAX)), f32(0.0)
    low, high = op.Min(low, f32(0.0)), op.Max(high, f32(0.0))
    scale = op.Div(op.Max(op.Sub(high, low), f32(SMALLEST_ABSMAX)), f32(INT8_MAX - INT8_MIN))
    return scale, op.Round(op.Sub(f32(INT8_MIN), op.Mul(low, op.Reciprocal(scale))))


@ops.quantize_per_tensor.impl("onnx")
def quantize_per_tensor(x, limits, symmetric):
    """With limits, one QuantizeLinear whose scale and zero point fold to constants: what all runtimes call static.

    It saturates at -128 also where the reference's symmetric codes end at -127.
    """
    if limits is None:
        low, high = op.ReduceMin(x, keepdims=0), op.ReduceMax(x, keepdims=0)
        scale, zero_point = _range_codes(low, high, symmetric)
        scaled = op.Mul(x, op.Reciprocal(scale))
        codes = to_codes(scaled if symmetric else op.Add(scaled, zero_point))
    else:
        low, high = (op.Gather(limits, i, axis=0) for i in (_index(0), _index(1)))
        scale, zero_point = _range_codes(low, high, symmetric)
        codes = op.QuantizeLinear(x, scale, int8_zero() if symmetric else op.Cast(zero_point, to=INT8))
    return codes, _per_row(x, scale), op.Cast(_per_row(x, zero_point), to=INT32)


def _index(value):
    return op.Constant(value=_tensor(np.asarray(value, np.int64)))


@ops.dequantize.impl("onnx")
def dequantize(codes, scale, zero_point, dtype):
    values = op.Cast(codes, to=FLOAT)
    if zero_point is not None:
        values = op.Sub(values, op.Cast(zero_point, to=FLOAT))
    return op.Cast(op.Mul(values, scale), to=dtype)


@ops.dequantize_weight.impl("onnx")
def dequantize_weight(codes, scale, dtype):
    return op.Cast(op.DequantizeLinear(codes, scale, axis=0), to=dtype)


@ops.dequantize_weight_groups.impl("onnx")
def dequantize_weight_groups(codes, scale, group, dtype):
    return op.Cast(op.DequantizeLinear(codes, scale, axis=1, block_size=group), to=dtype)


def _without(x, columns, kept):
    """`x` with the columns whose entry of `kept[K]` is 0 set to 0, whatever they hold."""
    return op.Where(op.Greater(kept, f32(0.0)), x, f32(0.0))


def _ones(width):
    return f32(np.ones(width))


@ops.outlier_split.impl("onnx")
def outlier_split(x, columns):
    kept = op.ScatterElements(_ones(x.shape[-1]), columns, op.Mul(op.Cast(columns, to=FLOAT), f32(0.0)), axis=0)
    return _without(x, columns, kept), op.Gather(x, columns, axis=-1)


@ops.outlier_split_dynamic.impl("onnx")
def outlier_split_dynamic(x, capacity, threshold):
    width = int(x.shape[-1])
    count = min(capacity, width)
    absmax = op.ReduceMax(op.Abs(op.Reshape(x, i64(-1, width))), i64(0), keepdims=0)
    values, columns = op.TopK(absmax, i64(count))
    outliers = op.Gather(x, columns, axis=-1)
    if threshold <= 0.0:
        taken = f32(np.ones(count))
        overflow = op.Constant(value=_tensor(np.asarray(0, np.int32)))
    else:
        taken = op.Cast(op.Greater(values, f32(threshold)), to=FLOAT)
        outliers = op.Where(op.Greater(taken, f32(0.0)), outliers, f32(0.0))
        above = op.ReduceSum(op.Cast(op.Greater(absmax, f32(threshold)), to=FLOAT), keepdims=0)
        overflow = op.Cast(op.Sub(above, op.ReduceSum(taken, keepdims=0)), to=INT32)
    kept = op.ScatterElements(_ones(width), columns, op.Sub(f32(1.0), taken), axis=0)
    return _without(x, columns, kept), outliers, columns, overflow
