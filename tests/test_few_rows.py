"""Linears of few rows that read their weights before the kernel ahead has ended (`lowering.triton.hopper_few`)."""

from __future__ import annotations

import importlib
import re
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton", reason="the kernels need Triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Gluon cannot be interpreted", allow_module_level=True)
few = pytest.importorskip("lowering.triton.hopper_few", reason="the kernel needs Gluon for Hopper")

from sm90 import BF16, F32, I8, I32, compile_for_sm90, compile_gluon, empty, launches  # noqa: E402
from triton.runtime.jit import MockTensor  # noqa: E402

from lowering.triton import ahead, choice, launch, wgmma  # noqa: E402
from lowering.triton.tuning import WGMMA, Tile  # noqa: E402

CUDA = torch.device("cuda")
LINKED = ("norm", "act", "quantize", "attention", "hilo")  # modules of kernels that let the next one start


# -- how channels are shared out


@given(st.integers(1, 300_000), st.integers(1, 264))
def test_programs_cover_the_channels_and_are_all_alike(n: int, multiprocessors: int) -> None:
    width = few.width(n, multiprocessors)
    parts = few.pieces(width)
    assert sum(parts) == width
    assert len(parts) == 3
    assert all(part == 0 or part in (16, 32, 64, 128) for part in parts)
    assert list(parts) == sorted(parts, reverse=True)
    turns = -(-n // (few.MOST * multiprocessors))
    programs = -(-n // width)
    assert programs <= turns * multiprocessors, "a program more than there is room for"
    assert width == 16 or -(-n // (width - 16)) > turns * multiprocessors or width - 16 < 16


@given(st.integers(1, few.ROWS))
def test_few_rows_are_made_up(m: int) -> None:
    first, second = few.row_pieces(m)
    assert m <= first + second < m + 16
    assert all(piece & (piece - 1) == 0 for piece in (first, second)), "a tensor's sizes are powers of two here"
    assert first % 8 == second % 8 == 0, "the swizzle's unit"


def test_the_layers_of_a_llama() -> None:
    shares = [few.pieces(few.width(n, 132)) for n in (4096, 6144, 28672)]
    assert shares == [(32, 0, 0), (32, 16, 0), (128, 64, 32)]


# -- what is compiled


@pytest.fixture
def an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(few, "overlaps", lambda device: True)


def form(
    m: int, n: int, k: int, r: int = 0, codes: bool = False, affine: bool = False, hilo: bool = False, add: bool = False
) -> Any:
    """The launch of one form of the kernel, for stand-ins of tensors."""

    def stand(dtype: torch.dtype, *shape: int) -> MockTensor:
        return MockTensor(dtype, [*shape])

    return few.launch(
        CUDA, stand(I8, m, k), stand(F32, m), stand(I32, m) if affine else None, stand(I8, n, k), stand(F32, n),
        stand(I32, n) if affine else None, stand(BF16, n) if affine else None, stand(BF16, m, r) if r else None,
        stand(BF16, n, r) if r else None, codes, stand(I8, m, k) if hilo else None, stand(I32, m) if hilo else None,
        stand(BF16, m, n) if add else None, stand(BF16, m, n),
    )  # fmt: skip


@pytest.mark.usefixtures("an_h100")
@pytest.mark.parametrize(
    "given",
    [
        {"n": 4096, "k": 4096},
        {"n": 6144, "k": 4096, "affine": True},
        {"n": 28672, "k": 4096},
        {"n": 4096, "k": 14336, "hilo": True, "add": True},
        {"n": 28672, "k": 4096, "hilo": True, "affine": True, "add": True},
        {"n": 4096, "k": 4096, "r": 32, "affine": True, "add": True},
        {"n": 28672, "k": 4096, "r": 64, "codes": True, "affine": True},
        {"n": 23232, "k": 4096, "r": 24, "affine": True, "add": True},
        {"n": 256, "k": 528},
        {"m": 17, "n": 4096, "k": 14336, "hilo": True, "add": True},
        {"m": 32, "n": 28672, "k": 4096, "r": 64, "affine": True},
        {"m": 1, "n": 28672, "k": 4096, "r": 32, "affine": True, "add": True},
        {"m": 16, "n": 6144, "k": 4096, "affine": True},
        {"m": 40, "n": 28672, "k": 4096, "r": 64, "affine": True, "add": True},
        {"m": 48, "n": 4096, "k": 14336, "hilo": True, "add": True},
    ],
    ids=str,
)
def test_the_kernel(given: dict[str, Any]) -> None:
    what = form(**{"m": 64} | given)
    code = compile_gluon(what)
    # A step waits for what is loaded: its weights, and no more rows than are asked for.
    loaded = what.constants["ASKED"] + sum(what.constants[name] for name in ("P0", "P1", "P2"))
    expected = {int(count) for count in re.findall(r"expect_tx\.shared(?:::cta)?\.b64 _, \[\S+\], (\d+)", code.ptx)}
    assert loaded * 128 * what.constants["Q"] in expected
    assert code.stack == 0, "spills"
    assert code.shared <= 227 * 1024
    # Beside it the kernel ahead and the one behind fit: registers of both, and one program a multiprocessor of its own.
    assert 8 * 32 * code.registers <= 65536 // 2
    if given["k"] >= 4096:
        assert 2 * code.shared > 227 * 1024
    parts = [what.constants[name] for name in ("P0", "P1", "P2")]
    for part in filter(None, parts):
        assert f"wgmma.mma_async.sync.aligned.m64n{part}k32.s32.s8.s8" in code.ptx
    assert ("bf16.bf16" in code.ptx) == (given.get("r", 0) > 0)
    # The next kernel may start at once. Loads of weights come before the wait of the warp that loads, of rows after it.
    assert code.ptx.count("griddepcontrol.launch_dependents") == 1
    assert code.ptx.count("griddepcontrol.wait") == 2, "the warp that loads and those that multiply"
    loads = [at for at in range(len(code.ptx)) if code.ptx.startswith("cp.async.bulk.tensor.2d.shared", at)]
    waits = [at for at in range(len(code.ptx)) if code.ptx.startswith("griddepcontrol.wait", at)]
    early = [sum(load < wait for load in loads) for wait in waits]
    one_step, steps = what.constants["Q"] * len([*filter(None, parts)]), -(-given["k"] // (128 * what.constants["Q"]))
    filled = what.constants["EARLY"]
    assert 1 <= filled <= min(what.constants["BUFFERS"], steps)
    assert max(early) in (one_step, one_step * filled), "a loop over the ring, or that loop unrolled"
    assert code.ptx.find("ld.global") > waits[0], "scales, biases and what says which blocks are in use"
    for wait in waits:
        assert "ld.global" not in code.ptx[code.ptx.rfind("$L__BB", 0, wait) : wait]
    assert what.constants["launch_pdl"] is True


def test_kernels_over_rows_let_it_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """First they say that the next one may, then they wait, before anything is read; parameters are asked for."""
    from lowering.triton import act, attention, hilo, norm, quantize

    for name in LINKED:
        monkeypatch.setattr(importlib.import_module(f"lowering.triton.{name}"), "linked", lambda device, rows: True)
    x, gamma, wide = empty(64, 4096), empty(4096), empty(64, 14336)
    short = (empty(17, 7), empty(7), empty(7), 1e-5, 0.0, "layer")
    query, key = empty(64, 32, 1, 128), empty(64, 8, 1, 128)
    norms = (gamma, gamma, 1e-5, 0.0, "layer")
    cases: list[tuple[Any, tuple[Any, ...], int]] = [
        (norm.norm_quantize_rows, (x, *norms, None, True), 2),
        (norm.add_norm_quantize_rows, (x, x, *norms, None, True), 2),
        (hilo.norm_quantize_hilo_rows, (x, *norms, 6.0, True), 2),
        (norm.norm_quantize_rows, (*short, None, True), 2),
        (hilo.norm_quantize_hilo_rows, (*short, 6.0, True), 2),
        (quantize.quantize_rows, (x, True), 0),
        (hilo.quantize_hilo_rows, (x, 6.0, True), 0),
        (act.act_mul_quantize_rows, (wide, wide, "silu", None, True), 0),
        (hilo.act_mul_quantize_hilo_rows, (wide, wide, "silu", 6.0, True), 0),
        (attention.attention_few_queries, (query, key, key, None, True, 0.1), 0),
        (attention.attention_few_queries, (query[:1], key[:1].expand(1, 8, 4096, 128), key[:1].expand(1, 8, 4096, 128),
                                           None, False, 0.1), 0),
    ]  # fmt: skip
    kernels = set()
    for operator, args, asked in cases:
        for made in launches(monkeypatch, operator, *args):
            assert made.arguments["LINKED"] is True
            ptx = compile_for_sm90(made).ptx
            starts, waits = ptx.index("griddepcontrol.launch_dependents"), ptx.index("griddepcontrol.wait")
            assert ptx.count("griddepcontrol.launch_dependents") == ptx.count("griddepcontrol.wait") == 1
            assert starts < waits < min(at for at in (ptx.find("ld.global"), ptx.find("cp.async")) if at > 0)
            assert ptx.count("prefetch.global.L2") >= asked > 0 or asked == 0
            assert ptx.rfind("prefetch.global.L2") < starts
            kernels.add(made.kernel.__name__)
    assert len(kernels) == 8, kernels


def test_elsewhere_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowering.triton import quantize

    (made,) = launches(monkeypatch, quantize.quantize_rows, empty(64, 4096), True)
    assert made.arguments["LINKED"] is False
    assert "griddepcontrol" not in compile_for_sm90(made).ptx


@pytest.mark.parametrize(("rows", "answer"), [(1, True), (16, True), (64, True), (65, False)])
def test_for_which_rows(monkeypatch: pytest.MonkeyPatch, rows: int, answer: bool) -> None:
    monkeypatch.setattr(launch, "is_hopper", lambda device: True)
    monkeypatch.setattr(launch, "_driver", lambda: 12030)
    assert launch.linked(CUDA, rows) is answer
    monkeypatch.setattr(launch, "_driver", lambda: 12020)  # CUDA graphs have no edge for it
    assert launch.linked(CUDA, rows) is False
    monkeypatch.setattr(launch, "_driver", lambda: 13000)
    monkeypatch.setattr(launch, "is_hopper", lambda device: False)
    assert launch.linked(CUDA, rows) is False


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("n", [4096, 128256])
def test_it_is_the_kernel_of_few_rows_unless_another_was_measured(
    monkeypatch: pytest.MonkeyPatch, rows: int, n: int
) -> None:
    codes, weight = empty(rows, 4096, dtype=I8), empty(n, 4096, dtype=I8)
    monkeypatch.setattr(choice, "on_hopper", lambda device: True)
    for overlap, found, answer in [
        (True, None, True),
        (True, WGMMA, True),  # of a table that was made when it was not yet the rule
        (True, Tile(16, 32, 128, 4, 3), "measured to be faster"),
        (False, None, "do not overlap"),
    ]:
        monkeypatch.setattr(choice, "overlaps", lambda device, overlap=overlap: overlap)
        with choice.forced(found):
            said = choice.on_wgmma(codes, weight, BF16)
            assert said is True if answer is True else answer in said
            assert "too few" in choice.fills_hopper(codes, weight, BF16), "never for a gate"


def test_dynamo_need_not_ask_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_hopper", lambda device: True)

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x: torch.Tensor) -> torch.Tensor:
        return x + launch.linked(x.device, x.shape[0])

    assert traced(torch.zeros(64)).unique().item() == launch.linked(torch.device("cpu"), 64)


def test_inductor_is_told_once() -> None:
    source = "triton_meta={'signature': {}, 'constants': {'LINKED': %s}}, inductor_meta={}\ndef kernel(): %s"
    told = ahead.overlapping(source % (True, "follow(LINKED)"))
    assert told == source.replace("'sig", "'launch_pdl': True, 'sig") % (True, "follow(LINKED)")
    assert ahead.overlapping(told) == told
    others = [source % (False, "follow(LINKED)"), source % (True, "pass  # of somebody else, and does not wait")]
    assert [ahead.overlapping(other) for other in others] == others
    assert ahead.overlapping("def other(): pass") == "def other(): pass"


class Fills(TorchDispatchMode):
    """How often something was set to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.zero_.default
        return function(*args, **(kwargs or {}))


def test_a_kernel_stands_before_the_first_early_read_of_a_weight() -> None:
    """And after every change of it, and not otherwise: it takes a microsecond."""
    weights = [torch.ones(4, 4, dtype=torch.int8) for _ in range(2)]
    fills = Fills()

    def settled(which: int) -> int:
        with fills:
            wgmma._settle(weights[which])
        return fills.count

    assert [settled(0), settled(0)] == [1, 1]
    weights[0].add_(1)
    assert [settled(0), settled(0)] == [2, 2]
    weights[0].copy_(weights[1])
    assert [settled(0), settled(1), settled(1), settled(0)] == [3, 4, 4, 4]
    known = len(wgmma._settled)
    del weights[0]
    assert len(wgmma._settled) == known - 1, "of a weight that is gone nothing is kept"


def test_the_kernels_get_adjacent_scales_sums_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def launch_of(*operands: Any) -> Any:
        given.extend(operands)
        return types.SimpleNamespace(kernel={(1,): lambda: None}, programs=1, arguments=(), constants={})

    monkeypatch.setattr(wgmma, "_launch", launch_of)
    codes, weight = torch.ones(17, 32, dtype=torch.int8), torch.ones(48, 32, dtype=torch.int8)
    table = torch.arange(3 * 48.0).view(48, 3)
    scale, one = torch.ones(17, 1), torch.ones(1, dtype=BF16)
    sums, bias = table.to(I32)[:, 1], one.expand(48)
    wgmma.linear_wgmma(
        codes, scale, scale.to(I32), weight, table[:, 2], sums, bias, None, None, False, None, None, None, BF16, -1
    )
    _, _, _, _, _, weight_scale, weight_sum, given_bias, *_ = given
    for found, wanted in ((weight_scale, table[:, 2]), (weight_sum, sums), (given_bias, bias)):
        assert found.is_contiguous()
        assert torch.equal(found, wanted)
