"""Pieces of a captured graph: constants in the code, branches, checkpoints and `torch.vmap`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import dynamo_counters, relative_error, run_pass
from torch import Tensor, fx, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._functorch import predispatch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import int8pass
from int8pass import pipeline
from int8pass.capture import from_export
from int8pass.errors import CaptureError
from int8pass.graph import dialect
from int8pass.recipe import Recipe
from int8pass.regions import in_plain_calls


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))


class Fixed(Model):
    """Tensors written in the code: read, written in place, and read twice."""

    def forward(self, x: Tensor) -> Tensor:
        places, scale = torch.tensor([3, 1]), torch.tensor([1.0, 2.0, 3.0])
        scale += 1
        scale[1] = 7.0
        y = self.a(x).index_copy(1, places, self.b(x)[:, :2])
        y[:, 0] = 5.0
        return self.c(y).index_select(1, places) * scale.sum()


class Branches(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cond(x.sum() > 0, self.a, self.b, (self.norm(x),)))


class Checkpoint(Model):
    def part(self, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        return self.a(h) * scale, self.b(h)

    def forward(self, x: Tensor) -> Tensor:
        y, z = checkpoint(self.part, x, 2.0, use_reentrant=False)
        return self.c(y.relu() + z)


class MappedInCheckpoint(Model):
    def part(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row, scale: self.a(self.norm(row)) * scale, in_dims=(0, None))(x, torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(checkpoint(self.part, x, use_reentrant=False)))


class Mapped(Model):
    """Linears over a dimension that `vmap` takes away, twice, and one over another."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.vmap(lambda row: self.a(self.norm(row)) * torch.tensor(2.0))(x)
        z = torch.vmap(torch.vmap(lambda row, w: row * w, in_dims=(0, None)))(y, x[:, 0])
        return self.c(torch.vmap(self.b, in_dims=1, out_dims=1)(z))


class Mask(Model):
    """A mask by nested `vmap` of a function of indices, as transformer libraries make them."""

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & real[batch, key]

        made: Callable[..., Tensor] = seen
        for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
            made = torch.vmap(made, in_dims=dims)
        batch, tokens, _ = x.shape
        with TransformGetItemToIndex():
            mask = made(torch.arange(batch), torch.arange(1), torch.arange(tokens), torch.arange(tokens))
        h = self.norm(x)
        q, k, v = (y.view(batch, tokens, 4, 16).transpose(1, 2) for y in (self.a(h), self.b(h), h))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.c(o.transpose(1, 2).reshape(batch, tokens, 64))


def made(kind: type[nn.Module], *shape: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    x = torch.randn(*shape, 64)
    real = torch.ones(*shape, dtype=torch.bool)
    real[0, 2] = False
    return kind().eval().requires_grad_(False), (x, real) if kind is Mask else (x,)


@pytest.mark.parametrize(
    ("kind", "taken"), [(Fixed, 2), (Branches, 1), (Checkpoint, 3), (MappedInCheckpoint, 3), (Mask, 3)]
)
def test_linears_in_and_beside_them_are_taken(kind: type[nn.Module], taken: int) -> None:
    model, inputs = made(kind, 2, 5)
    found = run_pass(model, inputs, "w8a8")
    assert found.taken == taken, found.refused
    assert found.ops["linear_w8a8"] > 0
    assert set(found.refused.values()) <= {"its input is written in place in the graph"}
    assert relative_error(found.output, model(*inputs)) < 0.03


@pytest.mark.parametrize(
    ("kind", "taken"),
    [(Fixed, 2), (Branches, 1), (Checkpoint, 3), (Mapped, 2), (MappedInCheckpoint, 3), (Mask, 3)],
)
def test_compiled_they_give_what_the_model_gives(kind: type[nn.Module], taken: int) -> None:
    model, inputs = made(kind, 2, 5)
    calls = [inputs, inputs, (-inputs[0], *inputs[1:]), made(kind, 3, 7)[1], made(kind, 4, 9)[1]]
    with torch.no_grad():
        expected = [model(*given) for given in calls]  # before the counters: eager torch.cond is compiled, too
    graphs = []
    with dynamo_counters() as counters, torch.no_grad():
        compiled = torch.compile(model, backend="int8", fullgraph=True)
        for given, wanted in zip(calls, expected, strict=True):
            assert relative_error(compiled(*given), wanted) < 0.03
            graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    assert graphs == [1, 1, 1, 2, 2], "one of a size, one of every size; a second call finds constants as the first did"
    codes = taken * 64 * 64
    assert codes < int8pass.packed_bytes(model) < codes * 1.25, "these linears are int8, and packed once"


@pytest.mark.parametrize("kind", [Fixed, Branches, Checkpoint, Mapped, MappedInCheckpoint])
def test_inspection_takes_them(kind: type[nn.Module]) -> None:
    model, inputs = made(kind, 2, 5)
    report = int8pass.inspect(model, inputs, data=[inputs])
    assert report.sites


@pytest.mark.parametrize(("kind", "taken"), [(Fixed, 2), (Branches, 1), (Checkpoint, 3), (Mask, 3)])
def test_exported_they_are_captured_alike(kind: type[nn.Module], taken: int) -> None:
    model, inputs = made(kind, 2, 5)
    captured = from_export(torch.export.export(model, inputs))
    dialect.check(captured, "captured")
    facts = pipeline.to_portable(captured, Recipe())
    assert sum(len(site.readers) for site in facts.matches.sites) == taken


def test_exported_copies_stay_copies(tmp_path: Path) -> None:
    """A tensor of the code that `forward` writes is the same at the next call."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = made(Fixed, 2, 5)
    int8pass.export_onnx(model, inputs, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for _ in range(2):
        (found,) = session.run(None, {session.get_inputs()[0].name: inputs[0].numpy()})
        assert relative_error(torch.from_numpy(found), model(*inputs)) < 0.03


def test_other_transforms_are_refused() -> None:
    model = Model().requires_grad_(False)
    compiled = torch.compile(lambda x: torch.func.jvp(model.a, (x,), (x,))[0], backend="int8")
    with torch.no_grad(), pytest.raises(Exception, match=r"a transform of torch\.func other than vmap") as caught:
        compiled(torch.randn(2, 64))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), CaptureError)


def test_a_vmap_that_cannot_be_traced_leaves_no_level_behind() -> None:
    """Else every later call of PyTorch in this process would be within it."""
    fake_mode = FakeTensorMode()
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = fake_mode.from_tensor(torch.randn(2, 3))
    graph.call_function(predispatch._vmap_increment_nesting, (2, "error"))
    batched = graph.call_function(predispatch._add_batch_dim, (x, 0, 1))
    wrong = graph.call_function(operator.matmul, (batched, torch.float32))
    out = graph.call_function(predispatch._remove_batch_dim, (wrong, 1, 2, 0))
    graph.call_function(predispatch._vmap_decrement_nesting)
    graph.output((out,))
    with pytest.raises(TypeError):
        in_plain_calls(fx.GraphModule({}, graph), fake_mode)
    assert not torch._C._functorch.get_interpreter_stack()


def test_a_graph_with_none_of_them_is_left_alone() -> None:
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    gm = fx.GraphModule({}, graph)
    assert in_plain_calls(gm, FakeTensorMode()) is gm
