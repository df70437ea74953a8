"""Folds: which are legal, why others are not, and that every one keeps the function of real architectures."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build, main_output
from harness import call, compile_and_call, executable, relative_error, run_pass
from torch import Tensor, fx, nn

from int8pass import folds
from int8pass.capture import from_dynamo
from int8pass.folds import Folds
from int8pass.graph import channels
from int8pass.graph.constants import Store
from int8pass.graph.pattern import op_name
from int8pass.match import match
from int8pass.normalize import normalize
from int8pass.recipe import Recipe, Scheme, SiteSettings
from int8pass.smooth import smooth

STEPS = 24  # exponents of up to ±3 in steps of 1/8: channels scaled by 1/8 to 8


def random_recipe(sites: Sequence[Any]) -> Recipe:
    """Every channel of every site scaled at random."""
    generator = torch.Generator().manual_seed(0)
    settings = {}
    for site in sites:
        steps = torch.randint(-STEPS, STEPS + 1, (site.width,), generator=generator)
        settings[site.name] = SiteSettings(exponents=tuple((steps / 8).tolist()))
    return Recipe(Scheme(smoothing="calibrated", outliers="none"), sites=settings)


def smoothed(model: nn.Module, inputs: Any, fullgraph: bool = True) -> tuple[Any, Counter[str], dict[str, str]]:
    """`model` with every site smoothed by a random vector and nothing quantized: output, folds by kind, reasons."""
    kinds: Counter[str] = Counter()
    reasons: dict[str, str] = {}

    def backend(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, example)
        normalize(program)
        sites = match(program, Recipe()).sites
        result = smooth(program, sites, random_recipe(sites))
        kinds.update(fold.kind for fold in result.folds.values())
        reasons.update(result.reasons)
        assert set(result.vectors) == {site.name for site in sites}
        program.graph.eliminate_dead_code()
        program.graph.lint()
        return executable(program, Store(), example)

    return compile_and_call(model, inputs, backend, fullgraph), kinds, reasons


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models: threads cost more than they give."""
    threads, fastpath = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(fastpath)


# name: sites folded into a norm (or its gamma in another spelling), into a linear, and multiplied at run time
KINDS = {
    "llama": (4, 4, 0), "qwen2": (4, 4, 0), "qwen3": (4, 4, 0), "gemma2": (4, 4, 0), "gemma3": (4, 4, 0),
    "phi3": (4, 4, 0), "olmo2": (0, 4, 4), "granite": (4, 4, 0), "glm4": (4, 4, 0), "arcee": (4, 2, 2),
    "phi": (2, 2, 2), "gpt2": (4, 2, 2), "gpt_neox": (4, 2, 2), "opt": (4, 4, 0), "opt_post_norm": (1, 4, 5),
    "bloom": (4, 2, 2), "falcon_7b": (2, 0, 4), "olmo": (0, 4, 4), "cohere": (2, 4, 0), "nemotron": (4, 2, 2),
    "bert": (0, 2, 6), "albert": (1, 0, 4), "modernbert": (3, 4, 1), "deberta_v2": (0, 2, 8), "wav2vec2": (0, 2, 7),
    "t5": (10, 10, 1), "whisper": (10, 6, 5), "vit": (4, 2, 3), "clip": (4, 2, 2), "swin": (3, 2, 4),
    "convnext": (2, 0, 2), "mixtral": (2, 2, 0), "qwen2_moe": (2, 4, 2), "deepseek_v3": (7, 4, 1), "gpt_oss": (2, 2, 0),
    "llama4": (2, 4, 2),
}  # fmt: skip


def test_thirty_architectures_of_every_family() -> None:
    families = {each.name: each.family for each in ARCHITECTURES}
    assert len(KINDS) >= 30
    assert {families[name] for name in KINDS} == set(families.values())


@pytest.mark.parametrize("name", KINDS)
def test_every_fold_keeps_the_function(name: str) -> None:
    breaks = next(each.own_breaks for each in ARCHITECTURES if each.name == name)
    model, inputs = build(name)
    with torch.no_grad():
        expected = main_output(call(model, inputs))
    output, kinds, reasons = smoothed(model, inputs, fullgraph=breaks == 1)
    assert tuple(kinds[kind] for kind in ("norm", "linear", "none")) == KINDS[name], reasons
    assert len(reasons) <= KINDS[name][2], "a reason for every fold that is not legal"
    assert relative_error(main_output(output), expected) <= 1e-5


