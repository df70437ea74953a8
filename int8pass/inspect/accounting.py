"""Every linear of a model accounted for: in a site, refused with a reason, or read by no graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from int8pass.graph.pattern import CASTS
from int8pass.inspect.facts import RefusedLinear
from int8pass.inspect.observe import GraphObserver
from int8pass.inspect.replay import Arguments
from int8pass.inspect.stages import kind_of
from int8pass.match import VIEWS


class Accounts:
    """Whose weights the graphs read, and which of them a site or a refusal speaks of."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._explained: set[int] = set()
        self._read: set[int] = set()

    def see(self, observer: GraphObserver, arguments: Arguments) -> None:
        """One call of a graph."""
        self._read |= {id(v) for v in arguments if isinstance(v, Tensor)}
        for site in observer.sites:
            for reader in site.readers:
                positions = [p.position for p in reader.weight.parameters()]
                self._explained |= {id(arguments[i]) for i in positions if i is not None}
        for refusal in observer.matches.refusals:
            for node in _weights_behind(refusal.node):
                constant = observer.captured.constants.get(node)
                positions = [p.position for p in constant.parameters()] if constant else []
                self._explained |= {id(arguments[i]) for i in positions if i is not None}

    def missing(self) -> list[RefusedLinear]:
        """Linears of the model that no graph speaks of."""
        found = []
        for name, module in linears_of(self._model):
            if id(module.weight) in self._explained:
                continue
            reason = "no graph reads its weight: on these inputs it did not run"
            if id(module.weight) in self._read:
                reason = "a graph reads its weight, but in no linear"
            found.append(RefusedLinear(name, reason, ""))
        return found


def linears_of(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Modules with a 2-D weight that multiplies (tables of embeddings are looked up): name and module."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            yield name, module


def _weights_behind(node: fx.Node) -> list[fx.Node]:
    """The constants among a refused call's operands, through views, casts and whatever computes a weight."""
    found, seen = [], set[fx.Node]()
    todo = list(node.all_input_nodes)
    for i, start in enumerate(list(todo)):
        # Only the weight of a linear may be computed in any way; other operands are seen through views and casts.
        anything = kind_of(node) == "linear" and i == 1
        stack = [start]
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current.op == "get_attr":
                found.append(current)
            elif anything or kind_of(current) in VIEWS | CASTS | {"index"}:
                stack += current.all_input_nodes
    return found


__all__ = ["Accounts", "linears_of"]
