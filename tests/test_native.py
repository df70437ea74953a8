"""The native CPU kernels: built once, refused with a reason, and the same numbers from every instruction set."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kernel_checks
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowering.cpu
from lowering import numerics
from lowering.cpu import native
from lowering.ops.act import ACTIVATIONS
from lowering.registry import all_ops, random_tensor

needs_native = pytest.mark.skipif(native.refusal() is not None, reason=str(native.refusal()))
CPU = torch.device("cpu")


@contextmanager
def vector_loops() -> Iterator[None]:
    """AVX512-VNNI in place of AMX (nothing changes where there is no AMX)."""
    before = native.use_tiles(False)
    try:
        yield
    finally:
        native.use_tiles(before)


@needs_native
def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    built = native.library()
    assert built.is_relative_to(tmp_path)
    stamp = built.stat().st_mtime_ns
    assert native.library() == built
    assert built.stat().st_mtime_ns == stamp
    assert list(built.parent.iterdir()) == [built], "nothing half written is left"


@needs_native
def test_it_is_built_beside_other_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` returns at once; whoever asks next waits for the result, and nothing is built twice."""
    built = threading.Event()
    calls: list[int] = []

    def library() -> Path:
        calls.append(1)
        built.wait(10)
        return before

    before = native.library()
    monkeypatch.setattr(native, "library", library)
    native._load.cache_clear()
    native.prepare()
    native.prepare()
    built.set()
    assert native.refusal() is None
    for thread in threading.enumerate():
        if thread.name == "int8pass-native":
            thread.join()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "do not load.*no-such-compiler"), ("false", "do not compile")]
)
def test_without_a_compiler_int_mm_takes_over_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: compiler)
    native._load.cache_clear()
    try:
        refusal = native.refusal()
        assert refusal is not None
        assert "native kernels" in caplog.text
        args = next(iter(all_ops()["linear_w8a8"].samples(CPU))).args
        chosen = all_ops()["linear_w8a8"].choose("cpu", args)
        assert chosen.name == "cpu:linear_int_mm"
        [ours] = [i for i in all_ops()["linear_w8a8"].implementations if "native" in i.name]
        assert ours.refuses(args) == refusal
        assert re.search(reason, refusal)
    finally:
        native._load.cache_clear()
    assert list(tmp_path.rglob("*.so")) == []


def _w8a8(m: int, n: int, k: int, r: int, dtype: torch.dtype, own_weights: bool) -> tuple[object, ...]:
    x, w = random_tensor(m, k, device=CPU, dtype=dtype), random_tensor(n, k, device=CPU, seed=1)
    weight, weight_scale = numerics.quantize_weight(w)
    codes, scale, zero, outliers, columns, _ = all_ops()["split_quantize_dynamic"].reference(x, r, 0.0, False)
    bias = random_tensor(n, device=CPU, seed=2).to(dtype)
    part: tuple[Tensor | None, ...] = (None, None, None)
    if r:
        part = (outliers, w[:, columns].to(dtype), None) if own_weights else (outliers, None, columns)
    return codes, scale, zero, weight, weight_scale, weight.sum(1, dtype=torch.int32), bias, *part, dtype


