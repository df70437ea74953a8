"""Every linear of sixteen architectures accounted for: taken, or refused with a reason and the line of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")
from architectures import build

import int8pass
from int8pass.inspect.accounting import linears_of

SIXTEEN = (
    "llama", "mistral", "qwen3", "gemma3", "phi3", "gpt2", "opt", "bloom", "falcon", "bert", "t5", "bart", "vit",
    "swin", "mixtral", "deepseek_v3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SIXTEEN)
def test_every_linear_is_accounted_for(name: str) -> None:
    torch._dynamo.reset()  # transformers' models share one function, whose graphs would be made dynamic
    model, inputs = build(name)
    report = int8pass.inspect(model, inputs)
    taken = Counter(linear for site in report.sites for linear in site.linears)
    refused = {r.linear for r in report.refused}
    modules = {linear for linear, _ in linears_of(model)}
    assert modules, "there is something to account for"
    assert not modules - taken.keys() - refused
    assert taken.keys() <= set(dict(model.named_modules())), "paths are the model's own"
    assert max(taken.values()) == 1, "and every one is in one site"
    assert not taken.keys() & refused
    for refusal in report.refused:
        assert refusal.reason
        assert ".py:" in refusal.source or "no graph reads its weight" in refusal.reason
