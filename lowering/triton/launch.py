"""What the host side of every kernel shares: registration, views of the arguments, and when a kernel takes them.

Every host wrapper is a `torch.library.triton_op`, not an opaque `custom_op`: AOTAutograd and Inductor then see the
kernel launches and the small tensor code around them, so buffers are planned, unused outputs are dropped, the rest
fuses with its neighbours, no dispatcher runs per call, and shapes of fake tensors come from the wrapper itself. The
exception are the Gluon kernels, into which neither can look.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from triton.runtime.jit import JITFunction

NAMESPACE = "int8pass_triton"
_making = threading.Lock()

# Triton's interpreter multiplies the raw bits of bf16 operands in `tl.dot`, and truncates where a GPU rounds to bf16:
# kernels work around both when this is set.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# A row of up to this many elements stays in registers; a longer one is read in pieces, once per pass.
MAX_BLOCK, PIECE = 16384, 2048
# Rows assumed for a symbolic size without a hint: a wrong guess costs time, never correctness.
UNKNOWN_ROWS = 4096
# Up to so many rows a step is reading the weights, and the Gluon kernel that begins to read them early is the fastest
# (`lowering.triton.hopper_few`).
FEW_ROWS = 64


@triton.jit
def rounded(y, element: tl.constexpr):
    """fp32 `y` as `element`, rounded to nearest, ties to even."""
    if INTERPRETED and element == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        y = tl.where(y == y, bits.to(tl.float32, bitcast=True), y)
    return y.to(element)


@triton.jit
def follow(LINKED: tl.constexpr):
    """Let the kernel behind this one start, and wait until the one ahead has ended and what it wrote can be read.

    First in a kernel: then all that came before the kernel ahead has ended, too. A kernel that was not launched early
    has nothing to wait for; the one behind it may be all the same. So whatever is launched early in such a stream must
    wait in every program, and read nothing before that another kernel writes: Inductor's own kernels do not
    (`int8pass.lower`).
    """
    if LINKED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def ask_early(parameters, K: tl.constexpr, BLOCK: tl.constexpr, LINKED: tl.constexpr):
    """Before `follow`: have K parameters brought to the L2, which is as right at any time."""
    if LINKED and parameters is not None:
        LINES: tl.constexpr = max(1, BLOCK // 32)  # of 64 or 128 bytes
        at = tl.arange(0, LINES) * 32
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [parameters + tl.where(at < K, at, 0)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """True for a GPU that is there and has `wgmma`."""
    there = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _driver() -> int:
    """The CUDA version of the driver, 12030 for 12.3; 0 where there is none to ask."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return 0 if failed else version.value


@torch.compiler.assume_constant_result  # Dynamo cannot ask the driver
def overlaps(device: torch.device) -> bool:
    """Whether launches on a device may overlap (programmatic dependent launch, CUDA C++ Programming Guide, section
    6.2.7), in CUDA graphs too: since CUDA 12.3 these have edges for it.

    Not in a process whose Inductor does so, too: a kernel of its own may read what ours still writes.
    """
    return is_hopper(device) and _driver() >= 12030 and os.environ.get("TORCHINDUCTOR_ENABLE_PDL") != "1"


def linked(device: torch.device, rows: Any) -> bool:
    """Whether a kernel over `rows` starts while the one before it runs: where steps are reading weights, and a linear
    can begin with those."""
    return overlaps(device) and expected_rows(rows) <= FEW_ROWS


def traceable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a host wrapper the operator `int8pass_triton::<its name>`; the result keeps name and signature.

    The operator is made by the first call: for each PyTorch reads the wrapper's source, and a graph has few of them.
    Dynamo cannot trace that first call, and never meets one: a lowered graph has been run on fake tensors before.
    """

    made: Any = None

    def operator() -> Any:
        nonlocal made
        with _making:
            if made is None:
                made = torch.library.triton_op(f"{NAMESPACE}::{function.__name__}", mutates_args=())(function)
        return made

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return operator()(*args) if made is None else made(*args)

    call.operator = operator  # type: ignore[attr-defined]
    return call


def writes(*names: str) -> Callable[[Any], Any]:
    """Say which pointers a kernel writes to, and save PyTorch the run of Triton's front end that finds out
    (`int8pass.asked_once`). The tests compare."""

    def mark(kernel: Any) -> Any:
        kernel.writes = names
        return kernel

    return mark


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton`, except for interpreted kernels, which nothing traces.

    It keeps that name: torch finds the kernels whose source belongs in its cache keys by looking for calls of it.
    """
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


class Rows(NamedTuple):
    """`x[..., K]` as a kernel reads it: `count` rows of `width` adjacent elements, `stride` elements apart."""

    data: Tensor
    count: Any
    width: int
    stride: Any


def as_rows(x: Tensor) -> Rows:
    """`x` itself wherever one stride reaches every row (views of a merged linear, expanded rows), else a copy.

    No reshape where none is needed: a kernel argument that is a view can cost a copy in Inductor.
    """
    width = x.shape[-1]
    leading = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if not _is(size, 1)]
    regular = all(_is(outer_stride, size * stride) for (_, outer_stride), (size, stride) in itertools.pairwise(leading))
    if not regular or not (_is(x.stride(-1), 1) or width == 1):
        x = x.contiguous()
        leading = []
    return Rows(x, math.prod(x.shape[:-1]), width, leading[-1][1] if leading else width)


def _is(size: Any, value: Any) -> bool:
    """Equal for certain; of symbolic sizes nothing is assumed."""
    return statically_known_true(size == value)


def per_row(value: Tensor, x: Tensor) -> Tensor:
    """One value per row, `[..., 1]` (or broadcast to it), as `[M]` with any stride."""
    return value.expand(*x.shape[:-1], 1).reshape(-1)


def empty(m: Any) -> bool:
    """True when `m` rows are known to be none; a symbolic size is never asked (that would be a guard)."""
    return isinstance(m, int) and m == 0


def expected_rows(m: Any) -> int:
    """A number to choose a tile by: `m` itself, or the hint of a symbolic size, which adds no guard."""
    if isinstance(m, int):
        return m
    return int(m.node.hint) if m.node.has_hint() and isinstance(m.node.hint, int) else UNKNOWN_ROWS


def row_block(k: int) -> tuple[int, int]:
    """Elements of a row held at once and warps to hold them, 16 to 32 elements a thread."""
    block = triton.next_power_of_2(k)
    if block > MAX_BLOCK:
        block = PIECE
    return block, max(1, min(16, block // 512))


def takes_rows(*tensors: Tensor | None) -> bool | str:
    """The condition of the row kernels: 16 and 32-bit floats whose last size is a number."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            return f"the Triton kernels take float32, bfloat16 and float16, not {tensor.dtype}"
        if tensor.dim() == 0 or not isinstance(tensor.shape[-1], int) or tensor.shape[-1] == 0:
            return "the Triton kernels need a last dimension of fixed size, at least 1"
    return True