@needs_native
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 80),
    k=st.integers(1, 200),
    r=st.sampled_from([0, 1, 16, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    own_weights=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_products_agree_with_the_reference_at_any_size(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, own_weights: bool
) -> None:
    op = all_ops()["linear_w8a8"]
    args = _w8a8(m, n, k, r, dtype, own_weights)
    expected = op.reference(*args)
    kernel_checks.compare(lowering.cpu.linear.native_linear_w8a8(*args), expected, op.tolerance)
    with vector_loops():
        kernel_checks.compare(lowering.cpu.linear.native_linear_w8a8(*args), expected, op.tolerance)


ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@needs_native
@given(
    m=st.integers(1, 70),
    half=st.integers(1, 40),
    k=st.integers(1, 200),
    r=st.sampled_from([0, 1, 16, 40]),
    dtype=st.sampled_from(list(ROUNDING)),
    own_weights=st.booleans(),
    act=st.sampled_from(list(ACTIVATIONS)),
)
@example(m=22, half=11, k=22, r=1, dtype=torch.float16, own_weights=True, act="silu")  # 14 bits across a rounding
@settings(max_examples=80, deadline=None)
def test_gated_products_are_rounded_once(
    m: int, half: int, k: int, r: int, dtype: torch.dtype, own_weights: bool, act: str
) -> None:
    """Of the exact product of `act(gate)` and `up` no more is lost than one rounding of the result, and in fp16 the
    sixteenth of one that an activation of 14 bits lacks."""
    *args, outlier_weight, columns, dtype = _w8a8(m, 2 * half, k, r, dtype, own_weights)
    args[4] = args[4] / 64  # the products of fp16 fit fp16
    outlier_weight = None if outlier_weight is None else outlier_weight / 64
    args += [outlier_weight, columns, dtype]
    gate, up = all_ops()["linear_w8a8"].reference(*args[:-1], torch.float32).double().chunk(2, -1)
    expected = ACTIVATIONS[act](gate) * up
    # fp32 sums differ by their order; what that moves the gate by shows in the product.
    atol = 1e-5 * float(gate.abs().max() * up.abs().max()) + 1e-6
    rtol = ROUNDING[dtype] + (2**-14 + 5e-6 if dtype == torch.float16 else 0.0)
    for loops in (False, True):
        with vector_loops() if loops else torch.no_grad():
            product = native.gated_linear(*args, act)
        assert product.dtype == dtype
        assert product.shape == (m, half)
        torch.testing.assert_close(product.double(), expected, rtol=rtol, atol=atol)


@needs_native
@pytest.mark.parametrize("act", list(ACTIVATIONS))
def test_activations_at_the_ends_of_their_range(act: str) -> None:
    """Gates from far below to far above zero, where powers of two overflow and sums cancel."""
    gate = torch.cat([torch.linspace(-127, 127, 255), torch.tensor([0.0])]).to(torch.int8)
    for scale in (1e-3, 0.05, 1.0, 30.0):
        codes = torch.stack([gate, torch.ones_like(gate)], 1)  # one column for the gate, one for a factor of 1
        args = (codes, torch.ones(256, 1), None, torch.tensor([[1, 0], [0, 1]], dtype=torch.int8),
                torch.tensor([scale, 1.0]), None, None, None, None, None, torch.float32, act)  # fmt: skip
        expected = ACTIVATIONS[act](gate.double() * scale)[:, None]
        torch.testing.assert_close(native.gated_linear(*args).double(), expected, rtol=1e-5, atol=5e-7 * max(1, scale))


@needs_native
def test_an_unknown_activation_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="swish"):
        native.gated_linear(*_w8a8(2, 4, 8, 0, torch.float32, False), "swish")


@needs_native
def test_integer_sums_are_exact() -> None:
    """Codes and weights at their extremes, 4096 deep: sums near 2^26, which fp32 would round."""
    k = 4096
    codes = torch.full((33, k), -128, dtype=torch.int8)
    weight = torch.full((48, k), 127, dtype=torch.int8)
    weight[::2, ::3] = -127
    one = torch.ones(33, 1)
    args = (codes, one, None, weight, torch.ones(48), None, None, None, None, None, torch.float32)
    expected = (codes.long() @ weight.long().t()).float()
    assert torch.equal(lowering.cpu.linear.native_linear_w8a8(*args), expected)
    with vector_loops():
        assert torch.equal(lowering.cpu.linear.native_linear_w8a8(*args), expected)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    """A NaN or an infinity in an outlier column reaches its own row and no other."""
    codes, scale, zero, weight, weight_scale, sums, bias, outliers, none, columns, dtype = _w8a8(
        5, 48, 96, 16, torch.float32, False
    )
    assert isinstance(outliers, Tensor)
    outliers = outliers.clone()
    outliers[2, 3] = bad
    for loops in (False, True):
        with vector_loops() if loops else torch.no_grad():
            y = lowering.cpu.linear.native_linear_w8a8(
                codes, scale, zero, weight, weight_scale, sums, bias, outliers, none, columns, dtype
            )
        assert not y[2].isfinite().any()
        assert y[[0, 1, 3, 4]].isfinite().all()
