"""Capture: one IR from Dynamo and from torch.export."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from harness import count_ops, executable, relative_error, run_pass
from test_sites import Block
from torch import Tensor, nn

from int8pass import pipeline
from int8pass.capture import from_export
from int8pass.graph import dialect
from int8pass.graph.constants import Store
from int8pass.recipe import Recipe


def exported(model: nn.Module, x: Tensor, **options: Any) -> tuple[Any, list[Tensor]]:
    """An ExportedProgram and the tensors of its placeholders before the user's inputs."""
    program = torch.export.export(model, (x,), **options)
    names = [s.target for s in program.graph_signature.input_specs if s.target is not None]
    return program, [operator.attrgetter(name)(model) for name in names]


def test_both_roads_give_the_same_sites_and_ops() -> None:
    torch.manual_seed(0)
    model, x = Block(norm=nn.RMSNorm).eval(), torch.randn(2, 9, 64)
    program, parameters = exported(model, x)
    captured = from_export(program)
    dialect.check(captured, "captured")
    facts = pipeline.to_portable(captured, Recipe())
    from_dynamo = run_pass(model, x, stage="portable")
    assert count_ops(captured) == from_dynamo.ops
    assert [s.name for s in facts.matches.sites] == [s.name for s in from_dynamo.facts[0].matches.sites]
    pipeline.to_lowered(captured, facts)
    with torch.no_grad():
        (found,) = executable(captured, Store(), [*parameters, x])(*parameters, x)
    assert relative_error(found, from_dynamo.output) < 1e-4


def test_exported_symbolic_shapes_are_kept() -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 9, 64)
    length = torch.export.Dim("length", min=2, max=512)
    program, parameters = exported(model, x, dynamic_shapes=({1: length},))
    captured = from_export(program)
    facts = pipeline.to_portable(captured, Recipe.preset("w8a8"))
    (given,) = [n.meta["val"] for n in captured.graph.nodes if n.op == "placeholder"]
    assert isinstance(given.shape[1], torch.SymInt)
    pipeline.to_lowered(captured, facts)
    run = executable(captured, Store(), [*parameters, x])
    for tokens in (3, 40):
        y = torch.randn(2, tokens, 64)
        with torch.no_grad():
            assert relative_error(run(*parameters, y)[0], model(y)) < 0.02


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum() + x


def test_what_dynamo_would_swallow_is_not_swallowed() -> None:
    """A model Dynamo breaks by itself still works; nothing falls back because of the pass."""
    x = torch.randn(4, 4)
    result = run_pass(DataDependent(), x, fullgraph=False)
    torch.testing.assert_close(result.output, DataDependent()(x))


def test_the_backend_by_itself_says_how_to_use_it() -> None:
    from int8pass.backend import int8
    from int8pass.errors import CaptureError

    with pytest.raises(CaptureError, match=r"torch\.compile"):
        int8(torch.fx.symbolic_trace(nn.Linear(3, 3)), [torch.randn(2, 3)])


def test_parts_with_numbers_for_names() -> None:
    """Packed weights are named after them, in code that fx writes: what begins with a digit is no name there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 16)).requires_grad_(False)
    x = torch.randn(4, 32)
    result = run_pass(model, x, "w8a8")
    assert result.ops["linear_w8a8"] == 1
    assert relative_error(result.output, model(x)) < 0.02
