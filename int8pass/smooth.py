"""Smooth: move the difficulty of extreme channels from activations to weights, without changing the function.

Here the data-free form: a norm's gamma and the weights that read it tell which channels are scaled up by the one and
down by the others (the emergent outliers of large models look like this from the weights' side). Such a channel costs
the activation its resolution, or the weight column its own. SmoothQuant (arXiv 2211.10438, equation 4) balances the
two with s_j = max|X_j|^α / max|W_j|^(1-α); with gamma in the place of max|X| and α = 1/2 no data is needed.

Requires: sites. Ensures: a norm whose every reader belongs to its site has γ' = γ / s (and β' = β / s) and the site
carries s for its weights; the user's tensors are not touched, and γ' · (W·s) = γ · W exactly, s being powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from int8pass.capture import Program
from int8pass.graph.constants import Constant
from int8pass.graph.pattern import op_name
from int8pass.graph.rewrite import Edit
from int8pass.match import Site


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
    """`vector / s` in the dtype of `vector`; exact, as s are powers of two."""
    return (vector.float() / s).to(vector.dtype)


def shifted_gamma(gamma: Tensor, s: Tensor, offset: float) -> Tensor:
    """`(gamma + offset) / s` in fp32: the (1 + w) of a norm, folded, has no (1 + w) form that is exact."""
    return (gamma.float() + offset) / s


@dataclass(frozen=True)
class Smoothing:
    """Smoothing vectors of the sites that have one, and why the others have none."""

    vectors: dict[str, Constant]
    reasons: dict[str, str]


def smooth(program: Program, sites: tuple[Site, ...], thresholds: dict[str, float]) -> Smoothing:
    """Fold a smoothing vector into the norm of every site named in `thresholds` that has one, where that is legal."""
    vectors: dict[str, Constant] = {}
    reasons: dict[str, str] = {}
    readers_of: dict[Constant, int] = {}
    for site in sites:
        for reader in site.readers:
            readers_of[reader.weight] = readers_of.get(reader.weight, 0) + 1
    for site in sites:
        if site.name not in thresholds or op_name(site.source) not in {"rms_norm", "layer_norm"}:
            continue
        reason = _illegal(program, site, readers_of)
        if reason:
            reasons[site.name] = reason
        else:
            vectors[site.name] = _fold(program, site, thresholds[site.name])
    return Smoothing(vectors, reasons)


def _illegal(program: Program, site: Site, readers_of: dict[Constant, int]) -> str | None:
    """Why the norm of a site cannot take a smoothing vector."""
    norm = site.source
    gamma = _gamma(norm)
    if gamma is None or program.constants.get(gamma) is None:
        return "its norm has no constant gamma"
    if op_name(norm) == "rms_norm" and norm.args[3] and norm.args[4]:
        return "its norm rounds before it multiplies by (1 + gamma)"
    if op_name(norm) == "layer_norm" and len(norm.args) > 3 and norm.args[3] is not None:
        if program.constants.get(norm.args[3]) is None:
            return "its norm has no constant beta"
    taken = {reader.node for reader in site.readers}
    if any(user not in taken for user in norm.users):
        return "its norm is read by more than the site's linears"
    if any(reader.node.args[0] is not norm or reader.node.args[1] is norm for reader in site.readers):
        return "its norm is read as a weight"
    if any(readers_of[reader.weight] > 1 for reader in site.readers):
        return "a weight is shared with another linear"
    return None


def _gamma(norm: fx.Node) -> fx.Node | None:
    index = 1 if op_name(norm) == "rms_norm" else 2
    return norm.args[index] if len(norm.args) > index else None  # type: ignore[return-value]


def _fold(program: Program, site: Site, threshold: float) -> Constant:
    """Replace γ (and β) of the site's norm by γ / s (β / s); returns s."""
    norm, edit = site.source, Edit(program)
    gamma = program.constants.get(_gamma(norm))
    assert gamma is not None
    is_rms = op_name(norm) == "rms_norm"
    offset = float(norm.args[3]) if is_rms else 0.0  # type: ignore[arg-type]
    weights = [reader.weight for reader in site.readers]
    (s,) = program.constants.derive(f"{site.name}.smoothing", _vector, [gamma, *weights], (offset, threshold))
    if is_rms and offset:
        (folded,) = edit.derive(f"{gamma.label}.smoothed", shifted_gamma, [gamma, s], offset, before=norm)
        norm.args = (norm.args[0], folded, norm.args[2], 0.0, False)
        return s
    (folded,) = edit.derive(f"{gamma.label}.smoothed", divide, [gamma, s], before=norm)
    arguments = list(norm.args)
    arguments[1 if is_rms else 2] = folded
    if not is_rms and len(arguments) > 3 and arguments[3] is not None:
        beta = program.constants.get(arguments[3])
        assert beta is not None
        (arguments[3],) = edit.derive(f"{beta.label}.smoothed", divide, [beta, s], before=norm)
    norm.args = tuple(arguments)
    return s
