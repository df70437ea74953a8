"""Calibration in two processes with different batches finds what one process finds in all of them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_calibration import BATCHES, batch, model

import int8pass
from int8pass.recipe import Recipe

RECIPE = Recipe.preset("smoothquant-o3").override(alpha=0.5, clipping="minmax", outliers="static")
MINE = ([*BATCHES[:2]], [BATCHES[2], batch(7, tokens=5)])


def process(rank: int, folder: str) -> None:
    """One of the two."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        int8pass.calibrate(model(), MINE[rank], RECIPE, columns=5).save(Path(folder) / f"{rank}.json")
        searched = int8pass.calibrate(model(), MINE[rank], "smoothquant-o1")
        searched.save(Path(folder) / f"searched{rank}.json")
    finally:
        dist.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    first, second = (Recipe.load(tmp_path / f"{rank}.json") for rank in range(2))
    assert first == second
    alone = int8pass.calibrate(model(), [*MINE[0], *MINE[1]], RECIPE, columns=5)
    assert list(first.sites) == list(alone.sites) == ["up", "down"]
    for name, site in alone.sites.items():
        found = first.sites[name]
        assert found.limits == site.limits, "extremes merge bit for bit"
        assert (found.exponents, found.tokens) == (site.exponents, site.tokens)
        assert len(found.columns) == 5
    assert Recipe.load(tmp_path / "searched0.json") == Recipe.load(tmp_path / "searched1.json")
