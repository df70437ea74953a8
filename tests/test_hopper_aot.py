"""The Gluon kernel without a GPU: compiled ahead of time for an H100, in every form that is launched."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernel needs Triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Gluon cannot be interpreted", allow_module_level=True)
hopper = pytest.importorskip("lowering.triton.hopper", reason="the kernel needs Gluon for Hopper")

from sm90 import SM90, Compiled, resources  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from lowering.numerics import block_width  # noqa: E402
from lowering.triton.act import CODE  # noqa: E402

BF16, I8 = torch.bfloat16, torch.int8


def tile(kind: str, rows: int, width: int, dtype: torch.dtype) -> str:
    """Signature of a TMA descriptor."""
    return f"tensordesc<{kind}[{rows}, {width}],{hopper.layout(rows, width, dtype)!r}>"


def compiled(
    k: int, r: int, code_columns: bool, affine: bool, act: int, wide: bool = True, hilo: bool = False,
    residual: bool = False,
) -> Compiled:  # fmt: skip
    """What `hopper.launch` would compile for these forms, bf16 out."""
    side, half, depth = hopper.PART, hopper.HALF, hopper.BLOCK_K
    depth_r = 32 if r <= 32 else 64
    signature: dict[str, str] = {
        "a": tile("i8", side, depth, I8), "w": tile("i8", half, depth, I8), "c": tile("bf16", side, half, BF16),
        "scale": "*fp32", "scale_stride": "i32", "zero_point_stride": "i32", "weight_scale": "*fp32",
        "M": "i32", "N": "i32", "rows": "i32",
    }  # fmt: skip
    if r:
        signature |= {"o": tile("bf16", side, depth_r, BF16), "ow": tile("bf16", half, depth_r, BF16)}
    if affine:
        signature |= {"zero_point": "*i32", "weight_sum": "*i32", "bias": "*bf16"}
    if hilo:
        signature |= {"ah": tile("i8", side, depth, I8), "blocks": "*i32"}
    if residual:
        signature |= {"x": tile("bf16", side, half, BF16)}
    gated = act >= 0
    constants: dict[str, Any] = {
        "K": k, "R": r, "PER": block_width(k) // depth if hilo else 0, "CODES": code_columns, "ACT": act,
        "NEXT": half if gated or not wide else 2 * half,
        "SECOND": 14336 if gated else half, "BUFFERS": hopper.BUFFERS if wide else hopper.NARROW_BUFFERS, "WIDE": wide,
        "PART": side, "HALF": half, "BLOCK_K": depth, "GROUP": hopper.GROUP,
        "REGISTERS": hopper.REGISTERS, "LOADER_REGISTERS": hopper.LOADER_REGISTERS,
    }  # fmt: skip
    kernel = hopper.linear_w8a8_wgmma
    names = [p.name for p in kernel.params]
    full = {name: signature.get(name, "constexpr") for name in names}
    values = {(i,): constants.get(name) for i, name in enumerate(names) if full[name] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if full[name].startswith("*")}
    source = GluonASTSource(kernel, full, values, aligned)
    return resources(triton.compile(source, target=SM90, options={"num_warps": hopper.WARPS}))


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize(
    ("k", "r", "code_columns", "affine", "act", "hilo", "residual"),
    [
        (4096, 0, False, False, hopper.NO_ACTIVATION, False, False),
        (4096, 0, False, True, hopper.NO_ACTIVATION, False, False),
        (4096, 32, False, True, hopper.NO_ACTIVATION, False, False),
        (14336, 64, True, True, hopper.NO_ACTIVATION, False, False),
        (528, 24, False, False, hopper.NO_ACTIVATION, False, False),
        *((4096, 0, False, False, CODE[name], False, False) for name in ("silu", "gelu_tanh", "relu", "sigmoid")),
        (4096, 32, False, True, CODE["silu"], False, False),
        (4096, 64, True, True, CODE["silu"], False, False),
        (4096, 0, False, True, hopper.NO_ACTIVATION, True, False),
        (14336, 0, False, False, hopper.NO_ACTIVATION, True, False),
        (4096, 0, False, True, CODE["silu"], True, False),
        (4096, 0, False, False, hopper.NO_ACTIVATION, False, True),
        (14336, 32, False, True, hopper.NO_ACTIVATION, False, True),
        (4096, 0, False, True, hopper.NO_ACTIVATION, True, True),
    ],
)
def test_asynchronous_wgmma(
    k: int, r: int, code_columns: bool, affine: bool, act: int, hilo: bool, residual: bool, wide: bool
) -> None:
    if act >= 0 and not wide:
        pytest.skip("the gate product takes both halves")
    code = compiled(k, r, code_columns, affine, act, wide, hilo, residual)
    # A thread that multiplies has 240 registers, 128 of them for sums.
    assert code.stack == 0, "spills"
    assert code.shared <= 227 * 1024
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in code.ptx
    # Products stay under way while the next step is prepared; Triton's own int8 loop waits for all.
    assert ("2" if wide else "1") in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", code.ptx)
    assert ("bf16.bf16" in code.ptx) == (r > 0)
    # A buffer is free once all warps have waited for its products: one thread says so, after a barrier.
    waits = [m.end() for m in re.finditer(r"wgmma\.wait_group\.sync\.aligned", code.ptx)]
    for wait in waits:
        between = code.ptx[wait : code.ptx.index("mbarrier.arrive.shared", wait)]
        assert "bar.sync" in between
    # The buffers of a residual are read as by any thread and filled again by TMA, which a fence puts in order.
    for read in [m.end() for m in re.finditer(r"mbarrier\.try_wait", code.ptx)]:
        freed = code.ptx.find("mbarrier.arrive.shared", read)
        between = code.ptx[read:freed]
        if "ldmatrix" in between and "wgmma" not in between:
            assert "fence.proxy.async" in between[between.rindex("ldmatrix") :]
    assert "setmaxnreg.dec.sync.aligned.u32" in code.ptx, "one warp loads, the others multiply"
