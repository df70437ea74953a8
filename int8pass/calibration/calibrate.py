"""`calibrate`: run batches, watch the sites, write what was found into a recipe."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from int8pass.calibration.statistics import ChannelStatistics
from int8pass.capture import Program, from_dynamo
from int8pass.errors import CalibrationError
from int8pass.graph.constants import Constant, Store
from int8pass.inspect.collect import run
from int8pass.match import Site, match
from int8pass.normalize import normalize
from int8pass.recipe import Options, Recipe, SiteSettings

DEFAULT_COLUMNS = 64

Progress = Callable[[int], None]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe | str = "outlier-columns",
    *,
    columns: int | None = None,
    progress: Progress | None = None,
) -> Recipe:
    """Choose the static outlier columns and the smoothing of every site from data.

    Args:
        model: the model in its own precision; it runs eagerly on every batch and is not changed.
        batches: inputs of the model, each a tensor, a tuple of positional or a dictionary of keyword arguments. A few
            thousand tokens that look like the use of the model are enough.
        recipe: what to start from: a preset name, a `Recipe` or the path of one.
        columns: outlier columns per site (default: the recipe's capacity, or 64).
        progress: called with the number of batches done, after each.

    Returns:
        The recipe with `outliers="static"`, and the columns and smoothing exponents of every site.

    Raises:
        CalibrationError: no batch, a batch the model refuses, a site with NaN or Inf activations, a site without data.
        OptionError, RecipeError, CaptureError: as the backend would.
    """
    start = Options.parse({"recipe": recipe}, None).recipe
    count = columns or start.scheme.capacity or DEFAULT_COLUMNS
    statistics = observe(model, batches, start, progress)
    if not statistics:
        raise CalibrationError("no site was found: nothing in this model can be quantized (see int8pass.inspect)")
    sites = {
        name: dataclasses.replace(
            start.sites.get(name, SiteSettings()), columns=found.largest(count), exponents=found.exponents()
        )
        for name, found in statistics.items()
    }
    scheme = dataclasses.replace(start.scheme, outliers="static")
    return dataclasses.replace(start, scheme=scheme, sites=MappingProxyType(sites), versions=_versions())


def observe(
    model: nn.Module, batches: Iterable[Any], recipe: Recipe, progress: Progress | None = None
) -> dict[str, ChannelStatistics]:
    """Statistics of every site over all batches, by site name."""
    statistics: dict[str, ChannelStatistics] = {}

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, inputs)
        normalize(program)
        sites = match(program, recipe).sites
        for site in sites:
            statistics.setdefault(site.name, ChannelStatistics())
        return _Watch(program, sites, statistics)

    done = 0
    for batch in batches:
        try:
            run(model, batch, backend)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CalibrationError(f"batch {done} does not run through the model: {error}") from error
        for name, found in statistics.items():
            if not found.finite:
                raise CalibrationError(f"batch {done}: the input of {name} holds NaN or Inf")
        done += 1
        if progress is not None:
            progress(done)
    if done == 0:
        raise CalibrationError("no calibration batch was given")
    empty = [name for name, found in statistics.items() if found.tokens == 0]
    if empty:
        raise CalibrationError(f"no token reached {', '.join(empty)}: calibration batches are empty there")
    return statistics


class _Watch(fx.Interpreter):
    """Runs a captured program node by node, and shows the sources of its sites to the statistics."""

    def __init__(self, program: Program, sites: Sequence[Site], statistics: dict[str, ChannelStatistics]) -> None:
        super().__init__(program.gm)
        self._program, self._sites, self._statistics = program, sites, statistics
        self._sources = {site.source: site.name for site in sites}
        self._arguments: tuple[Any, ...] = ()
        self._weights_seen = False

    def __call__(self, *arguments: Any) -> Any:
        self._arguments = arguments
        if not self._weights_seen:
            for site in self._sites:
                for reader in site.readers:
                    self._statistics[site.name].reads(self._value(reader.weight))
            self._weights_seen = True
        return self.run(*(arguments[i] for i in self._program.placeholders))

    def _value(self, constant: Constant) -> Tensor:
        return Store().value(constant, lambda p: self._arguments[p.position])  # type: ignore[index]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Constants come from the parameters of this call."""
        return self._value(self._program.constants[str(target)])

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; if a site reads its value, count it in."""
        result = super().run_node(n)
        if n in self._sources and isinstance(result, Tensor):
            self._statistics[self._sources[n]].update(result)
        return result


def _versions() -> MappingProxyType[str, str]:
    from int8pass import __version__

    return MappingProxyType({"int8pass": __version__, "torch": torch.__version__, "python": platform.python_version()})
