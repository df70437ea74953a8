"""Weights of compiled models: packed once for all graphs, released, written by the user, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from gated_model import INT8_WEIGHTS, Gated, gated, made, tokens
from harness import Spy, call, compile_and_call, dynamo_counters, relative_error
from test_sites import Block
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import int8pass
from int8pass.errors import WeightError

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(2, 33), (2, 34), (2, 1), (2, 64), (3, 40), (1, 1)]


def run_shapes(model: nn.Module, backend: str, **options: Any) -> tuple[list[Tensor], list[int], list[int]]:
    """Outputs, and after every call: graphs compiled so far, bytes packed."""
    with dynamo_counters() as counters, torch.no_grad():
        compiled = torch.compile(model, backend=backend, **({"options": options} if options else {}))
        outputs, graphs, packed = [], [], []
        for shape in SHAPES:
            outputs.append(compiled(tokens(*shape)))
            graphs.append(counters["stats"]["unique_graphs"])
            packed.append(int8pass.packed_bytes(model))
        assert not counters["graph_break"]
    return outputs, graphs, packed


def test_dynamic_shapes_and_released_weights() -> None:
    """As many graphs as plain Inductor, on the same calls; every graph reads the same packed weights; the same with
    the original weights released after the first call."""
    model = made(Gated)
    expected = [call(model, tokens(*shape)) for shape in SHAPES]
    original, weights = copy.deepcopy(model.state_dict()), {"gate": model.gate, "up": model.up, "down": model.down}
    _, plain_graphs, _ = run_shapes(model, "inductor")
    outputs, graphs, packed = run_shapes(model, "int8")
    assert graphs == plain_graphs
    assert len(set(packed)) == 1, "each weight is packed once"
    assert INT8_WEIGHTS <= packed[0] < 1.5 * INT8_WEIGHTS
    assert all(relative_error(f, e) < 0.02 for f, e in zip(outputs, expected))

    released, graphs, _ = run_shapes(model, "int8", free_weights=True)
    assert all(g <= p for g, p in zip(graphs, plain_graphs))
    for found, before in zip(released, outputs):
        torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)
    for name, linear in weights.items():
        assert not linear.weight.any(), f"{name}: pages that nobody wrote to"
        assert linear.weight.shape == original[f"{name}.weight"].shape
    with pytest.raises(WeightError, match=r"gate\.weight: its weight was released"):
        model(tokens(2, 5))
    with pytest.raises(WeightError, match="was released"):
        model.state_dict()

    model.load_state_dict(original)
    torch.testing.assert_close(call(model, tokens(*SHAPES[0])), expected[0])
    assert set(model.state_dict()) == set(original)
    torch._dynamo.reset()
    assert relative_error(compile_and_call(model, tokens(*SHAPES[0]), "int8"), expected[0]) < 0.02


def test_released_weights_cannot_be_packed_differently(spy: Spy) -> None:
    model, x = gated()
    with torch.no_grad():
        torch.compile(model, backend="int8", options={"free_weights": True})(x)
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match=r"weight: its original weight was released"):
            torch.compile(model, backend="int8", options={"smoothing": "none"})(x)


def test_weights_written_in_place_are_picked_up() -> None:
    model, x = gated()
    other = made(Gated, seed=5)
    with torch.no_grad():
        compiled = torch.compile(model, backend="int8")
        before = compiled(x)
        model.load_state_dict(other.state_dict())
        after = compiled(x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert relative_error(after, other(x)) < 0.02
        assert relative_error(after, before) > 0.1
        model.down.weight = nn.Parameter(torch.zeros_like(model.down.weight))
        torch.testing.assert_close(compiled(x), x + model.down.bias)


def test_a_write_that_no_counter_sees_can_be_told() -> None:
    """`.data` counts nothing; what README says to do then."""
    model, x = gated()
    with dynamo_counters() as counters, torch.no_grad():
        compiled = torch.compile(model, backend="int8", fullgraph=True)
        compiled(x)
        packed = int8pass.packed_bytes(model)
        assert packed >= INT8_WEIGHTS
        for change in (lambda w: w.mul_(-3), lambda w: w.copy_(torch.randn_like(w))):
            change(model.down.weight.data)
            torch.autograd.graph.increment_version(model.down.weight)
            assert relative_error(compiled(x), model(x)) < 0.02
            assert int8pass.packed_bytes(model) == packed
        assert counters["stats"]["unique_graphs"] == 1


# -- weights that cannot be packed


def test_meta_tensors_are_refused() -> None:
    model, x = gated()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="meta"):
        torch.compile(model.to("meta"), backend="int8")(x.to("meta"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model, x = gated()
    with torch.no_grad():
        model.up.weight[3, 4] = value
        with pytest.raises(BackendCompilerFailed, match=r"up\.weight holds NaN or Inf"):
            torch.compile(model, backend="int8")(x)


def test_free_weights_after_decode_still_serves_prefill() -> None:
    """The prefill graph needs sums of weights that the decode graph did not: from the int8 codes, not the originals."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="int8", options={"free_weights": True}, fullgraph=True)
        compiled(torch.randn(1, 1, 64))
        assert relative_error(compiled(x), expected) < 0.02
