"""Smooth: move the difficulty of extreme channels from activations to weights, without changing the function.

SmoothQuant (arXiv 2211.10438, equation 4) divides channel j of a site's input by s_j = max|X_j|^α / max|W_j|^(1-α) and
multiplies column j of every weight that reads it by s_j. Calibration finds s (`int8pass.calibration`); without data, a
norm's gamma and the weights that read it tell which channels are scaled up by the one and down by the others (the
emergent outliers of large models look like this from the weights' side): gamma takes the place of max|X|, α = 1/2.

Requires: sites. Ensures: the same function. A site with a vector has its input divided where `int8pass.folds` allows,
at no cost, else by a multiply, and its weights' columns multiplied; the user's tensors are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from int8pass.capture import Program
from int8pass.errors import RecipeError
from int8pass.folds import Fold, Folds
from int8pass.graph.channels import gamma_of
from int8pass.graph.constants import Constant, tensor_on
from int8pass.graph.pattern import op_name
from int8pass.match import Site
from int8pass.recipe import Recipe


def smoothing_vector(gamma: Tensor, *weights: Tensor, offset: float = 0.0, threshold: float = 8.0) -> Tensor:
    """s [K], fp32 powers of two, from gamma [K] and the weights [N_i, K] that read the norm.

    r_j = |γ_j + offset| / max_n |W[n, j]|, relative to its median; s_j = √r_j where r_j > threshold, else exactly 1:
    ordinary channels are left alone. Powers of two make the fold exact in every float format.
    """
    column_max = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)
    ratio = (gamma.float() + offset).abs() / column_max.clamp_min(torch.finfo(torch.float32).tiny)
    relative = ratio / ratio.median().clamp_min(torch.finfo(torch.float32).tiny)
    # A column of zeros has an infinite ratio and nothing to smooth.
    relative = torch.where(column_max > 0, relative, torch.ones_like(relative))
    exponent = torch.where(relative > threshold, relative.log2() / 2, torch.zeros_like(relative)).round()
    return torch.exp2(exponent.clamp(-16, 16))


def _vector(gamma: Tensor, *rest: object) -> Tensor:
    """`smoothing_vector` with its numbers as trailing positional options of a derived constant."""
    *weights, offset, threshold = rest
    return smoothing_vector(gamma, *weights, offset=offset, threshold=threshold)  # type: ignore[arg-type]


def from_exponents(exponents: tuple[float, ...], device: str) -> Tensor:
    """The smoothing vector of calibrated exponents, fp32."""
    return torch.exp2(tensor_on(exponents, torch.float32, device))


@dataclass(frozen=True)
class Smoothing:
    """Smoothing vectors of the sites that have one, why those that asked for a fold have none, and all folds."""

    vectors: dict[str, Constant]
    reasons: dict[str, str]
    folds: dict[str, Fold] = field(default_factory=dict)


def smooth(program: Program, sites: tuple[Site, ...], recipe: Recipe) -> Smoothing:
    """Give every site the smoothing vector its scheme asks for.

    By the recipe's scheme and not by what this graph makes of it: all graphs of a model share their weights.
    """
    wanted = [site for site in sites if _wants(site, recipe)]
    if not wanted:
        return Smoothing({}, {})
    folds = Folds(program, sites, wanted)
    vectors: dict[str, Constant] = {}
    reasons: dict[str, str] = {}
    for site in wanted:
        settings, fold = recipe.at(site.name), folds.of(site)
        assert settings.scheme is not None
        if fold.reason:
            reasons[site.name] = fold.reason
        if settings.scheme.smoothing == "calibrated":
            s = folds.vector(site, _calibrated(program, site, settings.exponents))
        elif fold.kind == "norm" and fold.channels is not None and fold.channels.producer is site.source:
            s = _from_weights(program, site, settings.scheme.smoothing_threshold)
        else:
            continue
        vectors[site.name] = s
        folds.apply(site, s)
    program.gm.recompile()
    return Smoothing(vectors, reasons, {site.name: folds.of(site) for site in wanted})


def _wants(site: Site, recipe: Recipe) -> bool:
    settings = recipe.at(site.name)
    assert settings.scheme is not None
    if settings.scheme.smoothing == "outliers":
        return op_name(site.source) in {"rms_norm", "layer_norm"}
    return settings.scheme.smoothing == "calibrated" and bool(settings.exponents)


def _from_weights(program: Program, site: Site, threshold: float) -> Constant:
    """The data-free smoothing vector of a site, from its norm's gamma and its weights."""
    norm = site.source
    gamma = program.constants.get(gamma_of(norm))
    assert gamma is not None
    offset = float(norm.args[3]) if op_name(norm) == "rms_norm" else 0.0  # type: ignore[arg-type]
    sources = [gamma, *(reader.weight for reader in site.readers)]
    (s,) = program.constants.derive(f"{site.name}.smoothing", _vector, sources, (offset, threshold))
    return s


def _calibrated(program: Program, site: Site, exponents: tuple[float, ...]) -> Constant:
    """The smoothing vector that the recipe holds for a site."""
    if len(exponents) != site.width:
        raise RecipeError(
            f"site {site.name} has {site.width} channels, the recipe {len(exponents)}: it was made for another model"
        )
    device = str(site.source.meta["val"].device)
    (s,) = program.constants.derive(f"{site.name}.smoothing", from_exponents, (), (exponents, device))
    return s
