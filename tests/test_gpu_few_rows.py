"""Linears of few rows and the kernels around them that overlap, where they run: on a Hopper GPU.

What is compiled for one is in `test_few_rows.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need Triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Gluon cannot be interpreted", allow_module_level=True)
few = pytest.importorskip("lowering.triton.hopper_few", reason="the kernel needs Gluon for Hopper")

from sm90 import BF16, I8, Launch, compile_for_sm90, empty  # noqa: E402
from triton import language as tl  # noqa: E402

from lowering import numerics  # noqa: E402
from lowering.ops.linear import linear_w8a8  # noqa: E402
from lowering.registry import random_tensor  # noqa: E402
from lowering.triton import ahead, launch, tuning, wgmma  # noqa: E402
from lowering.triton.launch import follow  # noqa: E402
from lowering.triton.quantize import _quantize_rows_kernel  # noqa: E402

needs_hopper = pytest.mark.skipif(not launch.overlaps(torch.device("cuda")), reason="needs a Hopper GPU")
CUDA = torch.device("cuda")


def arguments(m: int, n: int, k: int, device: torch.device = CUDA) -> tuple[Any, ...]:
    codes, scale = numerics.quantize_symmetric(random_tensor(m, k, device=device))
    weight, weight_scale = numerics.quantize_weight(random_tensor(n, k, device=device, seed=1))
    return (codes, scale, None, weight, weight_scale, *(None,) * 5, BF16)


@pytest.fixture
def layer() -> tuple[Any, ...]:
    return arguments(64, 4096, 4096)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(("rows", "few_rows"), [(1, True), (16, True), (64, True), (65, False)])
def test_few_rows_choose_it(rows: int, few_rows: bool) -> None:
    chosen = linear_w8a8.choose("triton", arguments(rows, 4096, 4096))
    assert ("wgmma" in chosen.name) == few_rows


@pytest.mark.gpu
@needs_hopper
def test_first_calls_of_weights_are_not_in_what_a_search_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel stands before them, of a few µs."""
    bench = tuning.Bench(tuning.Problem(16, 4096, 4096), CUDA)
    settled: list[bool] = []

    class Graph(torch.cuda.graph):
        def __enter__(self) -> None:
            settled.extend(weight in wgmma._settled for weight, _ in bench._weights)
            super().__enter__()

    monkeypatch.setattr(torch.cuda, "graph", Graph)
    assert bench.microseconds(None, replays=1) > 0
    assert len(settled) > 1
    assert all(settled)


@triton.jit
def late_copy(source, target, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Lets the next kernel start, and writes a few ms later."""
    follow(True)
    begin = tl.extra.cuda.globaltimer()
    while tl.extra.cuda.globaltimer() - begin < 3_000_000:
        pass
    for start in range(tl.program_id(0) * BLOCK, SIZE, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < SIZE), mask=at < SIZE)


def test_the_late_copy_is_one() -> None:
    named = {"source": empty(4, 4, dtype=I8), "target": empty(4, 4, dtype=I8), "SIZE": 16, "BLOCK": 16}
    ptx = compile_for_sm90(Launch(late_copy, named, {})).ptx
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("globaltimer") < ptx.index("st.global")


@pytest.mark.gpu
@needs_hopper
def test_a_weight_written_just_before_is_read_as_it_is(layer: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch reads weights before the kernel ahead has ended: not those that this very kernel writes."""
    codes, scale, _, weight, weight_scale, *_ = layer
    others = [torch.randint_like(weight, -127, 128) for _ in range(4)]
    wanted = [linear_w8a8.reference(codes, scale, None, w, weight_scale, *(None,) * 5, BF16) for w in others]

    linear = linear_w8a8.choose("triton", layer).function

    def written_then_read(which: int, changed: torch.Tensor) -> bool:
        torch.cuda.synchronize()
        late_copy[(64,)](others[which], changed, SIZE=weight.numel(), BLOCK=4096)
        torch.autograd.graph.increment_version(changed)
        got = linear(*layer[:3], changed, *layer[4:])
        return torch.equal(got, wanted[which])

    for turn in range(12):
        assert written_then_read(turn % 4, weight if turn % 2 else torch.empty_like(weight)), turn
    monkeypatch.setattr(wgmma, "_settle", lambda weight: None)
    assert not all(written_then_read(turn % 4, weight) for turn in range(12)), (
        "the launch is early, and this test sees it"
    )


@pytest.mark.gpu
@needs_hopper
def test_a_chain_that_overlaps_gives_what_one_by_one_gives(layer: tuple[Any, ...]) -> None:
    """Every kernel starts early, the first is slow, and buffers are written again two kernels later: each reads what
    the one before wrote, captured and replayed too."""
    codes, _, _, weight, weight_scale, *_ = layer
    weights = [torch.roll(weight, turn, 0) for turn in range(8)]
    rows, width = codes.shape
    start = codes.float().bfloat16()
    q, s, x = torch.empty_like(codes), torch.empty(rows, 1, device=CUDA), torch.empty_like(start)
    block, warps = launch.row_block(width)

    def chain(wait: bool) -> torch.Tensor:
        late_copy[(64,)](start, x, SIZE=start.numel(), BLOCK=4096)
        h = x
        for w in weights:
            _quantize_rows_kernel[(rows,)](
                h, width, None, q, s, None, None, K=width, R=0, SYMMETRIC=True, BLOCK=block, BLOCK_R=16, LINKED=True,
                num_warps=warps, launch_pdl=True,
            )  # fmt: skip
            if wait:
                torch.cuda.synchronize()
            h = wgmma.linear_wgmma(q, s, None, w, weight_scale, None, None, None, None, False, None, None, h, BF16, -1)
            if wait:
                torch.cuda.synchronize()
        return h

    expected = chain(True).clone()
    for _ in range(5):
        x.fill_(torch.nan)
        assert torch.equal(chain(False), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(False)
    for _ in range(20):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("scheme", ["w8a8", "llm.int8"])
def test_a_compiled_model_overlaps(scheme: str) -> None:
    """Kernels over rows that Inductor launches start early, too, and results are those of launches that do not."""
    from torch import nn

    from int8pass.backend import int8

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.RMSNorm(512), nn.Linear(512, 1024), nn.Linear(1024, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(3)]).to(CUDA, BF16).eval().requires_grad_(False)
    x = torch.randn(48, 512, device=CUDA, dtype=BF16)
    found: list[str] = []
    told = ahead.overlapping

    def watched(source: str) -> str:
        result = told(source)
        found.append(result)
        return result

    def outputs() -> list[torch.Tensor]:
        torch._dynamo.reset()
        # Inductor keeps graphs by what it writes, not by what it is told of it.
        options = {"recipe": scheme, "mode": "reduce-overhead", "inductor": {"fx_graph_cache": False}}
        compiled = torch.compile(model, backend=int8, options=options)
        return [compiled(x).clone() for _ in range(6)]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(ahead, "overlapping", watched)
        overlapping, reference = outputs(), model(x)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(ahead, "overlapping", lambda source: source)
        patch.setattr(few, "overlaps", lambda device: False)
        one_by_one = outputs()
    assert any("'launch_pdl': True" in source and "_quantize" in source for source in found)
    assert all(torch.equal(output, one_by_one[0]) for output in [*overlapping, *one_by_one])
    assert (overlapping[0] - reference).norm() / reference.norm() < 0.05
