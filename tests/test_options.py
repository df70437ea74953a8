"""Options of `torch.compile(model, backend="int8", options=...)`: where they arrive, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from gated_model import INT8_WEIGHTS, WIDTH, Gated, gated, made
from harness import Spy, call, relative_error
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config

import int8pass
from int8pass import lower
from int8pass.recipe import CALIBRATED, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


class WithHead(nn.Module):
    """An embedding, a body, and an output head as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(50, WIDTH), Gated(), nn.Linear(WIDTH, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)))


@pytest.mark.slow
def test_every_preset_runs() -> None:
    model, x = gated()
    expected = call(model, x)
    errors = {}
    for preset in [p for p in int8pass.presets() if p not in CALIBRATED]:  # the others: test_calibration.py
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="int8", fullgraph=True, options={"recipe": preset})
        with torch.no_grad():
            errors[preset] = relative_error(compiled(x), expected)
    assert all(0 < error < 0.02 for error in errors.values()), errors


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # (options, Inductor settings they lead to)
    "none": ({}, {}),
    "preset": ({"recipe": "w8a16"}, {}),
    "recipe": ({"recipe": Recipe.preset("w8a8")}, {}),
    "fields": ({"outliers": "none", "symmetric": True}, {}),
    "fields over a preset": ({"recipe": "llm.int8", "threshold": 3.0, "capacity": 8}, {}),
    "inductor": ({"inductor": {"epilogue_fusion": False}}, {"epilogue_fusion": False}),
    "mode": ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
    "mode default": ({"mode": "default"}, {}),
    "inductor over mode": (
        {"mode": "reduce-overhead", "inductor": {"triton.cudagraphs": False}}, {"triton.cudagraphs": False}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_reach_the_pass_and_inductor(name: str, spy: Spy) -> None:
    options, inductor = OPTIONS[name]
    model, x = gated()
    with torch.no_grad():
        found = torch.compile(model, backend="int8", options=options)(x)
    assert spy.config == inductor
    assert int8pass.packed_bytes(model) >= INT8_WEIGHTS
    assert relative_error(found, model(x)) < 0.03


def test_inductor_launches_nothing_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels would read what ours still write, whatever the process has set."""
    given: list[dict[str, Any]] = []

    def compile_fx(*arguments: Any, config_patches: dict[str, Any]) -> Any:
        given.append(config_patches)
        return original(*arguments, config_patches=config_patches)

    original = lower.compile_fx
    monkeypatch.setattr(lower, "compile_fx", compile_fx)
    model, x = gated()
    with torch.no_grad(), inductor_config.patch({"triton.enable_pdl": True}):
        torch.compile(model, backend="int8")(x)
        assert inductor_config.triton.enable_pdl is True, "of the process, and left alone"
    assert [patches["triton.enable_pdl"] for patches in given] == [False]


def test_mode_of_torch_compile_reaches_inductor(spy: Spy) -> None:
    model, x = gated()
    with torch.no_grad():
        torch.compile(model, backend="int8", mode="max-autotune")(x)
    assert spy.config["max_autotune"] is True


def test_the_head_is_packed_on_request_only(spy: Spy) -> None:
    ids = torch.arange(12).view(2, 6)
    plain, asked = made(WithHead), made(WithHead)
    with torch.no_grad():
        torch.compile(plain, backend="int8")(ids)
        torch.compile(asked, backend="int8", options={"quantize_head": True})(ids)
    assert 50 * WIDTH <= int8pass.packed_bytes(asked) - int8pass.packed_bytes(plain) <= 50 * (WIDTH + 8)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "option": ({"recipee": "w8a8"}, r"unknown option 'recipee'; options are recipe, free_weights.*threshold"),
    "preset": ({"recipe": "w4a4"}, r"unknown preset 'w4a4'; presets are default, w8a8.*llm\.int8"),
    "recipe type": ({"recipe": 8}, r"recipe must be a Recipe, a preset \(default, .*got 8"),
    "recipe file": ({"recipe": "missing.json"}, r"cannot read recipe missing\.json"),
    "mode": ({"mode": "fastest"}, r"unknown mode 'fastest'; modes are default, .*max-autotune.*reduce-overhead"),
    "inductor": ({"inductor": {"epilog": 1}}, r"Inductor has no setting 'epilog'"),
    "inductor type": ({"inductor": True}, "inductor must be a dictionary"),
    "early launches": ({"inductor": {"triton.enable_pdl": True}}, r"triton\.enable_pdl cannot be set"),
    "field value": ({"outliers": "biggest"}, "outliers must be one of 'none', 'largest', 'threshold', 'static'"),
    "field type": ({"capacity": "many"}, "capacity must be int or NoneType, got 'many'"),
    "field range": ({"capacity": 0}, "capacity must be at least 1"),
    "flag": ({"free_weights": "yes"}, "free_weights must be True or False, got 'yes'"),
    "head": ({"quantize_head": 1}, "quantize_head must be True or False, got 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_wrong_options_are_named_and_the_valid_ones_listed(name: str) -> None:
    options, message = BAD_OPTIONS[name]
    model, x = gated()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(model, backend="int8", options=options)(x)


def test_unknown_mode_of_torch_compile() -> None:
    model, x = gated()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="unknown mode 'fastest'; modes are default"):
        torch.compile(model, backend="int8", mode="fastest")(x)
