"""Calibration on a GPU finds what it finds on the CPU, and what it finds compiles and runs there."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import relative_error
from test_calibration import BATCHES, batch, model

import int8pass
from int8pass.backend import int8
from int8pass.recipe import CALIBRATED, Recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("preset", [*CALIBRATED, "gptq"])
def test_recipes_of_a_gpu_are_those_of_the_cpu(preset: str) -> None:
    start = Recipe.preset("smoothquant-o1" if preset == "gptq" else preset)
    if preset == "gptq":
        start = start.override(rounding="gptq")
    on_gpu = int8pass.calibrate(model().cuda(), [b.cuda() for b in BATCHES], start)
    on_cpu = int8pass.calibrate(model(), BATCHES, start)
    for name, site in on_cpu.sites.items():
        found = on_gpu.sites[name]
        assert found.tokens == site.tokens
        assert len(found.exponents) == len(site.exponents)
        assert found.error == pytest.approx(site.error, rel=0.25)
    assert on_gpu.tensors.keys() == on_cpu.tensors.keys()


@pytest.mark.parametrize("preset", [*CALIBRATED, "zeroquant"])
def test_calibrated_recipes_compile_and_run(preset: str) -> None:
    planted, x = model(), batch(9, tokens=64)
    expected = planted(x) - x
    recipe = Recipe.preset(preset) if preset == "zeroquant" else int8pass.calibrate(planted, BATCHES, preset)
    compiled = torch.compile(copy.deepcopy(planted).cuda(), backend=int8, fullgraph=True, options={"recipe": recipe})
    with torch.no_grad():
        found = compiled(x.cuda()).cpu() - x
    assert relative_error(found, expected) < (0.2 if preset == "zeroquant" else 0.03)
