"""Every op × implementation × samples against the op's reference, and the registry's own promises.

Triton kernels run on the GPU where there is one. Elsewhere Triton's interpreter runs them, in a process of its own:
the interpreter is chosen once, when Triton is imported, and this process needs the compiler too (test_triton_aot.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import kernel_checks
import pytest
import torch
from guarded import guarded
from torch import Tensor

import lowering.cpu
import lowering.ops
from lowering.registry import Implementation, LoweringError, Op, Sample, all_ops, of_named, random_tensor

GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if GPU else CPU
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

if HAS_TRITON:
    import lowering.triton  # noqa: F401  (attaches the implementations)


def samples_of(op: Op, device: torch.device) -> dict[str, Sample]:
    """The op's samples and the hard ones, by label."""
    own = {f"{s.label}": s for s in op.samples(device)}
    return own | {f"hard-{s.label}": s for s in kernel_checks.hard_samples(op.name, device)}


def cases(target: str) -> Iterator[Any]:
    for op in all_ops().values():
        for implementation in op.implementations:
            if implementation.target == target:
                for label in samples_of(op, CPU):
                    values = (op.name, implementation.name, label)
                    yield pytest.param(*values, id="-".join((op.name, implementation.name.split(":")[1], label)))


def find(op_name: str, target: str, name: str) -> tuple[Op, Implementation]:
    op = all_ops()[op_name]
    return op, next(i for i in op.implementations if (i.target, i.name) == (target, name))


def check(op_name: str, target: str, name: str, label: str, device_name: str) -> None:
    """Run one implementation on one sample, in poisoned memory, and compare. Its arguments must stay as they were.

    Interpreted, a kernel that reads beyond one of them ends its process.
    """
    op, implementation = find(op_name, target, name)
    args = samples_of(op, torch.device(device_name))[label].args
    if implementation.refuses(args) is not None:
        op.choose(target, args)  # another one must take what this one refuses
        return
    if target == "triton":
        args = tuple(guarded(a) for a in args)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    with kernel_checks.poisoned_memory():
        got = implementation.function(*args)
    for i, (now, then) in enumerate(zip(args, before, strict=True)):
        if isinstance(now, Tensor):
            assert torch.equal(now.nan_to_num(), then.nan_to_num()), f"argument {i} was written to"
    kernel_checks.verify(op, args, got)


# ---------------------------------------------------------------------------------------------------------------------
# Where Triton kernels run


@pytest.fixture(scope="session")
def run_triton() -> Iterator[Callable[..., Any]]:
    """`run(function, *args)`: here on a GPU machine, else in a process where Triton interprets its kernels."""
    if GPU:
        yield lambda function, *args: function(*args)
        return
    before = os.environ.get("TRITON_INTERPRET")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            pool.submit(torch.set_num_threads, 1).result()
        finally:
            os.environ.pop("TRITON_INTERPRET")
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before
        yield lambda function, *args: pool.submit(function, *args).result()


