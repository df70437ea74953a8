"""The Triton kernels without a GPU: traced as Inductor traces them."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels need Triton")
if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels can be neither traced nor compiled", allow_module_level=True)

from sm90 import SM90  # noqa: E402
from torch._dynamo.source import ConstantSource  # noqa: E402
from torch._functorch.aot_autograd import aot_module_simplified  # noqa: E402
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.symbolic_shapes import (  # noqa: E402
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from triton.backends.compiler import GPUTarget  # noqa: E402

import lowering.triton  # noqa: E402, F401
from int8pass.asked_once import _declared  # noqa: E402
from lowering.registry import Op, Sample, all_ops  # noqa: E402


class _OfflineDriver:
    """Tells Triton the target, which is all that torch's analysis of a kernel's writes asks for."""

    def get_current_target(self) -> GPUTarget:
        return SM90


@pytest.fixture
def offline_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", _OfflineDriver())


# Of weights, and of attention, no axis but the last is one of rows.
WITH_ROWS = [op for op in all_ops().values() if not op.name.startswith(("dequantize_weight", "attention"))]


def traced_samples() -> list[Any]:
    """The first sample of every op; of those that search for columns one with a threshold too."""
    found = []
    for op in WITH_ROWS:
        fit = [s for s in op.samples(torch.device("cpu")) if not {0, 1} & {*s.args[0].shape}]
        above = [s for s in fit if op.name.endswith("_dynamic") and s.args[-1 - (not op.name.startswith("out"))] > 0]
        found += [
            pytest.param(op, s, id=f"{op.name}-{s.label}") for s in {id(s): s for s in [fit[0], *above[:1]]}.values()
        ]
    return found


@pytest.mark.usefixtures("offline_driver")
@pytest.mark.parametrize(("op", "sample"), traced_samples())
def test_traces_with_symbolic_rows(op: Op, sample: Sample) -> None:
    """AOTAutograd sees through every implementation: a symbolic number of rows stays so, only results are written."""
    lead = sample.args[0].shape[:-1]
    graph, env = torch.fx.Graph(), ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    nodes, args = [], []
    for i, value in enumerate(sample.args):
        if isinstance(value, Tensor):
            by_row = value.dim() >= 2 and value.shape[:-1] == lead and value.shape[-1] != lead[0]
            rows = DimDynamic.DUCK if by_row else DimDynamic.STATIC  # equal sizes are one symbol
            sizes = [rows] * (value.dim() - 1) + [DimDynamic.STATIC] * min(1, value.dim())
            args.append(
                mode.from_tensor(
                    value.contiguous(),
                    source=ConstantSource(f"argument{i}"),
                    symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
                )
            )
            nodes.append(graph.placeholder(f"argument{i}"))
        else:
            args.append(value)
            nodes.append(value)
    chosen = op.choose("triton", tuple(args))
    result = graph.call_function(chosen.function, tuple(nodes))
    graph.output(result if isinstance(op.reference(*sample.args), tuple) else (result,))
    traced: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        traced.append(module)
        return module.forward

    fakes = [a for a in args if isinstance(a, Tensor)]
    aot_module_simplified(torch.fx.GraphModule({}, graph), fakes, fw_compiler=keep)
    assert not env.guards, [str(guard.expr) for guard in env.guards]
    kernels = [n for n in traced[0].graph.nodes if "triton_kernel" in str(n.target)]
    if chosen.function is op.reference:
        assert not kernels
        return
    assert kernels
    results = {
        "bits", "extent", "out", "hidden", "codes", "scale", "zero_point", "outliers", "marks", "columns", "overflow",
    }  # fmt: skip
    for node in kernels:
        one_program = "marks" in node.kwargs["tensors_to_clone"]  # the choice of columns, whatever the rows
        assert one_program or isinstance(node.kwargs["grid"][0][0], torch.fx.Node), "the grid was specialized"
        written = set(node.kwargs["tensors_to_clone"])
        inputs = {name for name, value in node.kwargs["kwargs"].items() if isinstance(value, torch.fx.Node)}
        planes = set() if "out" in inputs else {"high", "blocks"}  # a linear reads them
        assert written <= (results | planes) & inputs
        kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
        given = torch.fx.node.map_arg(node.kwargs["kwargs"], lambda n: n.meta["val"])
        # The choice of columns says nothing: what it writes depends on its constants.
        assert one_program or written == {*_declared(kernel, given)}, "the kernel says otherwise"


def test_a_tile_is_chosen_from_the_hint_without_a_guard() -> None:
    from lowering.triton.launch import UNKNOWN_ROWS, expected_rows

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    x = mode.from_tensor(
        torch.empty(48, 8),
        source=ConstantSource("x"),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC]),
    )
    assert expected_rows(x.shape[0]) == 48
    assert expected_rows(env.create_unbacked_symint()) == UNKNOWN_ROWS
    assert expected_rows(3) == 3
    assert not env.guards


def traced_layers(layers: int, widths: tuple[int, ...] = (256,)) -> list[list[str]]:
    """What the kernels of a graph that quantizes `layers` times write, as AOTAutograd finds out."""
    function = all_ops()["quantize_per_token"].choose("triton", (torch.ones(4, 256), True)).function
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(f"x{width}") for width in widths]
    calls = [graph.call_function(function, (x, True)) for x in inputs for _ in range(layers)]
    graph.output(tuple(graph.call_function(operator.getitem, (call, 0)) for call in calls))
    traced: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        traced.append(module)
        return module.forward

    with FakeTensorMode():
        fakes = [torch.ones(4, width) for width in widths]
    aot_module_simplified(torch.fx.GraphModule({}, graph), fakes, fw_compiler=keep)
    return [n.kwargs["tensors_to_clone"] for n in traced[0].graph.nodes if "triton_kernel" in str(n.target)]


@pytest.mark.usefixtures("offline_driver")
def test_the_same_kernel_is_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._higher_order_ops import triton_kernel_wrap

    from int8pass.asked_once import MUTATED, QUESTIONS, asked_once

    runs = []
    original = triton_kernel_wrap.generate_ttir

    def counted(*arguments: Any) -> Any:
        runs.append(arguments[0])
        return original(*arguments)

    monkeypatch.setattr(triton_kernel_wrap, "generate_ttir", counted)
    before = [getattr(triton_kernel_wrap, name, None) for _, name in QUESTIONS[:2]]
    expected = traced_layers(3, (256, 512))
    assert len(expected) == 6
    assert len(runs) >= 12, "PyTorch remembers by itself: int8pass.asked_once is not needed any more"
    runs.clear()
    with asked_once():
        assert traced_layers(3, (256, 512)) == expected
        # One for either width; none where PyTorch asks no more than our kernels say.
        assert len(runs) == (0 if hasattr(triton_kernel_wrap, MUTATED) else 2)
        with pytest.raises(ZeroDivisionError), asked_once():
            raise ZeroDivisionError
    assert [getattr(triton_kernel_wrap, name, None) for _, name in QUESTIONS[:2]] == before


def test_a_kernel_that_says_what_it_writes_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._higher_order_ops import triton_kernel_wrap

    from int8pass.asked_once import MUTATED, asked_once

    asked = []

    def identify_mutated_tensors(kernel: Any, kwargs: Any, metadata: Any) -> list[str]:
        asked.append(kernel)
        return ["x"]

    monkeypatch.setattr(triton_kernel_wrap, MUTATED, identify_mutated_tensors, raising=False)
    kernel = SimpleNamespace(arg_names=["x", "out", "scale", "n"], writes=("out", "scale"))
    tuned = SimpleNamespace(fn=kernel, configs=[])
    x = torch.ones(2)
    with asked_once():
        for form in (kernel, tuned):
            assert getattr(triton_kernel_wrap, MUTATED)(form, {"x": x, "out": x, "scale": None, "n": 3}, {}) == ["out"]
        assert not asked
        assert getattr(triton_kernel_wrap, MUTATED)(kernel, {"x": x, "out": object()}, {}) == ["x"], "an unknown kind"
        silent = SimpleNamespace(arg_names=["x", "out"])
        assert getattr(triton_kernel_wrap, MUTATED)(silent, {"x": x, "out": x}, {}) == ["x"]
    assert asked == [kernel, silent]


def test_what_differs_is_asked_again() -> None:
    from int8pass.asked_once import _key

    kernel, other = object(), object()
    x, wide = torch.ones(2), torch.ones(2, dtype=torch.float64)
    same = [_key((kernel, {"x": t, "K": 8, "flag": True}, {}), {}) for t in (x, torch.zeros(7))]
    assert same[0] == same[1]
    for arguments in (
        (other, {"x": x, "K": 8, "flag": True}, {}),
        (kernel, {"x": wide, "K": 8, "flag": True}, {}),
        (kernel, {"x": x, "K": 9, "flag": True}, {}),
        (kernel, {"x": x, "K": 8, "flag": 1}, {}),
        (kernel, {"x": None, "K": 8, "flag": True}, {}),
    ):
        assert _key(arguments, {}) != same[0]
    assert _key((kernel, {"x": object()}, {}), {}) is None, "unknown kinds are never compared"
