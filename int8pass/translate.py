"""Translation of a portable program to ONNX, by torch.onnx with the translations of our ops."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.export import ExportedProgram

from int8pass.errors import UnsupportedError
from int8pass.graph.pattern import op_name
from int8pass.match import module_path, source_line

if TYPE_CHECKING:
    import onnx_ir as ir

OPSETS = {"onnxruntime": 23, "openvino": 23, "tensorrt": 21, "portable": 23}
"""RMSNormalization and Attention are one node from 23 on, which not every TensorRT reads."""


def to_onnx(portable: ExportedProgram, target: str) -> ir.Model:
    """The ONNX model of a portable program, in the form the target's kernels are matched by.

    Raises:
        UnsupportedError: an op of the model has no ONNX translation in torch; names module and line.
    """
    import lowering.onnx
    from int8pass.qdq import rewrite, simplify

    opset = OPSETS[target]
    try:
        with quiet():
            made = torch.onnx.export(
                portable,
                dynamo=True,
                opset_version=opset,
                custom_translation_table=lowering.onnx.translations(opset, target),
                optimize=False,  # below, after the weights are where they belong
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise _untranslated(portable, opset, error) from error
    assert made is not None
    tensors = [n for n in portable.graph.nodes if n.name in portable.graph_signature.user_inputs]
    for value, node in zip(made.model.graph.inputs, (n for n in tensors if isinstance(n.meta.get("val"), Tensor))):
        value.name = node.name
    rewrite.prepare(made.model, unsigned=target != "tensorrt")
    simplify.simplify(made.model, unsigned=target != "tensorrt")
    return made.model


def _untranslated(portable: ExportedProgram, opset: int, error: Exception) -> UnsupportedError:
    """Which node of the model has no translation, for people."""
    cause = _root(error)
    text = str(cause)
    named = re.search(r"op='\w+\.(\w+)'", text)  # perhaps what torch decomposed the model's op into
    for node in portable.graph.nodes:
        if named and op_name(node).endswith(named[1]):
            return UnsupportedError(
                f"{node.target} has no translation to ONNX opset {opset}: used by {module_path(node)} at "
                f"{source_line(node)}. Write that part with other ops, or export the model without it."
            )
    return UnsupportedError(f"torch.onnx cannot translate the model: {type(cause).__name__}: {text[:1000]}")


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def quiet() -> Iterator[None]:
    """torch's own deprecations and remarks are none of the user's business."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "torchvision is not installed"
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.filterwarnings("ignore", category=category)
            yield
    finally:
        logger.setLevel(level)
