"""int8 linears as MatMul between two DequantizeLinear, the form that every runtime's int8 kernels are matched by.

Weights are written `[K, N]` with the scale on axis 1: the transposed form `[N, K]` is fused only after its Transpose
has been folded, at every load of the model. What depends on the row (its scale, its zero point, outlier columns) is
applied after the product, in float.
"""

from __future__ import annotations

from onnxscript import opset21 as op

from lowering.onnx.quantize import FLOAT, from_codes, i64, is_static, row_factor
from lowering.ops import linear as ops


@ops.linear_w8a8.impl("onnx")
def linear_w8a8(
    codes, scale, zero_point, weight, weight_scale, weight_sum, bias, outliers, outlier_weight, columns, dtype
):  # fmt: skip
    transposed = op.Transpose(weight, perm=[1, 0])
    floats = op.DequantizeLinear(transposed, weight_scale, axis=1)
    static = is_static(codes)  # then scale and zero point are in the QuantizeLinear
    y = op.MatMul(from_codes(codes), floats)
    if not static:
        y = op.Mul(y, row_factor(codes, scale))
    extra, extra_weight = outliers, None
    if columns is not None:
        extra_weight = op.Mul(op.Cast(op.Gather(transposed, columns, axis=0), to=FLOAT), weight_scale)
    elif outlier_weight is not None:
        extra_weight = op.Transpose(outlier_weight, perm=[1, 0])
    if zero_point is not None and not static:
        # y - zero_point · scale · Σ_k W: one more column of the float product.
        shift = op.Mul(op.Neg(op.Cast(zero_point, to=FLOAT)), scale)
        shift_weight = op.Unsqueeze(op.Mul(op.Cast(weight_sum, to=FLOAT), weight_scale), i64(0))
        extra = shift if extra is None else op.Concat(extra, shift, axis=-1)
        extra_weight = shift_weight if extra_weight is None else op.Concat(extra_weight, shift_weight, axis=0)
    if extra is not None:
        y = op.Add(y, op.MatMul(extra, extra_weight))
    if bias is not None:
        y = op.Add(y, bias)
    return op.Cast(y, to=dtype) if dtype != FLOAT else y


@ops.linear_w8a16.impl("onnx")
def linear_w8a16(x, weight, weight_scale, bias):
    y = op.MatMul(x, op.DequantizeLinear(op.Transpose(weight, perm=[1, 0]), weight_scale, axis=1))
    return y if bias is None else op.Add(y, bias)
