"""The public call, `torch.compile(model, backend="int8")`, with Inductor: graph facts, then numbers, then refusals."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_llama
import torch
import torch._dynamo
import torch._inductor.config
from harness import call, compile_and_call, count_ops, dynamo_counters, relative_error, run_pass
from test_sites import Block
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import int8pass
from int8pass.capture import Program
from int8pass.errors import WeightError
from int8pass.recipe import CALIBRATED, Recipe

WIDTH = 32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compilation dominates; threads only fight over the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Gated(nn.Module):
    """The smallest model with a norm, a merge, a product and a residual: two sites, three linears."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, 64), nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class WithHead(nn.Module):
    """An embedding, a body, and an output head as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(50, WIDTH), Gated(), nn.Linear(WIDTH, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)))


def made(model: type[nn.Module] | Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))


def gated() -> tuple[nn.Module, Tensor]:
    return made(Gated), tokens(2, 9)


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


# -- options


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


class Spy:
    """In the place of Inductor: notes the graph and the settings, and runs the graph node by node."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.ops: dict[str, int] = {}
        self.graphs = 0

    def __call__(self, program: Program, inputs: Sequence[Any], config: dict[str, Any]) -> Callable[..., Any]:
        self.config, self.ops = config, count_ops(program)
        self.graphs += 1
        program.gm.recompile()
        return program.gm.forward


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    found = Spy()
    monkeypatch.setattr("int8pass.backend.compile_with_inductor", found)
    return found


INT8_WEIGHTS = 3 * 64 * WIDTH  # of Gated

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


# -- shapes, recompiles, and the weights all graphs share


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
