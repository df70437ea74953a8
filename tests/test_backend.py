"""The public call, `torch.compile(model, backend="int8")`, with Inductor: graph facts, then numbers, then refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_llama
import torch
import torch._dynamo
import torch._inductor.config
from gated_model import WIDTH, Gated, gated, made, tokens
from harness import Spy, call, compile_and_call, dynamo_counters, relative_error, run_pass
from test_sites import Block
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import int8pass

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def configurations() -> tuple[dict[str, Any], dict[str, Any]]:
    return torch._inductor.config.get_config_copy(), torch._dynamo.config.get_config_copy()


# -- the entry point, and what compiling must leave alone


SCRIPT = """
import sys
import torch
model = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 32)).requires_grad_(False)
x = torch.randn(4, 32)
assert "int8pass" not in sys.modules
compiled = torch.compile(model, backend="int8", fullgraph=True)
error = (compiled(x) - model(x)).norm() / model(x).norm()
assert 0 < error < 0.02, error
"""


def test_a_program_that_imports_only_torch(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_output_is_close_and_nothing_of_the_users_is_changed() -> None:
    model, x = made(lambda: Block(WIDTH)), tokens(2, 9)
    expected, parameters, configuration = call(model, x), parameters_of(model), configurations()
    found = compile_and_call(model, x, "int8")
    assert 0 < relative_error(found, expected) < 0.02
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert configurations() == configuration
    assert torch.equal(call(model, x), expected)


# -- shapes


@pytest.mark.slow
def test_slices_of_one_tensor_at_several_lengths() -> None:
    """The strides of a view are symbols too, and belong to the input they come from."""
    model, _ = gated()
    width = next(model.parameters()).shape[-1]
    whole = torch.randn(4, 40, width)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    with torch.no_grad():
        for length in (9, 17, 30):
            assert relative_error(compiled(whole[:, :length]), model(whole[:, :length])) < 0.05


# -- modules that share code


def test_regional_compilation_serves_every_layer() -> None:
    layers = nn.ModuleList(made(Gated, seed) for seed in range(3))
    x = tokens(2, 9)
    expected = x
    with torch.no_grad():
        for layer in layers:
            expected = layer(expected)
        for layer in layers:
            layer.compile(backend="int8")
        found = x
        for layer in layers:
            found = layer(found)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert relative_error(found, expected) < 0.02
    assert int8pass.packed_bytes(layers) == 3 * int8pass.packed_bytes(layers[0])


def test_layers_that_run_one_anothers_graphs() -> None:
    """Graph breaks inside a layer's loop over experts: Dynamo compiles the pieces once, for both layers."""
    model, inputs = architectures.build("mixtral_loop")
    with torch.no_grad():
        expected = architectures.main_output(model(**inputs))
    found = run_pass(model, inputs, "w8a16", fullgraph=False)
    assert relative_error(architectures.main_output(found.output), expected) < 0.1  # the other layer's weights: above 1


# -- transformers


@pytest.mark.slow
def test_generate_with_a_static_cache() -> None:
    model = tiny_llama.model()
    prompt = torch.randint(3, 256, (1, 7), generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = dict(
        max_new_tokens=6, do_sample=False, cache_implementation="static", pad_token_id=0,
        attention_mask=torch.ones_like(prompt),
    )  # fmt: skip
    expected = model.generate(prompt, **options)
    model.forward = torch.compile(model.forward, backend="int8", options={"recipe": "w8a16"})
    with dynamo_counters() as counters:
        found = model.generate(prompt, **options)
        graphs = counters["stats"]["unique_graphs"]
        again = model.generate(prompt, **options)
        assert counters["stats"]["unique_graphs"] == graphs <= 2, "prefill and decode"
        assert not counters["graph_break"]
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)


# -- LLM.int8()'s capacity


def test_outlier_overflow_is_counted() -> None:
    x = tokens(4)
    x[:, :5] *= 50
    counts, errors = {}, {}
    for capacity in (1, 8):
        model = made(lambda: nn.Sequential(nn.Linear(WIDTH, 16)))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="int8", options={"recipe": "llm.int8", "capacity": capacity})
        with torch.no_grad():
            errors[capacity] = relative_error(compiled(x), model(x))
            assert int8pass.outlier_overflow(model) == (4 if capacity == 1 else 0)
            compiled(x)
        counts[capacity] = int8pass.outlier_overflow(model)
    assert counts == {1: 8, 8: 0}
    assert errors[8] < errors[1] < 0.05


# -- gradients


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "requires_grad_"])
def test_inference_contexts(context: str, spy: Spy) -> None:
    model, x = gated()
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    if context == "requires_grad_":
        model.requires_grad_(False)
        found = compiled(x)
    else:
        with getattr(torch, context)():
            found = compiled(x)
    assert spy.graphs == 1
    assert relative_error(found, call(model, x)) < 0.02


def test_gradients_are_refused() -> None:
    model, x = gated()
    compiled = torch.compile(model, backend="int8")
    with pytest.raises(BackendCompilerFailed, match=r"torch\.no_grad\(\).*requires_grad_\(False\)"):
        compiled(x)
    with torch.no_grad():  # the failure left nothing behind
        assert relative_error(compiled(x), model(x)) < 0.02
