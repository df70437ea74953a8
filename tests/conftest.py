"""Every test starts and ends with a fresh Dynamo; tests marked `gpu` are skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch._dynamo

if TYPE_CHECKING:
    from harness import Spy


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Graphs of one test must not count against the recompile limit of another, nor serve it.

    All transformers models run through one function of transformers, for which Dynamo keeps eight graphs.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compilation dominates; threads only fight over the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """`torch.compile(model, backend="int8")` without Inductor."""
    from harness import Spy  # imports Inductor, which not every test does

    found = Spy()
    monkeypatch.setattr("int8pass.backend.compile_with_inductor", found)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder with a tiny Llama and its tokenizer."""
    import tiny_llama  # needs transformers, which not every test does

    return tiny_llama.save(tmp_path_factory.mktemp("tiny"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` needs CUDA."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
