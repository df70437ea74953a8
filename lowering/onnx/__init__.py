"""ONNX translations: each op of the portable form, and the int8 linears, as QDQ nodes of the standard opset.

Translations follow the references literally: int8 codes are int8, zero points of QuantizeLinear are 0. What a runtime
wants otherwise (unsigned activations on x86) is a rewrite of the finished file, the same one `int8pass lint --fix`
applies to files of other tools. They compute in float32, which is what the int8 kernels of ONNX Runtime and OpenVINO
take (fp16 and bf16 QDQ stays unfused).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowering.onnx import attention, linear, norm, quantize
from lowering.registry import all_ops


def translations(opset: int, target: str = "portable") -> dict[Any, Callable[..., Any]]:
    """Op overload → translation for a model of that opset, as `torch.onnx.export(custom_translation_table=...)`.

    An implementation for target "onnx23" stands in for the one for "onnx" from opset 23 on.
    """
    native = attention.clamped_attention if target == "onnxruntime" else attention.attention_node
    table: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.scaled_dot_product_attention.default: (
            native if opset >= 23 else attention.scaled_dot_product_attention
        )
    }
    for op in all_ops().values():
        for form in ("onnx", *(["onnx23"] if opset >= 23 else [])):
            for implementation in op.implementations:
                if implementation.target == form:
                    table[op.overload] = implementation.function
    return table


__all__ = ["attention", "linear", "norm", "quantize", "translations"]
