"""Tensors that end where memory ends: one element beyond them is a segmentation fault, not whatever lies there.

What a sanitizer tells of kernels on a GPU, for those that are interpreted or native: of what they read.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from typing import Any

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_NOTHING, _READ_WRITE, _PRIVATE = 0, 3, 2  # of Linux's mmap and mprotect
_ANONYMOUS = 0x20


def guarded(value: Any) -> Any:
    """A copy of a CPU tensor with its strides, before a page that nobody may touch; anything else as it is."""
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.numel() == 0 or sys.platform != "linux":
        return value
    span = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
    flat = _memory(span, value.dtype)
    flat.copy_(value.as_strided((span,), (1,)))
    return flat.as_strided(value.shape, value.stride())


def _memory(count: int, dtype: torch.dtype) -> Tensor:
    size = count * dtype.itemsize
    room = -(-size // PAGE) * PAGE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    start = libc.mmap(None, room + PAGE, _READ_WRITE, _PRIVATE | _ANONYMOUS, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value) or libc.mprotect(start + room, PAGE, _NOTHING):
        raise OSError(ctypes.get_errno(), "no guarded memory")
    buffer = (ctypes.c_uint8 * size).from_address(start + room - size)
    weakref.finalize(buffer, libc.munmap, start, room + PAGE)
    return torch.frombuffer(buffer, dtype=dtype, count=count)
