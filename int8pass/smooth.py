"""Smooth: move the difficulty of extreme channels from activations to weights, without changing the function.

Here the data-free form: a norm's gamma and the weights that read it tell which channels are scaled up by the one and
down by the others (the emergent outliers of large models look like this from the weights' side). Such a channel costs
the activation its resolution, or the weight column its own. SmoothQuant (arXiv 2211.10438, equation 4) balances the
two with s_j = max|X_j|^α / max|W_j|^(1-α); with gamma in the place of max|X| and α = 1/2 no data is needed.

Requires: sites. Ensures: a norm whose every reader belongs to its site has γ' = γ / s (and β' = β / s) and the site
carries s for its weights; the user's tensors are not touched, and γ' · (W·s) = γ · W: exactly where s are powers of
two, within fp32 rounding where they are calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from int8pass.capture import Program
from int8pass.errors import RecipeError
from int8pass.graph.constants import Constant
from int8pass.graph.pattern import op_name
from int8pass.graph.rewrite import Edit
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


def divide(vector: Tensor, s: Tensor) -> Tensor:
    """`vector / s` in the dtype of `vector`; exact for a gamma when s are powers of two or `representable`."""
    return (vector.float() / s).to(vector.dtype)


def shifted_gamma(gamma: Tensor, s: Tensor, offset: float) -> Tensor:
    """`(gamma + offset) / s` in fp32: the (1 + w) of a norm, folded, has no (1 + w) form that is exact."""
    return (gamma.float() + offset) / s


def from_exponents(exponents: tuple[float, ...], device: str) -> Tensor:
    """The smoothing vector of calibrated exponents, fp32."""
    return torch.exp2(torch.tensor(exponents, dtype=torch.float32, device=device))


def representable(gamma: Tensor, s: Tensor) -> Tensor:
    """The s for which γ / s is exact in the dtype of γ: nearest to `s`, so that rounding γ / s costs nothing."""
    folded = divide(gamma, s).float()
    return torch.where(folded != 0, gamma.float() / folded, s)


def representable_inverse(s: Tensor, dtype: torch.dtype) -> Tensor:
    """The s nearest to `s` for which 1 / s is exact in `dtype`."""
    return inverse(s, dtype).float().reciprocal()


def inverse(s: Tensor, dtype: torch.dtype) -> Tensor:
    """`1 / s` in `dtype`."""
    return s.reciprocal().to(dtype)


@dataclass(frozen=True)
class Smoothing:
    """Smoothing vectors of the sites that have one, and why those that asked for a fold have none."""

    vectors: dict[str, Constant]
    reasons: dict[str, str]


def smooth(program: Program, sites: tuple[Site, ...], recipe: Recipe) -> Smoothing:
    """Give every site the smoothing vector its scheme asks for: folded into its norm where legal.

    Calibrated vectors that cannot be folded become a multiply of the site's input. By the recipe's scheme and not by
    what this graph makes of it: all graphs of a model share their weights.
    """
    vectors: dict[str, Constant] = {}
    reasons: dict[str, str] = {}
    shared = _shared_weights(sites)
    for site in sites:
        settings = recipe.at(site.name)
        assert settings.scheme is not None
        reason = _illegal(program, site, shared)
        if settings.scheme.smoothing == "calibrated" and settings.exponents:
            vectors[site.name] = s = _calibrated(program, site, settings.exponents, reason is None)
            if reason is None:
                _fold(program, site, s)
            else:
                reasons[site.name] = reason
                _multiply(program, site, s)
        elif settings.scheme.smoothing == "outliers" and _is_norm(site.source):
            if reason is None:
                vectors[site.name] = s = _from_weights(program, site, settings.scheme.smoothing_threshold)
                _fold(program, site, s)
            else:
                reasons[site.name] = reason
    return Smoothing(vectors, reasons)


def _is_norm(node: fx.Node) -> bool:
    return op_name(node) in {"rms_norm", "layer_norm"}


def _shared_weights(sites: tuple[Site, ...]) -> set[Constant]:
    """Weights that more than one linear reads: packed once, they cannot carry two smoothing vectors."""
    weights = [reader.weight for site in sites for reader in site.readers]
    return {w for w in weights if weights.count(w) > 1}


def _illegal(program: Program, site: Site, shared: set[Constant]) -> str | None:
    """Why the norm of a site cannot take a smoothing vector."""
    norm = site.source
    if not _is_norm(norm):
        return "no norm makes its input"
    gamma = _gamma(norm)
    if gamma is None or program.constants.get(gamma) is None:
        return "its norm has no constant gamma"
    if op_name(norm) == "rms_norm" and norm.args[3] and norm.args[4]:
        return "its norm rounds before it multiplies by (1 + gamma)"
    beta = norm.args[3] if op_name(norm) == "layer_norm" and len(norm.args) > 3 else None
    if beta is not None and program.constants.get(beta) is None:
        return "its norm has no constant beta"
    taken = {reader.node for reader in site.readers}
    if any(user not in taken for user in norm.users):
        return "its norm is read by more than the site's linears"
    if any(reader.node.args[0] is not norm or reader.node.args[1] is norm for reader in site.readers):
        return "its norm is read as a weight"
    if any(reader.weight in shared for reader in site.readers):
        return "a weight is shared with another linear"
    return None


def _gamma(norm: fx.Node) -> fx.Node | None:
    index = 1 if op_name(norm) == "rms_norm" else 2
    return norm.args[index] if len(norm.args) > index else None  # type: ignore[return-value]


def _from_weights(program: Program, site: Site, threshold: float) -> Constant:
    """The data-free smoothing vector of a site, from its norm's gamma and its weights."""
    norm = site.source
    gamma = program.constants.get(_gamma(norm))
    assert gamma is not None
    offset = float(norm.args[3]) if op_name(norm) == "rms_norm" else 0.0  # type: ignore[arg-type]
    sources = [gamma, *(reader.weight for reader in site.readers)]
    (s,) = program.constants.derive(f"{site.name}.smoothing", _vector, sources, (offset, threshold))
    return s


