"""Running a captured graph node by node, and reading what goes into it and comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from int8pass.capture import Program
from int8pass.graph.constants import Store


class Execute(fx.Interpreter):
    """Runs a program eagerly; constants are computed once."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.gm)
        self._program, self._store = program, Store()
        self._values: dict[str, Tensor] = {}
        self._arguments: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        self._arguments = arguments
        return self.run(*(arguments[i] for i in self._program.placeholders))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Constants come from the parameters of this call."""
        name = str(target)
        if name not in self._values:
            constant = self._program.constants[name]
            self._values[name] = self._store.value(constant, lambda p: self._arguments[p.position])  # type: ignore[index]
        return self._values[name]


def kept_rows(x: Tensor, batch: Any) -> Tensor:
    """The tokens `[T, K]` of a site's input `x[..., K]` that are no padding."""
    rows, keep = x.detach().reshape(-1, x.shape[-1]), kept(x, batch)
    return rows if keep is None else rows[keep]


def kept(x: Tensor, batch: Any) -> Tensor | None:
    """Which tokens `[T]` of `x[..., K]` the batch's attention masks do not call padding; None: all.

    A mask `[B, S]` (0: padding; by any name that ends in "attention_mask") applies to inputs of B x S tokens, in two
    axes or in one. Where several fit (encoder and decoder of one length), a token must be in all of them.
    """
    keep: Tensor | None = None
    for name, mask in batch.items() if isinstance(batch, Mapping) else ():
        fits = isinstance(mask, Tensor) and mask.dim() == 2 and str(name).endswith("attention_mask")
        if not fits or mask.numel() != x.shape[:-1].numel() or (x.dim() > 2 and x.shape[:-1] != mask.shape):
            continue
        here = (mask != 0).reshape(-1).to(x.device)
        keep = here if keep is None else keep & here
    return keep


def first_tensor(output: Any) -> Tensor | None:
    """The first float tensor of a model's output: logits, where there are some."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        found = first_tensor(value)
        if found is not None:
            return found
    return None


def divergence(found: Tensor, expected: Tensor) -> float:
    """Squared relative error of an output, in fp64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).square().sum() / expected.square().sum().clamp_min(1e-30))