def on_triton(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of Triton kernels: one of the GPU tests where there is a GPU."""
    return needs_triton(pytest.mark.gpu(test) if GPU else test)


# ---------------------------------------------------------------------------------------------------------------------
# The registry


@pytest.mark.parametrize("op", list(all_ops().values()), ids=lambda op: op.name)
def test_an_op_is_complete(op: Op) -> None:
    labels = [sample.label for sample in op.samples(CPU)]
    assert labels, "no samples"
    assert len(labels) == len(set(labels)), "two samples of one name"
    assert op.tolerance is not None
    targets = {implementation.target for implementation in op.implementations}
    assert "cpu" in targets
    if HAS_TRITON:
        assert "triton" in targets
    parameters = list(inspect.signature(op.reference).parameters)
    for implementation in op.implementations:
        assert list(inspect.signature(implementation.function).parameters) == parameters
        assert implementation.name.startswith(implementation.target)


@pytest.mark.parametrize("op", list(all_ops().values()), ids=lambda op: op.name)
def test_an_op_behaves_as_a_torch_operator(op: Op) -> None:
    torch.library.opcheck(op.overload, next(iter(op.samples(CPU))).args)


def test_an_overload_is_always_the_same_object() -> None:
    """Fake evaluations are shared between layers by it; a new object a call makes compiling twice as slow."""
    for op in all_ops().values():
        assert op.overload is op.overload


def test_no_implementation_names_op_target_and_reason() -> None:
    op = all_ops()["linear_w8a16"]
    args = next(iter(op.samples(CPU))).args
    with pytest.raises(LoweringError, match=r"'linear_w8a16' has no implementation for target 'abacus'.*cpu"):
        op.choose("abacus", args)


def test_a_predicate_gets_the_arguments_it_names() -> None:
    def reference(x: int, weight: int, bias: int) -> int:
        raise AssertionError("only its parameters count")

    def predicate(bias: int, x: int, outliers: int = 7) -> tuple[int, ...]:
        return bias, x, outliers

    assert of_named(reference, predicate)(1, 2, 3) == (3, 1, 7)
    with pytest.raises(TypeError, match="reference has no parameter wieght; it has x, weight, bias"):
        of_named(reference, lambda x, wieght: True)
    with pytest.raises(TypeError, match="no parameter args"):
        of_named(reference, lambda *args: True)


def test_what_predicates_name_some_op_has() -> None:
    """A parameter with a default and another name would never get its argument: of the ops whose implementations ask
    one predicate, some op has it."""
    asked: dict[Callable[..., Any], set[str]] = {}
    for op in all_ops().values():
        for implementation in op.implementations:
            predicate = inspect.unwrap(implementation.when)
            asked.setdefault(predicate, set()).update(inspect.signature(op.reference).parameters)
    assert len(asked) > 5
    for predicate, names in asked.items():
        assert set(inspect.signature(predicate).parameters) <= names, predicate


@needs_triton
def test_a_triton_predicate_says_why_it_refuses() -> None:
    ops = all_ops()
    with pytest.raises(LoweringError, match=r"not torch\.float64"):
        ops["quantize_per_token"].choose("triton", (torch.zeros(2, 3, dtype=torch.float64), True))
    deep = torch.zeros(1, 70000, dtype=torch.int8)
    args = (deep, torch.ones(1, 1), None, deep, torch.ones(1), None, None, None, None, None, torch.float32)
    with pytest.raises(LoweringError, match="overflow an int32"):
        ops["linear_w8a8"].choose("triton", args)
    with pytest.raises(LoweringError, match="'swish' is none of silu"):
        ops["act_mul_quantize"].choose("triton", (torch.zeros(2, 3), torch.zeros(2, 3), "swish", None, True))


# ---------------------------------------------------------------------------------------------------------------------
# What the comparison rests on


def _read(beyond: int) -> None:
    x = guarded(torch.ones(3, 40)[:, ::2])
    ctypes.c_float.from_address(x[-1, -1].data_ptr() + 4 * beyond).value


@pytest.mark.skipif(sys.platform != "linux", reason="memory is guarded on Linux")
def test_a_read_beyond_a_tensor_ends_its_process() -> None:
    for value in (torch.randn(3, 40)[:, ::2], torch.randn(1, 5).expand(4, 5), torch.tensor(2.0), torch.ones(0, 3)):
        assert torch.equal(guarded(value), value)
        assert guarded(value).stride() == value.stride()
    for beyond, code in ((0, 0), (1, -signal.SIGSEGV)):
        process = multiprocessing.get_context("spawn").Process(target=_read, args=(beyond,))
        process.start()
        process.join()
        assert process.exitcode == code


# ---------------------------------------------------------------------------------------------------------------------
# Implementations against references


@pytest.mark.parametrize(("op_name", "name", "label"), list(cases("cpu")))
def test_cpu(op_name: str, name: str, label: str) -> None:
    check(op_name, "cpu", name, label, "cpu")


@on_triton
@pytest.mark.parametrize(("op_name", "name", "label"), list(cases("triton")))
def test_triton(run_triton: Callable[..., Any], op_name: str, name: str, label: str) -> None:
    run_triton(check, op_name, "triton", name, label, DEVICE.type)


def opcheck_triton(op_name: str, tests: tuple[str, ...]) -> None:
    op = all_ops()[op_name]
    args = next(iter(op.samples(DEVICE))).args
    function = op.choose("triton", args).function
    # Others are plain functions of tensors and of operators checked here.
    if hasattr(function, "operator"):
        torch.library.opcheck(function.operator()._opoverload, args, test_utils=tests)


@on_triton
@pytest.mark.parametrize("op_name", list(all_ops()))
def test_a_triton_wrapper_behaves_as_a_torch_operator(run_triton: Callable[..., Any], op_name: str) -> None:
    # Fake tensors go through the tracer, which knows compiled kernels only.
    everything = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    run_triton(opcheck_triton, op_name, everything if GPU else everything[:2])


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU only


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op_name", list(all_ops()))
def test_compiled_by_inductor(op_name: str, dynamic: bool) -> None:
    """The way a lowered graph runs: traced, planned and launched by Inductor, rows symbolic or not."""
    op = all_ops()[op_name]
    for sample in op.samples(DEVICE):
        first = sample.args[0]
        if 1 in first.shape or 0 in first.shape or not first.is_contiguous():
            continue
        function = op.choose("triton", sample.args).function
        function(*sample.args)  # makes its operators, which Dynamo never meets in a lowered graph
        torch._dynamo.reset()
        if dynamic:
            for value in sample.args:
                if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:-1] == first.shape[:-1]:
                    for d in range(value.dim() - 1):
                        torch._dynamo.maybe_mark_dynamic(value, d)
        compiled = torch.compile(function, fullgraph=True)
        kernel_checks.verify(op, sample.args, compiled(*sample.args))
        if not sample.label.startswith(("silu", "rms", "decode", "2d", "prefill")):
            break


@pytest.mark.gpu
@needs_gpu
def test_dynamic_outliers_in_a_cuda_graph() -> None:
    """LLM.int8() columns are found without asking the host: captured once, right for new values."""
    op = all_ops()["split_quantize_dynamic"]
    x = random_tensor(33, 256, device=DEVICE, dtype=torch.bfloat16)
    args = (x, 16, 6.0, True)
    function = op.choose("triton", args).function
    function(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = function(*args)
    x.copy_(random_tensor(33, 256, device=DEVICE, dtype=torch.bfloat16, seed=9).roll(5, -1))
    graph.replay()
    torch.cuda.synchronize()
    kernel_checks.verify(op, args, got)


@pytest.mark.gpu
@needs_gpu
def test_more_elements_than_int32_counts() -> None:
    """Offsets past 2^31: the last rows of a tensor of 2.3 · 10^9 codes, and of an output as large."""
    k, m, n = 4096, 560_000, 4096
    codes = torch.zeros(m, k, dtype=torch.int8, device=DEVICE)
    codes[-3:] = random_tensor(3, k, device=DEVICE).clamp(-3, 3).mul(40).to(torch.int8)
    scale = torch.full((m, 1), 0.01, device=DEVICE)
    weight = random_tensor(n, k, device=DEVICE, seed=1).clamp(-3, 3).mul(40).to(torch.int8)
    weight_scale = torch.full((n,), 0.01, device=DEVICE)
    op = all_ops()["linear_w8a8"]
    none = (None,) * 5
    got = op.choose("triton", (codes, scale, None, weight, weight_scale, *none, torch.bfloat16)).function(
        codes, scale, None, weight, weight_scale, *none, torch.bfloat16
    )
    expected = op.reference(codes[-3:], scale[-3:], None, weight, weight_scale, *none, torch.bfloat16)
    kernel_checks.compare(got[-3:], expected, op.tolerance)
    assert not got[:-3].any()
    op = all_ops()["quantize_per_token"]
    quantized = op.choose("triton", (got, True)).function(got, True)
    kernel_checks.compare(tuple(q[-3:] for q in quantized), op.reference(got[-3:], True), op.tolerance)
