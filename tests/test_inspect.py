"""The report: what it says of a small model, word for word; counts; refusals; and that looking changes nothing."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from harness import call
from torch import Tensor, nn

import int8pass
from int8pass.errors import CaptureError, OptionError
from int8pass.inspect.text import coloured


class Model(nn.Module):
    """A norm with two readers, a product, a head, a linear whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.mix, self.head = nn.Linear(32, 32), nn.Linear(32, 100)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        x = x + nn.functional.linear(x, self.mix.weight.tanh())
        return self.head(x)


def model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Model().eval(), torch.randn(2, 5, 32)


GOLDEN = """\
recipe    default (w8a8 affine, largest columns)
SCHEME
graphs    1    sites 2    linears taken 3, not taken 2
weights   0.0 MB → 0.0 MB (0.328)

site  pattern       linears  K×N     scheme                        smoothing     columns  W dB  MB                 implementation
gate  norm          gate up  32×128  w8a8 affine, largest columns  folded α=0.5  16       48.4  0.0164 → 0.00563   IMPL
down  gate product  down     64×32   w8a8 affine, largest columns  -             16       48.3  0.00819 → 0.00243  IMPL

linears not taken:
  linear_3: its weight is no parameter but computed in the graph (by tanh)
      FILE: x = x + nn.functional.linear(x, self.mix.weight.tanh())
  head: the output head stays in its dtype (options={'quantize_head': True} takes it too)
      FILE: return self.head(x)

worst sites:
  down  W 48.3 dB
  gate  W 48.4 dB"""  # noqa: E501

GOLDEN_DATA = """\
recipe    default (w8a8 affine, largest columns)
SCHEME
graphs    1    sites 2    linears taken 3, not taken 2
weights   0.0 MB → 0.0 MB (0.328)
output    61.7 dB against the original, on 20 tokens

site  pattern       linears  K×N     scheme                        smoothing     columns  absmax       max/median   W dB  local dB            cumulative dB  alone dB  MB                 implementation
gate  norm          gate up  32×128  w8a8 affine, largest columns  folded α=0.5  16       3.07 → 3.07  1.44 → 1.44  48.4  44.5 → 44.5 → 47.5  47.5           64.6      0.0164 → 0.00563   IMPL
down  gate product  down     64×32   w8a8 affine, largest columns  -             16       1.78 → 1.78  4 → 4        48.3  42.8 → 42.8 → 47.0  43.3           64.9      0.00819 → 0.00243  IMPL

linears not taken:
  linear_3: its weight is no parameter but computed in the graph (by tanh)
      FILE: x = x + nn.functional.linear(x, self.mix.weight.tanh())
  head: the output head stays in its dtype (options={'quantize_head': True} takes it too)
      FILE: return self.head(x)

worst sites:
  down  local 47.0 dB  cumulative 43.3 dB  alone 64.9 dB  W 48.3 dB
  gate  local 47.5 dB  cumulative 47.5 dB  alone 64.6 dB  W 48.4 dB"""  # noqa: E501


def portable_text(report: int8pass.Report) -> str:
    """Without what depends on the device (the implementation's name) and on this file (its line numbers)."""
    text = str(report)
    for name in {name for site in report.sites for name in site.implementations}:
        text = text.replace(name, "IMPL")
    text = re.sub(r"\S*test_inspect\.py:\d+", "FILE", text)
    text = re.sub(r"^scheme    activations=.*$", "SCHEME", text, flags=re.M)
    return re.sub(r"implementation *$", "implementation", text, flags=re.M)


def test_the_text() -> None:
    assert portable_text(int8pass.inspect(*model())) == GOLDEN


def test_the_text_with_data() -> None:
    inspected, x = model()
    torch.manual_seed(1)
    report = int8pass.inspect(
        inspected, x, data=[torch.randn(2, 5, 32) for _ in range(2)], schemes=False, profile=False
    )
    timeless = tuple(dataclasses.replace(site, seconds=None) for site in report.sites)
    assert portable_text(dataclasses.replace(report, sites=timeless, runtime=())) == GOLDEN_DATA
    ran = str(report).split("what ran:\n")[1]
    assert re.search(r"^  linear_w8a8 +\S+ +\d +\d+\.\d\d +\d", ran, re.M)