class Attention(nn.Module):
    """Grouped-query attention with a bias on v, whose values may be wanted by someone else."""

    def __init__(self, leak: bool = False, key_is_value: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o = nn.Linear(32, 32)
        self.leak, self.key_is_value = leak, key_is_value

    def forward(self, x: Tensor) -> Any:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, 1)
        k = v if self.key_is_value else self.k(x).unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, 1)
        y = self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (y, v) if self.leak else y


class Gated(nn.Module):
    """A gated MLP with a chosen gate."""

    def __init__(self, gate: Callable[[Tensor], Tensor], scaled: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.act, self.scaled = gate, scaled

    def forward(self, x: Tensor) -> Tensor:
        gate = self.act(self.gate(x))
        if self.scaled:
            return self.down(self.up(x) * gate * 0.5 + x.sum())
        return self.down(gate * self.up(x))


class DenseExperts(nn.Module):
    """A norm read by a router and by experts that are linears: all must be rescaled, and can be."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(32), nn.Linear(32, 3)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        weights = self.router(x).softmax(-1).topk(2, -1)
        chosen = torch.zeros_like(x[..., :3]).scatter(-1, weights.indices, weights.values)
        return sum(chosen[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


class Tapped(nn.Module):
    """A norm whose result is also added to the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.RMSNorm(32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.up(y)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "grouped heads": (Attention, {}),
    "values returned": (lambda: Attention(leak=True), {"o": "what makes it is also read by output"}),
    "keys are values": (lambda: Attention(key_is_value=True), {"o": "also read by|no scale passes"}),
    "silu gate": (lambda: Gated(nn.functional.silu), {}),
    "sum after the product": (lambda: Gated(nn.functional.silu, True), {"down": "no scale passes through add"}),
    "router and experts": (DenseExperts, {}),
    "residual tap": (Tapped, {"up": "what makes it is also read by add"}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_legal(name: str) -> None:
    """Everything that the linears' own input is not counted among: that is a plain tensor, and always multiplied."""
    build_case, expected = CASES[name]
    torch.manual_seed(0)
    model = build_case().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 5, 32)
    output, _, reasons = smoothed(model, x)
    first = [site for site in reasons if site not in expected]
    assert all(reasons[site] == "no norm or linear makes its input" for site in first), reasons
    for site, reason in expected.items():
        assert re.search(reason, reasons[site]), reasons
    wanted = call(model, x)
    wanted, output = (v[0] if isinstance(v, tuple) else v for v in (wanted, output))
    assert relative_error(output, wanted) <= 1e-5


def test_heads_of_a_group_share_their_scale() -> None:
    torch.manual_seed(0)
    maps: dict[str, tuple[int, ...]] = {}

    def backend(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, example)
        normalize(program)
        sites = match(program, Recipe()).sites
        legal = Folds(program, sites)
        maps.update({s.name: f.channels.channels for s in sites if (f := legal.of(s)).channels is not None})
        return gm.forward

    compile_and_call(Attention(), torch.randn(2, 5, 32), backend)
    assert maps == {"o": tuple(head // 2 * 8 + d for head in range(4) for d in range(8))}


def test_only_folds_that_are_wanted_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data norms alone are smoothed; what makes the input of `down` would be checked by running the gate."""
    checked: list[str] = []

    def check(found: channels.ChannelMap, source: fx.Node) -> bool:
        checked.append(op_name(found.producer))
        return True

    monkeypatch.setattr(folds, "carries_scale", check)
    model = nn.Sequential(OrderedDict(norm=nn.RMSNorm(32), mlp=Gated(nn.functional.silu))).requires_grad_(False)
    x = torch.randn(2, 5, 32)
    run_pass(model, x, "default")
    assert checked == ["rms_norm"]
    smoothed(model, x)
    assert checked == ["rms_norm", "rms_norm", "linear"]


def test_a_wrong_map_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run on random numbers is what decides, not the walk."""
    monkeypatch.setattr(channels, "_SAME", channels._SAME | {"gelu"})
    model = Gated(nn.functional.silu)
    model.forward = lambda x: model.down(nn.functional.gelu(model.up(x)))  # type: ignore[method-assign]
    x = torch.randn(2, 5, 32)
    output, _, reasons = smoothed(model, x)
    assert reasons["down"] == "the fold changed the result by more than 1e-5"
    assert relative_error(output, call(model, x)) <= 1e-5
