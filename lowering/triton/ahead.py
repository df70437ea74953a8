"""What can be compiled beside the stages that come before the first call.

Before its first kernel Triton hashes all of itself and has a C compiler build its driver: half a second each, which
need nothing of the model. And there are kernels that Inductor does not compile.

Inductor compiles the kernels it can see in processes of its own while it makes the rest of a graph. One that it cannot
see would be compiled when the graph first reaches it: 0.3 to 0.8 s each, launcher included. Tracing asks for the shapes
of its result seconds earlier, and knows all that the compiler needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
from triton.runtime.cache import triton_key

THREADS = 4
_started: set[str] = set()
_pending: list[Future[None]] = []
_pool: ThreadPoolExecutor | None = None
_prepared: list[Future[Any]] = []


def _threads() -> ThreadPoolExecutor:
    global _pool
    _pool = _pool or ThreadPoolExecutor(THREADS, thread_name_prefix="int8pass-compile")
    return _pool


def possible(device: torch.device) -> bool:
    """Whether there is a GPU to compile for: models are traced for one where there is none, too."""
    return device.type == "cuda" and torch.cuda.is_available()


def prepare(device: torch.device) -> None:
    """Begin what Triton does once per process."""
    if not _prepared and possible(device):
        _prepared.extend(_threads().submit(task) for task in (triton_key, lambda: triton.runtime.driver.active))


def prepared() -> None:
    """Until that is there: two threads at once would do it twice."""
    for task in _prepared:
        task.exception()


def compile(kernel: Any, device: torch.device, arguments: Sequence[Any], constants: Mapping[str, Any]) -> None:
    """Begin to compile and load `kernel` for these arguments (stand-ins of tensors), once."""
    signature = repr([kernel, device, [_described(a) for a in arguments], sorted(constants.items())])
    if signature in _started:
        return
    prepared()
    triton.runtime.driver.active.get_current_device()  # makes Triton's driver here, and not in several threads
    _started.add(signature)
    _pending.append(_threads().submit(_load, kernel, device, tuple(arguments), dict(constants)))


def _load(kernel: Any, device: torch.device, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    torch.cuda.set_device(device)  # of this thread
    compiled = kernel.warmup(*arguments, grid=(1,), **constants)
    compiled.run  # noqa: B018  (builds the launcher and loads the code)


def _described(argument: Any) -> Any:
    """What of an argument decides what is compiled."""
    base = getattr(argument, "base", argument)
    if hasattr(base, "dtype"):
        return str(base.dtype), getattr(argument, "block_shape", None), repr(getattr(argument, "layout", None))
    return argument


def wait() -> None:
    """Until everything begun is there. What failed is compiled again by its launch, which says why."""
    while _pending:
        _pending.pop().exception()
