"""Folds: which are legal, why others are not, and that every one keeps the function of real architectures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build, main_output
from harness import call, compile_and_call, executable, relative_error
from torch import fx, nn

from int8pass.capture import from_dynamo
from int8pass.graph.constants import Store
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


KINDS = {}


@pytest.mark.parametrize("name", [each.name for each in ARCHITECTURES])
def test_every_fold_keeps_the_function(name: str) -> None:
    breaks = next(each.own_breaks for each in ARCHITECTURES if each.name == name)
    model, inputs = build(name)
    with torch.no_grad():
        expected = main_output(call(model, inputs))
    output, kinds, reasons = smoothed(model, inputs, fullgraph=breaks == 1)
    error = relative_error(main_output(output), expected)
    print(f"\nROW {name} {dict(kinds)} {error:.1e} {sorted(Counter(reasons.values()).items())}")
    assert error <= 1e-5
