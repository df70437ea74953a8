"""Fusions that only GPUs get, and the constants their kernels want, with the references on the CPU."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from harness import relative_error, run_pass
from torch import Tensor, nn

from int8pass import fuse, lower
from int8pass.recipe import PRESETS, Recipe, SiteSettings
from lowering import registry
from lowering.ops.quantize import split_quantize


class Mlp(nn.Module):
    """Pre-norm gated MLP on top of a residual sum."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.norm = nn.RMSNorm(64)
        self.gate, self.up = nn.Linear(64, 96, bias=bias), nn.Linear(64, 96, bias=bias)
        self.down = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Shared(Mlp):
    """The gate projection is read twice."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        gate = self.gate(h)
        return self.down(F.silu(gate) * self.up(h)) + gate.sum()


def mlp(kind: type[Mlp] = Mlp) -> tuple[Mlp, Tensor]:
    torch.manual_seed(0)
    return kind().requires_grad_(False), torch.randn(2, 9, 64)


def ops_and_output(model: nn.Module, x: Tensor, scheme: str) -> tuple[Counter[str], Tensor]:
    result = run_pass(model, x, scheme)
    return result.ops, result.output


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asymmetric", "llm.int8", "default"])
def test_the_gate_product_joins_its_linear(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp()
    joined, output = ops_and_output(model, x, scheme)
    monkeypatch.setattr(fuse, "fuse_gated_linear", lambda node, edit: None)
    apart, expected = ops_and_output(model, x, scheme)
    dynamic = "_dynamic" if scheme in {"llm.int8", "default"} else ""
    assert apart[f"act_mul_quantize{dynamic}"] == 1
    assert apart[f"add_norm_quantize{dynamic}"] == 1
    assert joined[f"gated_linear_quantize{dynamic}"] == 1
    assert joined["linear_w8a8"] == apart["linear_w8a8"] - 1
    assert joined[f"act_mul_quantize{dynamic}"] == 0
    assert relative_error(output, expected) < 1e-5


def test_a_linear_with_another_reader_stays() -> None:
    ops, _ = ops_and_output(*mlp(Shared), "w8a8")
    assert ops["gated_linear_quantize"] == 0


def test_a_constant_argument_is_prepacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation that asks for it gets its own form of the columns, computed when compiling."""
    model, x = mlp()
    scheme = dataclasses.replace(PRESETS["w8a8"], outliers="static")
    names = [site.name for site in run_pass(model, x, "w8a8").facts[0].matches.sites]
    recipe = Recipe(scheme, sites={name: SiteSettings(columns=(3, 5)) for name in names})
    expected = run_pass(model, x, recipe).output
    calls: list[int] = []

    def shifted(columns: Tensor, width: int) -> Tensor:
        calls.append(width)
        return columns + 1000

    def implementation(x: Tensor, columns: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return split_quantize.reference(x, columns - 1000, symmetric)  # type: ignore[no-any-return]

    prepack = registry.Prepack("columns", shifted, lambda *args: (args[0].shape[-1],))
    mine = registry.Implementation("cpu", "cpu:mine", implementation, lambda *args: True, prepack)
    monkeypatch.setattr(split_quantize, "implementations", [mine])
    result = run_pass(model, x, recipe)
    assert result.facts[0].implementations["split_quantize", "cpu:mine"] >= 1
    assert set(calls) == {64, 96}  # the second by what the gated linear chooses for its result
    assert torch.equal(result.output, expected)
    assert lower.TARGETS["cuda"] == "triton"
