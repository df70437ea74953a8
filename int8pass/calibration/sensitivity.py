"""How far the model's output moves where a site's output does, by one backward pass a batch.

Let g be the gradient of log p(ŷ) with respect to a site's output, for predictions ŷ drawn from the model itself. A
small error δ of that output then raises the KL divergence from the model's own predictions by E (g·δ)² / 2 (the Fisher
information). Errors of rounding have no direction, so ‖g‖² ‖δ‖² / 2N tells what they cost, for every token: within a
third of what was measured for noise at SmolLM2's down projections, where the same relative error costs fifty times as
much in one layer as in another.

An output that is no prediction counts by its squared error, relative to each token's norm.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from int8pass.calibration.execute import Execute, first_tensor, kept
from int8pass.capture import Program
from int8pass.match import Site
from lowering import registry


class NoGradient(Exception):
    """A model whose output cannot be differentiated here; says why."""


class Differentiated(Execute):
    """Runs a normalized graph with gradients, which go to the outputs of its sites and no further."""

    def __init__(self, program: Program, sites: Sequence[Site]) -> None:
        super().__init__(program)
        self._sites = sites
        self._watched = {site.source for site in sites} | {r.node for site in sites for r in site.readers}
        self._outputs = {reader.node for site in sites for reader in site.readers}
        self._seen: dict[fx.Node, Tensor] = {}

    def __call__(self, *arguments: Any) -> Any:
        with torch.enable_grad():
            return super().__call__(*arguments)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An op of ours by its reference, which PyTorch can differentiate."""
        op = registry.find(target)
        return super().call_function(target, args, kwargs) if op is None else op.reference(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; what a site reads and makes is kept."""
        result = super().run_node(n)
        if n in self._outputs and not result.requires_grad:  # the first: all that follows has a gradient by it
            result = result.detach().requires_grad_(True).clone()
        if n in self._watched:
            self._seen[n] = result
        return result

    def sensitivities(self, scalar: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, input `[..., K]` and the squared norms `[..., readers]` of the gradients of every site that ran.

        Raises:
            NoGradient: `scalar` does not depend on them.
        """
        readers = [reader.node for site in self._sites for reader in site.readers if reader.node in self._seen]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*autograd kernel was not registered")
                found = torch.autograd.grad(scalar, [self._seen[node] for node in readers], allow_unused=True)
        except (RuntimeError, UserWarning) as error:
            raise NoGradient(str(error)) from error
        gradients = dict(zip(readers, found, strict=True))
        for site in self._sites:
            if site.source in self._seen:
                x = self._seen[site.source].detach()
                each = [gradients.get(reader.node) for reader in site.readers]
                zero = x.new_zeros(x.shape[:-1], dtype=torch.float32)
                yield site.name, x, torch.stack([zero if g is None else g.float().square().sum(-1) for g in each], -1)


def surrogate(output: Any, batch: Any, seed: int) -> Tensor:
    """A number whose squared gradients are, in expectation, twice what a small error costs.

    Raises:
        NoGradient: no float tensor came out.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else None
    result = first_tensor(output) if logits is None else logits
    if result is None or result.dim() < 2:
        raise NoGradient("the model's output is no float tensor of tokens")
    keep = kept(result, batch)
    chance = torch.Generator(result.device).manual_seed(seed)
    with torch.enable_grad():  # whatever the caller has
        rows = result.reshape(-1, result.shape[-1])
        rows = (rows if keep is None else rows[keep]).float()
        if logits is not None:
            logarithms = rows.log_softmax(-1)
            drawn = torch.multinomial(logarithms.detach().exp(), 1, generator=chance)
            return logarithms.gather(1, drawn).sum()
        norm = rows.detach().norm(dim=1, keepdim=True).clamp_min(1e-30)
        direction = torch.randn(rows.shape, generator=chance, device=rows.device)
        return (rows * direction / norm).sum()