def test_a_narrow_terminal_names_what_has_no_room() -> None:
    report = int8pass.inspect(*model())
    shown = re.sub(r"\x1b\[[0-9;]*m", "", coloured(report, width=60))
    assert "no room for:" in shown
    assert "implementation" in shown.split("no room for:")[1].splitlines()[0]
    assert all(len(line.rstrip()) <= 60 for line in shown.splitlines() if line.startswith(("gate", "down", "site")))
    wide = re.sub(r"\x1b\[[0-9;]*m", "", coloured(report, width=250))
    assert "no room for:" not in wide
    assert "\x1b[32m48.4" in coloured(report, width=250), "good is green"


def test_the_facts() -> None:
    report = int8pass.inspect(*model())
    assert report.counts == {"graphs": 1, "sites": 2, "taken": 3, "refused": 2}
    gate, down = report.sites
    assert (gate.name, gate.producer, gate.linears, gate.shape) == ("gate", "norm", ("gate", "up"), (128, 32))
    assert (down.name, down.producer, down.linears, down.shape) == ("down", "gate product", ("down",), (32, 64))
    assert gate.implementations
    assert all(hits > 0 for hits in report.rules.values())
    for refused in report.refused:
        assert re.match(r".*test_inspect\.py:\d+: .+", refused.source)


CASES = {  # recipe → (scheme of the first site, columns, smoothing)
    "default": ("w8a8 affine, largest columns", 16, "folded"),
    "w8a8": ("w8a8 symmetric", 0, ""),
    "w8a8-asymmetric": ("w8a8 affine", 0, ""),
    "w8a16": ("w8a16", 0, ""),
    "llm.int8": ("w8a8 affine, columns > 6", 32, "folded"),
    "zeroquant": ("w8a8 symmetric, groups of 128", 0, ""),
}


@pytest.mark.parametrize("preset", CASES)
def test_every_preset_is_described(preset: str) -> None:
    report = int8pass.inspect(*model(), recipe=preset)
    site = report.sites[0]
    assert (site.scheme, site.columns, site.smoothing) == CASES[preset]
    assert report.recipe == f"{preset} ({site.scheme})"
    assert report.counts["taken"] == 3


def test_a_custom_recipe_and_the_head() -> None:
    recipe = int8pass.Recipe(int8pass.Scheme(capacity=8), sites={"down": int8pass.SiteSettings(keep=True)})
    report = int8pass.inspect(*model(), recipe=recipe, quantize_head=True)
    assert report.recipe == (
        "custom (w8a8 affine, largest columns, head quantized, 1 sites with settings of their own)"
    )
    assert [site.name for site in report.sites] == ["gate", "head"]
    assert {r.linear: r.reason for r in report.refused}["down"] == "kept in its dtype by the recipe"
    assert report.sites[0].columns == 8


def test_inspecting_changes_nothing() -> None:
    inspected, x = model()
    state = {name: p.detach().clone() for name, p in inspected.state_dict().items()}
    expected, attributes = call(inspected, x), set(vars(inspected))
    int8pass.inspect(inspected, x)
    int8pass.inspect(inspected, {"x": x})
    int8pass.inspect(inspected, (x,), data=[x], profile=False)
    assert all(torch.equal(p, state[name]) for name, p in inspected.state_dict().items())
    assert set(vars(inspected)) - {"_is_torch_compile"} == attributes  # torch.compile's own mark
    assert torch.equal(call(inspected, x), expected)
    assert int8pass.packed_bytes(inspected) == 0
    assert all(p.requires_grad for p in inspected.parameters())
    assert call(inspected, x).requires_grad


class Breaks(nn.Module):
    """Two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        torch._dynamo.graph_break()
        return x + self.two(x)


def test_graphs_are_collected() -> None:
    report = int8pass.inspect(Breaks(), torch.randn(4, 32))
    assert report.counts == {"graphs": 2, "sites": 2, "taken": 2, "refused": 0}
    assert "linears not taken" not in str(report)


def test_a_model_without_linears() -> None:
    report = int8pass.inspect(nn.LayerNorm(32), torch.randn(4, 32))
    assert report.counts == {"graphs": 1, "sites": 0, "taken": 0, "refused": 0}
    assert "no site: no linear of this model was taken" in str(report)


class Uncompiled(nn.Module):
    """Dynamo leaves it alone."""

    @torch._dynamo.disable
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_what_cannot_be_inspected() -> None:
    with pytest.raises(CaptureError, match=r"torch\.compile found nothing to compile in this model"):
        int8pass.inspect(Uncompiled(), torch.randn(4, 32))
    with pytest.raises(OptionError, match="unknown preset 'int4'"):
        int8pass.inspect(*model(), recipe="int4")
