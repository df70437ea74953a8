"""Residual sums that a linear makes in its epilogue: the rewrite, its numbers, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import relative_error, run_pass
from test_real_model import FirstLayers, smollm2
from torch import Tensor, fx, nn

import int8pass
from int8pass import hilo, residual
from int8pass.graph.pattern import op_name
from int8pass.inspect import timing
from int8pass.match import Site


class Block(nn.Module):
    """A sum before a norm, from either side; one at the end; one of sums; one that a norm and the next sum read."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.LayerNorm(width)
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        x = self.b(self.norm1(x)) + x
        return x + self.c(self.norm2(x)) + self.d(x.sin())


class Alone(nn.Module):
    """Sums that are none of these: broadcast, scaled, of a linear read twice, of another type, of other strides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        broadcast = self.a(x) + x[:1]
        scaled = torch.add(x, self.b(broadcast), alpha=2.0)
        twice = self.c(scaled)
        other = (self.d(twice).double() + x) + (self.e(twice.tanh()) + x.double())
        return (x + twice).relu() + twice.sin() + other + (x.mT.contiguous().mT + self.f(x.cos()))


def inputs(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 64).to(dtype)
    x[..., 5] *= 20
    return kind().to(dtype).requires_grad_(False), x


@pytest.fixture
def in_epilogues(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As with a kernel that adds, with the references."""
    monkeypatch.setattr(residual, "_composed", lambda *given: False)
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("in_epilogues")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asymmetric", "llm.int8"])
def test_sums_go_into_linears(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if scheme == "llm.int8":
        monkeypatch.setattr(hilo, "DEVICES", frozenset({"cpu"}))
    model, x = inputs(Block)
    found = run_pass(model, x, scheme)
    kind = "_hilo" if scheme == "llm.int8" else ""
    assert found.ops[f"linear_w8a8{kind}_add"] == 4
    assert found.ops[f"norm_quantize{kind}"] == 2
    assert not any(found.ops[name] for name in (f"linear_w8a8{kind}", f"add_norm_quantize{kind}", "add"))
    assert found.facts[0].fused.hits["residuals_into_linears"] == 4
    monkeypatch.undo()
    if scheme == "llm.int8":
        monkeypatch.setattr(hilo, "DEVICES", frozenset({"cpu"}))
    apart = run_pass(model, x, scheme)
    assert apart.ops[f"add_norm_quantize{kind}"] == 2
    # A rounding moves a code here and there.
    assert relative_error(found.output, apart.output) < 2e-3
    assert relative_error(found.output, model(x)) < 0.02


@pytest.mark.usefixtures("in_epilogues")
def test_sums_go_into_linears_of_float_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """There no norm takes a sum, so that each would be a kernel of its own."""
    model, x = inputs(Block)
    found = run_pass(model, x, "w8a16")
    assert found.ops["linear_w8a16_add"] == 4
    assert not any(found.ops[name] for name in ("linear_w8a16", "add"))
    monkeypatch.undo()
    apart = run_pass(model, x, "w8a16")
    assert (apart.ops["linear_w8a16"], apart.ops["add"]) == (4, 4)
    assert relative_error(found.output, apart.output) < 1e-5
    assert relative_error(found.output, model(x)) < 0.01


@pytest.mark.usefixtures("in_epilogues")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_applied_twice_changes_nothing(scheme: str) -> None:
    assert residual.residuals_into_linears(run_pass(*inputs(Block), scheme).programs[0]) == 0


@pytest.mark.usefixtures("in_epilogues")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_other_sums_stay(scheme: str) -> None:
    model, x = inputs(Alone)
    found = run_pass(model, x, scheme)
    assert found.ops[f"linear_{scheme}"] == 6
    assert found.ops[f"linear_{scheme}_add"] == 0
    assert relative_error(found.output, model(x)) < 0.02


class Two(nn.Module):
    """Sums of linears, of which none is a product of outlier columns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        nn.init.constant_(self.b.bias, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y + self.b(x.sin()) + (y + y)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asymmetric", "w8a16", "zeroquant", "llm.int8"])
def test_sums_of_linears(scheme: str, keep: bool) -> None:
    model, x = inputs(Two)
    recipe = int8pass.Recipe.preset(scheme)
    compiled = torch.compile(
        model, backend="int8", options={"recipe": recipe.override("b", keep=True) if keep else recipe}
    )
    assert relative_error(compiled(x), model(x)) < 0.03
    torch._dynamo.reset()


@torch.library.custom_op("mylib::add", mutates_args=())
def another_add(x: Tensor, y: Tensor) -> Tensor:
    return x + 3 * y


another_add.register_fake(lambda x, y: torch.empty_like(x))


class Another(nn.Module):
    """Before a norm and at the end: an operator that has the name of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.RMSNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = another_add(x, self.a(x))
        return another_add(x, self.b(self.norm(x)))


@pytest.mark.usefixtures("in_epilogues")
def test_an_operator_of_that_name_is_no_sum() -> None:
    model, x = inputs(Another)
    found = run_pass(model, x, "w8a8")
    assert found.ops["mylib::add"] == 2
    assert found.ops["linear_w8a8_add"] == found.ops["add_norm_quantize"] == 0
    assert relative_error(found.output, model(x)) < 0.02


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


@pytest.mark.usefixtures("in_epilogues")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_a_16_bit_sum_is_rounded_once(scheme: str) -> None:
    """It is the sum in fp32, rounded; apart, most results of a linear in bf16 are off by its own rounding."""
    model, x = inputs(Sum, torch.bfloat16)
    found = run_pass(model, x, scheme)
    assert found.ops[f"linear_{scheme}_add"] == 1
    wide = run_pass(model.float(), x.float(), scheme).output
    assert torch.equal(found.output, wide.bfloat16())


def test_where_no_kernel_adds_nothing_changes() -> None:
    model, x = inputs(Block)
    found = run_pass(model, x, "w8a8")
    assert found.ops["add_norm_quantize"] == 2
    assert found.ops["linear_w8a8_add"] == 0


@pytest.mark.usefixtures("in_epilogues")
def test_the_inspection_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites are named as without, and a sum counts to the linear that makes it."""
    model, x = inputs(Block)
    monkeypatch.setattr(hilo, "DEVICES", frozenset({"cpu"}))
    compared = []

    def originals(site: Site, fused: set[str]) -> list[fx.Node]:
        found = before(site, fused)
        compared.append(("linear_w8a8_hilo_add" in fused, [op_name(node) for node in found].count("add")))
        return found

    before = timing.originals
    monkeypatch.setattr(timing, "originals", originals)
    report = int8pass.inspect(model, x, recipe="llm.int8", data=[(x,)])
    assert {site.scheme for site in report.sites} == {"w8a8 affine, outlier blocks"}
    assert len({row.site for row in report.runtime if row.op == "linear_w8a8_hilo_add"}) == 4
    assert compared == [(True, 1)] * 4


@pytest.mark.slow
@pytest.mark.usefixtures("in_epilogues")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_on_trained_weights(scheme: str, smollm2: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2: every layer has two sums, and its result is that of norms that add."""
    model, ids = smollm2
    layers = FirstLayers(model, 4)
    with torch.no_grad():
        found = run_pass(layers, ids[:, :32], scheme)
        monkeypatch.undo()
        apart = run_pass(layers, ids[:, :32], scheme)
    assert found.ops[f"linear_{scheme}_add"] == 8
    assert relative_error(found.output, apart.output) < 0.01


__all__ = ["smollm2"]
