"""The Triton kernels without a GPU: traced as Inductor traces them, and compiled ahead of time for an H100 (sm_90).

A host wrapper is run on meta tensors with its launches recorded instead of made, so what is compiled here is exactly
what it ships: same kernel, same constants, same warps and stages.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels need Triton")
if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels can be neither traced nor compiled", allow_module_level=True)

from torch._dynamo.source import ConstantSource  # noqa: E402
from torch._functorch.aot_autograd import aot_module_simplified  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.symbolic_shapes import (  # noqa: E402
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lowering.registry import Op, Sample, all_ops  # noqa: E402
from lowering.triton import linear, tuning  # noqa: E402

SM90 = GPUTarget("cuda", 90, 32)
META = torch.device("meta")
BF16, F32, F16, I8, I32 = torch.bfloat16, torch.float32, torch.float16, torch.int8, torch.int32
WRAPPERS = ("act", "columns", "linear", "norm", "quantize")
POINTER = {
    F32: "*fp32", BF16: "*bf16", F16: "*fp16", I8: "*i8", torch.int16: "*i16", I32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


# ---------------------------------------------------------------------------------------------------------------------
# Recording and compiling


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


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers


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


def shapes(tiles: linear.Tiles) -> list[tuple[int, int]]:
    """Rows and channels that select each entry of a table."""
    return [(4096 if m == math.inf else int(m), 28672 if n == math.inf else int(n) // 128 * 128) for m, n, _ in tiles]


@pytest.mark.parametrize(("m", "n"), shapes(linear.W8A8_TILES))
@pytest.mark.parametrize("form", ["bare", "affine", "bf16-outliers", "int8-outliers"])
def test_w8a8(monkeypatch: pytest.MonkeyPatch, m: int, n: int, form: str) -> None:
    outlier = {"bf16-outliers": BF16, "int8-outliers": I8}.get(form)
    args = w8a8_args(m, n, 4096, outlier=outlier, bare=form == "bare")
    launch, code = one(monkeypatch, linear.linear_w8a8_tiles, *args)
    assert code.stack == 0, "spills"
    assert code.shared <= 227 * 1024
    # Large tiles: two programs share a multiprocessor (64 K registers, 228 KB), one computes while the other waits.
    if launch.arguments["BLOCK_M"] == 128:
        assert 2 * 32 * launch.options["num_warps"] * code.registers <= 65536
        assert 2 * (code.shared + 1024) <= 228 * 1024
    if launch.arguments["BLOCK_M"] >= 64:
        assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8", code.ptx)
    else:
        assert re.search(r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8", code.ptx)
    # Weights and codes stream through shared memory without passing registers.
    assert "cp.async" in code.ptx


def shipped_tiles() -> list[tuning.Tile]:
    """Every tile of a shipped table."""
    entries = [entry for path in tuning.SHIPPED.glob("*.json") for entry in json.loads(path.read_text())["entries"]]
    return sorted({tuning.Tile(**e["choice"]) for e in entries if e["choice"] != tuning.WGMMA}, key=str)


@pytest.mark.parametrize("tile", shipped_tiles(), ids=str)
@pytest.mark.parametrize("outlier", [None, BF16], ids=["affine", "bf16-outliers"])
def test_a_shipped_tile_fits(monkeypatch: pytest.MonkeyPatch, tile: tuning.Tile, outlier: torch.dtype | None) -> None:
    with linear.forced(tile):
        launch, code = one(monkeypatch, linear.linear_w8a8_tiles, *w8a8_args(tile.m, 4096, 4096, outlier=outlier))
    assert (launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]) == (tile.m, tile.n)
    assert code.stack == 0, "spills"
    assert code.shared <= 227 * 1024
    assert ("wgmma" in code.ptx) == (tile.m >= 64)


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "outlier", "r"),
    [
        (1, 7, 123, F32, F32, 3),
        (123, 123, 123, F32, F32, 17),
        (4096, 320, 576, F16, I8, 128),
        (123, 1, 1, F16, None, 0),
        (17, 4096, 7, BF16, I8, 8),
    ],
    ids=str,
)
def test_w8a8_odd(
    monkeypatch: pytest.MonkeyPatch, m: int, n: int, k: int, dtype: torch.dtype, outlier: torch.dtype | None, r: int
) -> None:
    _, code = one(monkeypatch, linear.linear_w8a8_tiles, *w8a8_args(m, n, k, dtype, outlier, r))
    assert code.stack == 0, "spills"


W8A16_CASES = [
    *((m, n, BF16) for m, n in [(1, 4096), *shapes(linear.W8A16_TILES)]),
    *((m, n, F32) for m, n in [(1, 4096), *shapes(linear.W8A16_FP32_TILES)]),
]


@pytest.mark.parametrize(("m", "n", "dtype"), W8A16_CASES, ids=str)
def test_w8a16(monkeypatch: pytest.MonkeyPatch, m: int, n: int, dtype: torch.dtype) -> None:
    args = (empty(m, 4096, dtype=dtype), empty(n, 4096, dtype=I8), empty(n, dtype=F32), empty(n, dtype=dtype))
    _, code = one(monkeypatch, linear.linear_w8a16_tiles, *args)
    assert code.stack == 0, "spills"
    assert code.shared <= 227 * 1024
    assert ("mma" in code.ptx) == (m > 1 and dtype == BF16), "tensor cores for 16-bit floats, never for fp32 (tf32)"


# ---------------------------------------------------------------------------------------------------------------------
# Row kernels


def global_reads(code: Compiled) -> int:
    return len(re.findall(r"ld\.global", code.ptx))


@pytest.mark.parametrize("k", [123, 4096, 14336, 53248])
def test_row_kernels(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    from lowering.triton import act, norm, quantize

    x, columns = empty(64, k), empty(32, dtype=torch.int64)
    for operator, args in [
        (quantize.split_quantize_rows, (x, columns, False)),
        (norm.add_norm_quantize_rows, (x, x, empty(k), empty(k), 1e-5, 0.0, "layer", columns, False)),
        (act.act_mul_quantize_rows, (x, x, "silu", columns, True)),
    ]:
        _, code = one(monkeypatch, operator, *args)
        assert code.stack == 0, f"{operator.__name__} spills"


def test_a_row_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes over a row that fits share their loads: 4096 bf16 elements on 256 threads are two 16-byte loads."""
    from lowering.triton import norm, quantize

    x = empty(64, 4096)
    _, code = one(monkeypatch, quantize.quantize_rows, x, True)
    assert global_reads(code) == 2
    assert "ld.global.v4" in code.ptx
    _, code = one(
        monkeypatch, norm.add_norm_quantize_rows, x, x, empty(4096), None, 1e-5, 0.0, "rms_round_first", None, True
    )
    assert global_reads(code) == 6  # x, residual and gamma


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_column_absmax(monkeypatch: pytest.MonkeyPatch, threshold: float) -> None:
    from lowering.triton import quantize

    passes = launches(monkeypatch, quantize.split_quantize_rows_dynamic, empty(64, 14336), 64, threshold, True)
    assert [launch.kernel.__name__ for launch in passes] == [
        "_column_absmax_kernel", "_choose_columns_kernel", "_quantize_rows_kernel"
    ]  # fmt: skip
    codes = [compile_for_sm90(launch) for launch in passes]
    assert all(code.stack == 0 for code in codes)
    assert re.search(r"(red|atom)\.global\S*\.max\.s32", codes[0].ptx)
    # Only under a threshold are there few enough to list, and a count.
    assert bool(re.search(r"(red|atom)\.global\S*\.add\.", codes[0].ptx)) == (threshold > 0.0)


