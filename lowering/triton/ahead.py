"""What can be compiled beside the stages that come before the first call.

Before its first kernel Triton hashes all of itself and has a C compiler build its driver: half a second each, which
need nothing of the model. And there are kernels that Inductor does not compile.

Inductor compiles the kernels it can see in processes of its own while it makes the rest of a graph. One that it cannot
see would be compiled when the graph first reaches it: 0.5 to 1.3 s each, launcher included. Tracing asks for the shapes
of its result seconds earlier, and knows all that the compiler needs: those processes get it, too.

In a first call these processes may not be ready when the kernels are. Inductor then compiles one after the other, each
waiting for an assembler that is a process of its own; here threads do it. And kernels that start early are said to.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CodeCacheFuture, LambdaFuture
from triton.runtime.cache import triton_key

log = logging.getLogger(__name__)
THREADS = 4
PATIENCE = 60.0  # seconds that a worker may take
_started: set[str] = set()
_pending: list[Future[None]] = []
_pool: ThreadPoolExecutor | None = None
_prepared: list[Future[Any]] = []
_thread = threading.local()  # `ahead`: this thread is one of ours
_one_at_a_time = threading.Lock()
_within = 0  # how many compilations are `beside_inductor`
_inductors_own: Callable[..., Any] = AsyncCompile.triton
_workers_answer = True


def _threads() -> ThreadPoolExecutor:
    global _pool
    _pool = _pool or ThreadPoolExecutor(THREADS, thread_name_prefix="int8pass-compile")
    return _pool


def possible(device: torch.device) -> bool:
    """Whether there is a GPU to compile for: models are traced for one where there is none, too."""
    return device.type == "cuda" and torch.cuda.is_available()


def prepare(device: torch.device) -> None:
    """Begin what Triton does once per process, and have Inductor start its processes.

    On Python 3.12 PyTorch 2.11 starts them when it has the first kernel to compile, and they are not ready then.
    """
    with _one_at_a_time:
        if not _prepared and possible(device):
            _prepared.extend(_threads().submit(task) for task in (_start_workers, triton_key, _driver))


def workers_started() -> None:
    """Until Inductor's processes have been asked for. It asks for them itself, and two threads at once would make two
    pools of them."""
    if _prepared:
        _prepared[0].exception()


def _start_workers() -> None:
    try:
        AsyncCompile.use_process_pool()
    except (OSError, RuntimeError, AssertionError):  # the last in a daemonic process, which may have no children
        # No more than an early start is lost: Inductor tries again when it needs them, and says what it meets.
        log.info("Inductor's processes cannot be started early", exc_info=True)


def _driver() -> Any:
    return triton.runtime.driver.active


def prepared() -> None:
    """Until that is there: two threads at once would do it twice."""
    for task in _prepared:
        task.exception()


@contextmanager
def beside_inductor() -> Iterator[None]:
    """Within it Inductor compiles Triton kernels at once in threads of ours, as long as its processes are not ready."""
    global _within, _inductors_own
    prepared()
    with _one_at_a_time:
        if _within == 0:
            _inductors_own = AsyncCompile.triton
            AsyncCompile.triton = _in_a_thread  # type: ignore[assignment,method-assign]
        _within += 1
    try:
        yield
    finally:
        with _one_at_a_time:
            _within -= 1
            if _within == 0:
                AsyncCompile.triton = _inductors_own  # type: ignore[method-assign]


def _in_a_thread(compiler: AsyncCompile, kernel_name: str, source_code: str, *rest: Any, **named: Any) -> Any:
    """In the place of `AsyncCompile.triton`, which Inductor calls by position and by name."""
    arguments = (kernel_name, overlapping(source_code), *rest)
    if triton.knobs.runtime.interpret or get_compile_threads() <= 1 or compiler.use_process_pool():
        return _inductors_own(compiler, *arguments, **named)
    task = functools.partial(_compile_here, torch.cuda.current_device(), _inductors_own, compiler, *arguments, **named)
    running = _threads().submit(contextvars.copy_context().run, task)
    return LambdaFuture(running.result, running)


def overlapping(source: str) -> str:
    """What Inductor writes for a kernel that starts while the one before it runs (`lowering.triton.launch.linked`).

    It launches its own kernels that way if what it writes beside them says so, and has no word for those it is given.
    Without this word they are as right, and wait. A kernel that does not call `follow` must not be launched so.
    """
    follows = "'LINKED': True" in source and "follow(LINKED)" in source and "'launch_pdl'" not in source
    return source.replace("triton_meta={", "triton_meta={'launch_pdl': True, ", 1) if follows else source


def _compile_here(device: int, compile_kernel: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """In a thread: what Inductor would wait for. Its processes may have become ready meanwhile."""
    torch.cuda.set_device(device)  # of this thread
    kernel = compile_kernel(*arguments, **named)
    return kernel.result() if isinstance(kernel, CodeCacheFuture) else kernel


def compile(kernel: Any, device: torch.device, arguments: Sequence[Any], constants: Mapping[str, Any]) -> None:
    """Begin to compile and load `kernel` for these arguments (stand-ins of tensors), once."""
    signature = repr([kernel, device, [_described(a) for a in arguments], sorted(constants.items())])
    if signature in _started:
        return
    _started.add(signature)
    _pending.append(_threads().submit(_load, kernel, device, tuple(arguments), dict(constants)))


def _load(kernel: Any, device: torch.device, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    prepared()
    torch.cuda.set_device(device)  # of this thread
    with _one_at_a_time:  # what Triton keeps per device is made by the first that asks; it sets `compile`
        kernel.device_caches[triton.runtime.driver.active.get_current_device()]
        kernel.compile = _compile_by_worker
    _thread.ahead = True
    compiled = kernel.warmup(*arguments, grid=(1,), **constants)
    compiled.run  # noqa: B018  (builds the launcher and loads the code)


def _compile_by_worker(source: Any, target: Any, options: dict[str, Any], **rest: Any) -> Any:
    """`triton.compile`, in threads of ours done by one of Inductor's processes where these have started.

    A thread that compiles takes turns with the one that traces, and most of what each does is Python. What the worker
    leaves in Triton's cache is found there; if it fails, it is compiled here, and says why. Where one did not answer,
    none is asked again.
    """
    global _workers_answer
    workers = _workers() if getattr(_thread, "ahead", False) and _workers_answer else None
    if workers is not None:
        kernel = source.fn
        form = (type(source), source.signature, source.constants, source.attrs)
        arguments = (kernel.fn.__module__, kernel.fn.__name__, form, target, options, triton.knobs.cache.dir)
        try:
            workers.submit(_compile_to_cache, *arguments).result(timeout=PATIENCE)
        except TimeoutError:
            _workers_answer = False
        except Exception:  # a closed pool, any error of a compiler: what follows meets it again, and raises it
            log.info("a worker could not compile %s", kernel.fn.__name__, exc_info=True)
    return triton.compile(source, target=target, options=options, **rest)


def _workers() -> Any | None:
    """Inductor's pool of processes, if it is there and may be used."""
    return AsyncCompile.process_pool() if AsyncCompile.use_process_pool() else None


def _compile_to_cache(
    module: str, name: str, form: tuple[Any, ...], target: Any, options: dict[str, Any], folder: str
) -> None:
    """In the worker: compile a kernel of ours, for its files."""
    kind, *parts = form
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        triton.compile(kind(getattr(importlib.import_module(module), name), *parts), target=target, options=options)


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
