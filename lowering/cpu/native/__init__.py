"""C++ kernels of our own, compiled for the processor they run on when they are first needed.

One int8 product with everything before and after it in cache: plain tensor code writes an int32 product of four bytes
an element to memory, and gives Inductor some twenty nodes a site to schedule and compile. Needs AVX512-VNNI (and uses
AMX where there is some) and the C++ compiler that Inductor needs anyway; `refusal` says what is missing. The compiled
library lies in Inductor's cache folder, under a name that changes with the sources, torch, compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowering.ops import act, attention, linear, quantize

NAMESPACE = "int8pass_cpu"
# Sums of products of two bytes overflow int32 beyond this many input channels.
MAX_K = 65536
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_LOG = logging.getLogger("int8pass")
_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-w")
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


_BUILDING = threading.Lock()


def prepare() -> None:
    """Start to build and load the kernels beside whatever the caller does next; `refusal` waits for the end of it."""
    if sys.platform.startswith("linux") and not _load.cache_info().currsize:
        threading.Thread(target=refusal, name="int8pass-native", daemon=True).start()


def refusal() -> str | None:
    """None when the kernels are loaded, which the first call does; else why they cannot be."""
    with _BUILDING:
        return _load()


@functools.cache
def _load() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"the native kernels are for Linux, not {sys.platform}"
    try:
        torch.ops.load_library(str(library()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = _reason(error)
        _LOG.warning("int8pass: native CPU kernels not available, torch._int_mm is used: %s", reason)
        return reason
    return None


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, OSError):
        return f"the native kernels do not load ({error})"
    lines = [line for line in (error.stderr or "").splitlines() if "error" in line]
    return f"the native kernels do not compile ({lines[0].split('error')[-1].strip(': ') if lines else error})"


def library() -> Path:
    """The compiled kernels; compiles them where they are not in the cache.

    Raises:
        OSError: no compiler, or no place to write.
        subprocess.CalledProcessError: the compiler fails; its `stderr` says why.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    compiler = get_cpp_compiler()
    sources = sorted(path for path in _FOLDER.iterdir() if path.suffix in {".h", ".cpp"})
    key = hashlib.sha256(repr((torch.__version__, compiler, _FLAGS, _processor())).encode())
    for path in sources:
        key.update(path.read_bytes())
    target = Path(cache_dir()) / "int8pass" / f"{key.hexdigest()[:24]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def run(*arguments: str) -> None:
            subprocess.run([compiler, *_FLAGS, *arguments], check=True, capture_output=True, text=True)

        def compile_one(source: Path) -> str:
            object_file = str(Path(folder) / f"{source.stem}.o")
            run("-c", f"-I{root / 'include'}", str(source), "-o", object_file)
            return object_file

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_one, (path for path in sources if path.suffix == ".cpp")))
        part = Path(folder) / target.name
        run("-shared", *objects, "-o", str(part), f"-L{root / 'lib'}", "-ltorch_cpu")
        part.replace(target)  # whole or not at all, whoever else compiles it now
    return target


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    return next((line for line in lines if line.startswith("flags")), "")


def use_tiles(on: bool) -> bool:
    """Whether AMX multiplies, from now on; for tests of the AVX512-VNNI loops. Returns what was in force."""
    return bool(ctypes.CDLL(str(library())).int8pass_use_tiles(int(on)))


def has_tiles() -> bool:
    """Whether AMX multiplies: the processor has it, the system gave it, and the kernels are loaded."""
    return refusal() is None and bool(ctypes.CDLL(str(library())).int8pass_has_tiles())


def _operator(reference: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag) -> torch._ops.OpOverload:
    """Define `int8pass_cpu::<name>` with the schema of an op's reference; the loaded library implements it."""
    name, tags = reference.__name__, (torch.Tag.pt2_compliant_tag, *tags)
    _LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=()), tags=tags)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    one = (*x.shape[:-1], 1)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(one, dtype=torch.float32),
        x.new_empty(one, dtype=torch.int32),
    )


def _split(x: Tensor, columns: Tensor, symmetric: bool) -> tuple[Tensor, ...]:
    return (*_quantized(x), x.new_empty((*x.shape[:-1], columns.shape[0])))


def _split_dynamic(x: Tensor, capacity: int, threshold: float, symmetric: bool) -> tuple[Tensor, ...]:
    columns = x.new_empty(min(capacity, x.shape[-1]), dtype=torch.int64)
    return (*_split(x, columns, symmetric), columns, x.new_empty((), dtype=torch.int32))


def _product(codes: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=rest[-1])


def _gated_product(codes: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0] // 2), dtype=rest[-2])


def _attended(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[-1]))


quantize_per_token = _operator(quantize.quantize_per_token.reference, lambda x, symmetric: _quantized(x))
split_quantize = _operator(quantize.split_quantize.reference, _split)
split_quantize_dynamic = _operator(quantize.split_quantize_dynamic.reference, _split_dynamic)
linear_w8a8 = _operator(linear.linear_w8a8.reference, _product)
gated_linear = _operator(act.gated_linear, _gated_product)
# Of [batch, query, head, channel], as the output projection wants them. Inputs may have any layout: one that is asked
# for makes Inductor copy a mask, by computing it anew, for every layer.
attend = _operator(attention.attention.reference, _attended, torch.Tag.flexible_layout)
linear_w8a16 = _operator(
    linear.linear_w8a16.reference, lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0]))
)


def takes(x: Tensor, *others: Tensor | None) -> bool | str:
    """Whether the kernels take float tensors `x` and `others` with rows of `x.shape[-1]` channels."""
    for tensor in (x, *others):
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"the native kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    return takes_width(x)


def takes_width(x: Tensor) -> bool | str:
    """Whether the kernels take rows of `x.shape[-1]` channels."""
    width = x.shape[-1]
    if not isinstance(width, int) or not 0 < width <= MAX_K:
        return f"the native kernels take rows of a fixed width from 1 to {MAX_K}"
    return refusal() or True
