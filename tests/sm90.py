"""Triton kernels compiled ahead of time for an H100 (sm_90), without a GPU.

A host wrapper is run on meta tensors with its launches recorded instead of made, so what is compiled here is exactly
what it ships: same kernel, same constants, same warps and stages.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM90 = GPUTarget("cuda", 90, 32)
META = torch.device("meta")
BF16, F32, F16, I8, I32 = torch.bfloat16, torch.float32, torch.float16, torch.int8, torch.int32
WRAPPERS = ("act", "attention", "columns", "hilo", "linear", "linear_w8a16", "norm", "quantize")
POINTER = {
    F32: "*fp32", BF16: "*bf16", F16: "*fp16", I8: "*i8", torch.int16: "*i16", I32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def launches(monkeypatch: pytest.MonkeyPatch, operator: Any, *args: Any) -> list[Launch]:
    """What the host wrapper `operator` launches for `args` (meta tensors)."""
    recorded: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
                named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
                recorded.append(Launch(self.kernel, named, options))

            return launch

    for name in WRAPPERS:
        monkeypatch.setattr(importlib.import_module(f"lowering.triton.{name}"), "wrap_triton", Recorder)
    operator.__wrapped__(*args)
    return recorded


@dataclass(frozen=True)
class Compiled:
    ptx: str
    registers: int
    stack: int
    shared: int


def compile_for_sm90(launch: Launch) -> Compiled:
    """PTX and the resources of the machine code, as the runtime would compile this launch."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTER[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return resources(triton.compile(source, target=SM90, options=dict(launch.options)))


def compile_gluon(launch: Any) -> Compiled:
    """What a `lowering.triton.hopper.Launch` of stand-ins compiles."""
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    names = [parameter.name for parameter in launch.kernel.params]
    values = dict(zip(names, launch.arguments, strict=False)) | launch.constants
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        if isinstance(value, TensorDescriptor):
            rows, width = value.block_shape
            signature[parameter.name] = f"tensordesc<{POINTER[value.base.dtype][1:]}[{rows}, {width}],{value.layout!r}>"
        elif hasattr(value, "dtype"):
            signature[parameter.name] = POINTER[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or value == 1:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = "i32"
    options = {name: value for name, value in launch.constants.items() if name not in names}
    return resources(
        triton.compile(GluonASTSource(launch.kernel, signature, constants, attributes), target=SM90, options=options)
    )


def resources(built: Any) -> Compiled:
    """What a compiled kernel uses, from its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        usage = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", str(path)], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(built.asm["ptx"], found["REG"], found["STACK"] + found["LOCAL"], built.metadata.shared)


def _cuobjdump() -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not os.access(path, os.X_OK):
        pytest.skip("this Triton brings no cuobjdump")
    return str(path)


def one(monkeypatch: pytest.MonkeyPatch, operator: Any, *args: Any) -> tuple[Launch, Compiled]:
    (launch,) = launches(monkeypatch, operator, *args)
    return launch, compile_for_sm90(launch)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def w8a8_args(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = BF16,
    outlier: torch.dtype | None = None,
    r: int = 32,
    bare: bool = False,
) -> tuple[Any, ...]:
    """Zero point, bias and outliers at once: the most registers a tile can need; or with `bare` none of the three."""
    return (
        empty(m, k, dtype=I8), empty(m, 1, dtype=F32), None if bare else empty(m, 1, dtype=I32), empty(n, k, dtype=I8),
        empty(n, dtype=F32), None if bare else empty(n, dtype=I32), None if bare else empty(n, dtype=dtype),
        None if outlier is None else empty(m, r, dtype=dtype),
        None if outlier is None or outlier == I8 else empty(n, r, dtype=outlier),
        empty(r, dtype=torch.int64) if outlier == I8 else None, dtype,
    )  # fmt: skip
