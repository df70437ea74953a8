"""Every op of the portable form and both int8 linears: its ONNX translation in ONNX Runtime against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from kernel_checks import compare
from torch import Tensor, nn

import lowering.ops  # noqa: F401
from int8pass.graph.dialect import PORTABLE_OPS
from int8pass.translate import quiet
from lowering.onnx import translations
from lowering.registry import Op, Sample, all_ops

EXPORTED = (PORTABLE_OPS | {"rms_norm", "linear_w8a8", "linear_w8a16"}) & set(all_ops())
CPU = torch.device("cpu")


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in {torch.bfloat16, torch.float16}:
        return value.float()
    return torch.float32 if value in {torch.bfloat16, torch.float16} and isinstance(value, torch.dtype) else value


PER_OP = 4  # each is an export and a session; dtypes are all float32 here, so that samples repeat each other


def _cases() -> list[Any]:
    found = []
    for name in sorted(EXPORTED):
        samples = list(all_ops()[name].samples(CPU))
        step = max(1, len(samples) // PER_OP)
        for sample in samples[::step]:
            if all(not isinstance(a, Tensor) or a.numel() for a in sample.args):
                found.append(pytest.param(name, sample.label, id=f"{name}-{sample.label}"))
    return found


class _Call(nn.Module):
    """One op with everything but its first argument in place."""

    def __init__(self, op: Op, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.args = op, args
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                self.register_buffer(f"a{i}", value)

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        return self.op(*(next(given) if isinstance(a, Tensor) else a for a in self.args))


def run_in_onnx(op: Op, args: tuple[Any, ...], opset: int) -> list[np.ndarray]:
    """The op alone in a file, in ONNX Runtime, nothing optimized away."""
    tensors = tuple(a.contiguous() for a in args if isinstance(a, Tensor))
    with quiet(), torch.no_grad():
        made = torch.onnx.export(
            torch.export.export(_Call(op, args), tensors, strict=False), dynamo=True, opset_version=opset,
            custom_translation_table=translations(opset), optimize=False, verbose=False,
        )  # fmt: skip
    assert made is not None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(made.model).SerializeToString(), options)
    return session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors)})


@pytest.mark.parametrize("name", sorted(PORTABLE_OPS & set(all_ops())))
def test_an_op_of_the_portable_form_has_a_translation(name: str) -> None:
    op = all_ops()[name]
    assert any(i.target == "onnx" for i in op.implementations), f"{name} cannot be exported"


@pytest.mark.parametrize(("name", "label"), _cases())
def test_translation_computes_the_reference(name: str, label: str) -> None:
    op = all_ops()[name]
    sample: Sample = next(s for s in op.samples(CPU) if s.label == label)
    args = tuple(_float32(a) for a in sample.args)
    expected = op.reference(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    opsets = (21, 23) if any(i.target == "onnx23" for i in op.implementations) else (21,)
    for opset in opsets:
        found = run_in_onnx(op, args, opset)
        assert len(found) == len(expected)
        compare(tuple(torch.from_numpy(np.asarray(f)) for f in found), expected, op.tolerance)