def _calibrated(program: Program, site: Site, exponents: tuple[float, ...], folds: bool) -> Constant:
    """The smoothing vector that the recipe holds for a site, moved to values that its use represents exactly."""
    if len(exponents) != site.width:
        raise RecipeError(
            f"site {site.name} has {site.width} channels, the recipe {len(exponents)}: it was made for another model"
        )
    value = site.source.meta["val"]
    label = f"{site.name}.smoothing"
    (s,) = program.constants.derive(label, from_exponents, (), (exponents, str(value.device)))
    if not folds:
        (s,) = program.constants.derive(label, representable_inverse, (s,), (value.dtype,))
        return s
    gamma = program.constants.get(_gamma(site.source))
    assert gamma is not None
    (s,) = program.constants.derive(label, representable, (gamma, s))
    return s


def _fold(program: Program, site: Site, s: Constant) -> None:
    """Replace γ (and β) of the site's norm by γ / s (β / s)."""
    norm, edit = site.source, Edit(program)
    gamma = program.constants.get(_gamma(norm))
    assert gamma is not None
    is_rms = op_name(norm) == "rms_norm"
    offset = float(norm.args[3]) if is_rms else 0.0  # type: ignore[arg-type]
    if offset:
        (folded,) = edit.derive(f"{gamma.label}.smoothed", shifted_gamma, [gamma, s], offset, before=norm)
        norm.args = (norm.args[0], folded, norm.args[2], 0.0, False)
        return
    (folded,) = edit.derive(f"{gamma.label}.smoothed", divide, [gamma, s], before=norm)
    arguments = list(norm.args)
    arguments[1 if is_rms else 2] = folded
    if not is_rms and len(arguments) > 3 and arguments[3] is not None:
        beta = program.constants.get(arguments[3])
        assert beta is not None
        (arguments[3],) = edit.derive(f"{beta.label}.smoothed", divide, [beta, s], before=norm)
    norm.args = tuple(arguments)


def _multiply(program: Program, site: Site, s: Constant) -> None:
    """Let the site's linears read `x · (1 / s)`; it fuses into what quantizes x."""
    edit = Edit(program)
    first = min(reader.node for reader in site.readers)
    x = first.args[0]
    assert isinstance(x, fx.Node)
    (factor,) = edit.derive(f"{site.name}.unsmoothing", inverse, [s], x.meta["val"].dtype, before=first)
    product = edit.call(torch.ops.aten.mul.Tensor, x, factor, before=first)
    for reader in site.readers:
        reader.node.replace_input_with(x, product)