def test_dynamic_prologues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes over the rows, the choice of columns between them; nothing spills."""
    from lowering.triton import act, norm

    x, wide = empty(512, 4096), empty(512, 14336)
    for operator, args, first in [
        (norm.add_norm_quantize_rows_dynamic, (x, x, empty(4096), None, 1e-5, 0.0, "rms", 64, 0.0, False), "norm"),
        (act.act_mul_quantize_rows_dynamic, (wide, wide, "silu", 64, 6.0, True), "product"),
    ]:
        passes = launches(monkeypatch, operator, *args)
        assert passes[0].kernel.__name__ == f"_{first}_absmax_kernel"
        assert len(passes) == 3
        for launch in (passes[0], passes[2]):
            assert compile_for_sm90(launch).stack == 0, f"{launch.kernel.__name__} spills"


# ---------------------------------------------------------------------------------------------------------------------
# Tracing


class _OfflineDriver:
    """Tells Triton the target, which is all that torch's analysis of a kernel's writes asks for."""

    def get_current_target(self) -> GPUTarget:
        return SM90


@pytest.fixture
def offline_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", _OfflineDriver())


WITH_ROWS = [op for op in all_ops().values() if not op.name.startswith("dequantize_weight")]


def traced_samples() -> list[Any]:
    """The first sample of every op; of those that search for columns one with a threshold too."""
    found = []
    for op in WITH_ROWS:
        fit = [s for s in op.samples(torch.device("cpu")) if not {0, 1} & {*s.args[0].shape}]
        above = [s for s in fit if op.name.endswith("_dynamic") and s.args[-1 - (not op.name.startswith("out"))] > 0]
        found += [
            pytest.param(op, s, id=f"{op.name}-{s.label}") for s in {id(s): s for s in [fit[0], *above[:1]]}.values()
        ]
    return found


@pytest.mark.usefixtures("offline_driver")
@pytest.mark.parametrize(("op", "sample"), traced_samples())
def test_traces_with_symbolic_rows(op: Op, sample: Sample) -> None:
    """AOTAutograd sees through every implementation: a symbolic number of rows stays so, only results are written."""
    lead = sample.args[0].shape[:-1]
    graph, env = torch.fx.Graph(), ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    nodes, args = [], []
    for i, value in enumerate(sample.args):
        if isinstance(value, Tensor):
            by_row = value.dim() >= 2 and value.shape[:-1] == lead and value.shape[-1] != lead[0]
            rows = DimDynamic.DUCK if by_row else DimDynamic.STATIC  # equal sizes are one symbol
            sizes = [rows] * (value.dim() - 1) + [DimDynamic.STATIC] * min(1, value.dim())
            args.append(
                mode.from_tensor(
                    value.contiguous(),
                    source=ConstantSource(f"argument{i}"),
                    symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
                )
            )
            nodes.append(graph.placeholder(f"argument{i}"))
        else:
            args.append(value)
            nodes.append(value)
    chosen = op.choose("triton", tuple(args))
    result = graph.call_function(chosen.function, tuple(nodes))
    graph.output(result if isinstance(op.reference(*sample.args), tuple) else (result,))
    traced: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        traced.append(module)
        return module.forward

    fakes = [a for a in args if isinstance(a, Tensor)]
    aot_module_simplified(torch.fx.GraphModule({}, graph), fakes, fw_compiler=keep)
    assert not env.guards, [str(guard.expr) for guard in env.guards]
    kernels = [n for n in traced[0].graph.nodes if "triton_kernel" in str(n.target)]
    if chosen.function is op.reference:
        assert not kernels
        return
    assert kernels
    results = {
        "bits", "extent", "out", "hidden", "codes", "scale", "zero_point", "outliers", "marks", "columns", "overflow",
    }  # fmt: skip
    for node in kernels:
        one_program = "marks" in node.kwargs["tensors_to_clone"]  # the choice of columns, whatever the rows
        assert one_program or isinstance(node.kwargs["grid"][0][0], torch.fx.Node), "the grid was specialized"
        written = set(node.kwargs["tensors_to_clone"])
        inputs = {name for name, value in node.kwargs["kwargs"].items() if isinstance(value, torch.fx.Node)}
        assert written <= results & inputs


def test_a_tile_is_chosen_from_the_hint_without_a_guard() -> None:
    from lowering.triton.launch import UNKNOWN_ROWS, expected_rows

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    x = mode.from_tensor(
        torch.empty(48, 8),
        source=ConstantSource("x"),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC]),
    )
    assert expected_rows(x.shape[0]) == 48
    assert expected_rows(env.create_unbacked_symint()) == UNKNOWN_ROWS
    assert expected_rows(3) == 3
    assert not env.guards
