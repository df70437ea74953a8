"""Other tools' int8 forms of a model, for the table of `benchmarks.accuracy`: package → what makes the model int8.

Each takes a model that is its own (it may be changed) and batches for calibration, and imports its package only then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def torchao_dynamic(model: nn.Module, calibration: list[dict[str, Any]]) -> nn.Module:
    """torchao: int8 dynamic activations, int8 weights."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), _is_quantized)
    return model


def torchao_smoothquant(model: nn.Module, calibration: list[dict[str, Any]]) -> nn.Module:
    """torchao's SmoothQuant, α = 0.5, int8 dynamic."""
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    base = Int8DynamicActivationInt8WeightConfig()
    quantize_(model, SmoothQuantConfig(base_config=base, step="prepare", alpha=0.5), _is_quantized)
    with torch.no_grad():
        for batch in calibration[:4]:
            model(**batch)
    quantize_(model, SmoothQuantConfig(base_config=base, step="convert"))
    return model


def bitsandbytes_int8(model: nn.Module, calibration: list[dict[str, Any]]) -> nn.Module:
    """bitsandbytes LLM.int8(), threshold 6, its CPU path."""
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                new = bnb.nn.Linear8bitLt(
                    child.in_features, child.out_features, child.bias is not None, has_fp16_weights=False, threshold=6.0
                )
                new.load_state_dict(child.state_dict())
                setattr(module, name, new.to("cpu"))
    return model


def quanto_w8a8(model: nn.Module, calibration: list[dict[str, Any]]) -> nn.Module:
    """optimum-quanto: int8 weights, int8 static activations."""
    from optimum.quanto import Calibration as QuantoCalibration
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8, activations=qint8, exclude="lm_head")
    with torch.no_grad(), QuantoCalibration():
        for batch in calibration[:4]:
            model(**batch)
    freeze(model)
    return model


def _is_quantized(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and not path.endswith("lm_head")


PEERS: dict[str, tuple[str, Callable[[nn.Module, list[dict[str, Any]]], nn.Module]]] = {
    "torchao int8 dynamic": ("torchao", torchao_dynamic),
    "torchao SmoothQuant α=0.5": ("torchao", torchao_smoothquant),
    "bitsandbytes LLM.int8()": ("bitsandbytes", bitsandbytes_int8),
    "optimum-quanto w8a8": ("optimum-quanto", quanto_w8a8),
}
