"""RMSNorm as ONNX nodes: one node from opset 23 on."""

from __future__ import annotations

import numpy as np
from onnxscript import opset23 as op

from lowering.onnx.quantize import f32, i64
from lowering.ops import norm as ops


def _gamma(x, weight, offset):
    if weight is None:
        return f32(np.ones(x.shape[-1]))
    return op.Add(weight, f32(offset)) if offset else weight


@ops.rms_norm.impl("onnx")
def rms_norm(x, weight, eps, offset, round_first):
    # These ops in this order are the form that ONNX Runtime and OpenVINO fuse into one kernel.
    mean_square = op.ReduceMean(op.Pow(x, f32(2.0)), i64(-1), keepdims=1)
    normalized = op.Div(x, op.Sqrt(op.Add(mean_square, f32(eps))))
    return normalized if weight is None else op.Mul(normalized, _gamma(x, weight, offset))


@ops.rms_norm.impl("onnx23")
def rms_normalization(x, weight, eps, offset, round_first):
    return op.RMSNormalization(x, _gamma(x, weight, offset), axis=-1, epsilon=eps)
