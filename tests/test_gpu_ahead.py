"""Kernels that Inductor cannot see are compiled while a model is traced, for just the launch that comes."""

from __future__ import annotations

import contextvars
import pickle
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import triton
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CodeCacheFuture
from torch._subclasses.fake_tensor import FakeTensorMode

from lowering.triton import ahead

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_nothing_is_compiled_without_a_gpu() -> None:
    assert not ahead.possible(torch.device("cpu"))
    if not torch.cuda.is_available():
        assert not ahead.possible(torch.device("cuda"))


def test_what_fails_is_left_to_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the compiler is no error of the tracing; nor is it tried twice."""
    tried = []

    def fail(*arguments: object) -> None:
        tried.append(arguments)
        raise RuntimeError("cannot be compiled")

    class Driver:
        @staticmethod
        def get_current_device() -> int:
            return 0

    monkeypatch.setattr(ahead, "_load", fail)
    monkeypatch.setattr(ahead.triton.runtime.driver, "_active", Driver())

    class Kernel:
        device_caches = (None,)

    kernel = Kernel()
    for _ in range(2):
        ahead.compile(kernel, torch.device("cuda"), [1, None], {"BLOCK": 8})
    ahead.wait()
    assert len(tried) == 1


class Inductor:
    """What stands for its compiler of one kernel: says where and with what it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, processes: bool) -> None:
        self.calls: list[tuple[str, ...]] = []

        def compile_kernel(compiler: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> str:
            self.calls.append((name, source, device_str, threading.current_thread().name, SETTING.get()))
            if name == "fails":
                raise RuntimeError("no such instruction")
            return name.upper()

        monkeypatch.setattr(AsyncCompile, "triton", compile_kernel)
        monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda cls: processes))
        monkeypatch.setattr(ahead, "get_compile_threads", lambda: 2)
        monkeypatch.setattr(ahead.triton.knobs.runtime, "interpret", False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        self.original = compile_kernel


SETTING = contextvars.ContextVar("SETTING", default="nothing")


def test_threads_stand_in_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Inductor's generated code has it: a name for what each call gives, then one wait for all."""
    inductor = Inductor(monkeypatch, processes=False)
    SETTING.set("of the caller")
    with ahead.beside_inductor():
        compiler = AsyncCompile()
        named = {"kernel_name": "one", "source_code": "source"}  # as Inductor's templates and benchmarks have it
        scope = {"one": compiler.triton(**named), "two": compiler.triton("two", "source", device_str="cuda")}
        assert all(isinstance(kernel, CodeCacheFuture) for kernel in scope.values())
        compiler.wait(scope)
    assert scope == {"one": "ONE", "two": "TWO"}
    assert {call[0] for call in inductor.calls} == {"one", "two"}
    for _, source, device, thread, setting in inductor.calls:
        assert (source, device, setting) == ("source", "cuda", "of the caller")
        assert thread.startswith("int8pass-compile")
    assert AsyncCompile.triton is inductor.original


def test_processes_that_are_ready_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    inductor = Inductor(monkeypatch, processes=True)
    with ahead.beside_inductor():
        assert AsyncCompile().triton("one", "source", "cuda") == "ONE"
    assert [call[3] for call in inductor.calls] == [threading.current_thread().name]


def test_what_a_thread_meets_is_raised_where_inductor_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    inductor = Inductor(monkeypatch, processes=False)
    with ahead.beside_inductor():
        compiler = AsyncCompile()
        scope = {"fails": compiler.triton("fails", "source")}
        with pytest.raises(RuntimeError, match="no such instruction"):
            compiler.wait(scope)
    assert AsyncCompile.triton is inductor.original


def test_compilations_may_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to begin ends first: the other goes on in threads, and nothing stays behind."""
    inductor = Inductor(monkeypatch, processes=False)
    first, second = ahead.beside_inductor(), ahead.beside_inductor()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert isinstance(AsyncCompile().triton("one", "source"), CodeCacheFuture)
    second.__exit__(None, None, None)
    assert AsyncCompile.triton is inductor.original


def test_processes_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread of ours, however many compilations begin; Inductor, which asks for them too, comes after it."""
    asked: list[str] = []
    begun, answer = threading.Event(), threading.Event()

    def use_process_pool(cls: type) -> bool:
        asked.append(threading.current_thread().name)
        begun.set()
        answer.wait(10)
        asked.append("there")
        return True

    monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(use_process_pool))
    monkeypatch.setattr(ahead, "possible", lambda device: True)
    monkeypatch.setattr(ahead, "triton_key", lambda: "")
    monkeypatch.setattr(ahead, "_driver", lambda: None)
    monkeypatch.setattr(ahead, "_prepared", [])
    threads = [threading.Thread(target=ahead.prepare, args=(torch.device("cuda"),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begun.wait(10)
    threading.Timer(0.05, answer.set).start()
    ahead.workers_started()
    assert len(asked) == 2
    assert asked[0].startswith("int8pass-compile")
    assert asked[1] == "there"


class Worker:
    """Does at once what it is given, as another process would: by pickle. Or fails, or is not there, or never ends."""

    def __init__(self, fate: str) -> None:
        self.fate, self.tasks = fate, 0

    def submit(self, *call: object) -> Future[None]:
        self.tasks += 1
        future: Future[None] = Future()
        if self.fate == "closed":
            raise RuntimeError("the pool is closed")
        if self.fate == "fails":
            future.set_exception(RuntimeError("the worker is gone"))
        elif self.fate == "works":
            task, *arguments = pickle.loads(pickle.dumps(call))
            future.set_result(task(*arguments))
        return future


@pytest.mark.parametrize("fate", ["works", "fails", "closed", "hangs"])
def test_a_worker_compiles_and_the_thread_finds_it(fate: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("interpreted kernels are not compiled")
    from sm90 import SM90
    from triton.compiler import ASTSource

    from lowering.triton.norm import _rms_norm_kernel

    names = {"x": "*fp32", "x_stride": "i32", "weight": "*fp32", "out": "*fp32", "eps": "fp32", "offset": "fp32"}
    constants = {"K": 64, "ROUND_FIRST": False, "BLOCK": 64}
    source = ASTSource(_rms_norm_kernel, names | dict.fromkeys(constants, "constexpr"), constants, {})
    worker, parsed = Worker(fate), []
    make = ASTSource.make_ir
    monkeypatch.setattr(ASTSource, "make_ir", lambda *a: parsed.append(a) or make(*a))
    monkeypatch.setattr(ahead, "_workers", lambda: worker)
    monkeypatch.setattr(ahead, "PATIENCE", 0.1)
    monkeypatch.setattr(ahead, "_workers_answer", True)
    monkeypatch.setattr(ahead._thread, "ahead", True, raising=False)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        compiled = ahead._compile_by_worker(source, SM90, {"num_warps": 1})
        assert "st.global" in compiled.asm["ptx"]
        assert worker.tasks == 1
        assert len(parsed) == 1, "compiled twice"
        ahead._compile_by_worker(source, SM90, {"num_warps": 1})
        monkeypatch.setattr(ahead._thread, "ahead", False)
        ahead._compile_by_worker(source, SM90, {"num_warps": 1})
    assert worker.tasks == (1 if fate == "hangs" else 2), "one that hangs is asked once; none for a thread of the user"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("m", [384, 48])
@pytest.mark.parametrize(("outliers", "hilo"), [(0, False), (32, False), (0, True)])
def test_tracing_compiles_what_is_launched(outliers: int, hilo: bool, m: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel of Hopper")
    wgmma = pytest.importorskip("lowering.triton.wgmma", reason="needs Gluon")
    n, k = 1056, 528  # of no other test

    def arguments(device: str) -> tuple[object, ...]:
        codes = torch.ones(m, k, dtype=torch.int8, device=device)
        scale = torch.ones(m, 1, device=device)
        weight, weight_scale = torch.ones(n, k, dtype=torch.int8, device=device), torch.ones(n, device=device)
        columns = torch.ones(m, outliers, dtype=torch.bfloat16, device=device) if outliers else None
        right = torch.ones(n, outliers, dtype=torch.bfloat16, device=device) if outliers else None
        high = torch.ones(m, k, dtype=torch.int8, device=device) if hilo else None
        blocks = torch.ones(m, 1, dtype=torch.int32, device=device) if hilo else None
        residual = torch.ones(m, n, dtype=torch.bfloat16, device=device) if outliers or hilo else None
        return (
            codes,
            scale,
            None,
            weight,
            weight_scale,
            None,
            None,
            columns,
            right,
            False,
            high,
            blocks,
            residual,
            torch.bfloat16,
            -1,
        )

    with FakeTensorMode():
        wgmma.linear_wgmma(*arguments("cuda"))
    ahead.wait()
    kernel = (wgmma.hopper_few if m <= 64 else wgmma.hopper).linear_w8a8_wgmma
    kernels = kernel.device_caches[torch.cuda.current_device()][0]
    ready = len(kernels)
    out = wgmma.linear_wgmma(*arguments("cuda"))
    assert len(kernels) == ready, "the launch compiled another kernel"
    assert torch.equal(out, torch.full_like(out, k + outliers + 256 * 128 * hilo + bool(outliers or hilo)))
