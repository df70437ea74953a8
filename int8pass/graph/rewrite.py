"""Editing graphs: insert calls with their fake values, and drive rules to a fixed point.

A rule is `rule(node, edit) -> Node | NoMatch | None`: a replacement for `node`, a refusal with reason, or None when the
node is no business of the rule.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils import _pytree as pytree

from int8pass.capture import Program
from int8pass.graph.constants import Compute, Constant
from lowering import registry

LINEAR = "int8pass.linear"
"""Metadata key: the name that a linear had when it was captured, on it and on everything that replaces it. Set by those
who want to follow linears through the stages (`int8pass.inspect`)."""

# Metadata that says where a node comes from; copied to what replaces it, so that reasons can name the source line.
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", LINEAR)


@dataclass(frozen=True)
class NoMatch:
    """Why a rule did not apply: for people, with the node they should look at."""

    reason: str
    node: fx.Node


@dataclass
class Edit:
    """Insertion into one program's graph."""

    program: Program

    def call(self, target: Any, *arguments: Any, before: fx.Node, like: fx.Node | None = None) -> fx.Node:
        """`target(*arguments)` before a node, with fake value; provenance from `like` (default: `before`)."""
        with self.program.graph.inserting_before(before):
            node = self.program.graph.call_function(target, arguments)
        self.evaluate(node)
        origin = (like or before).meta
        node.meta.update({k: origin[k] for k in _PROVENANCE if k in origin})
        return node

    def evaluate(self, node: fx.Node) -> None:
        """Compute the fake value of a call from those of its arguments.

        A model repeats its layers, and running an op on fake tensors takes milliseconds: calls with arguments of equal
        shape share one evaluation (not of views: their results share memory with an argument).
        """
        arguments = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        assert callable(node.target)
        known = self.program.evaluated
        key = (node.target, _signature(arguments)) if _makes_its_own(node) else None
        with torch.no_grad(), self.program.fake_mode, enable_python_dispatcher():
            if key in known:
                node.meta["val"] = pytree.tree_map_only(Tensor, _another, known[key])
            else:
                node.meta["val"] = node.target(*arguments, **node.kwargs)
                if key is not None:
                    known[key] = node.meta["val"]

    def element(self, node: fx.Node, index: int) -> fx.Node:
        """`node[index]`, right after `node` or its other elements."""
        last = max((u for u in node.users if u.target is operator.getitem), default=node)
        with self.program.graph.inserting_after(last):
            element = self.program.graph.call_function(operator.getitem, (node, index))
        element.meta = {"val": node.meta["val"][index], **{k: node.meta[k] for k in _PROVENANCE if k in node.meta}}
        return element

    def derive(
        self, label: str, compute: Compute, sources: Iterable[Constant], *options: Any, before: fx.Node
    ) -> list[fx.Node]:
        """`get_attr` nodes for the elements of a derived constant."""
        derived = self.program.constants.derive(label, compute, tuple(sources), options)
        return [self.program.constants.node(c, before) for c in derived]

    def constant(self, node: object) -> Constant | None:
        """The constant that `node` reads, if it is one."""
        return self.program.constants.get(node)


def _makes_its_own(node: fx.Node) -> bool:
    """True when no result of the call shares memory with an argument."""
    target = node.target
    if node.kwargs or not isinstance(target, torch._ops.OpOverload):
        return False
    schema = target._schema
    # reshape and its like say nothing in their schema, and are composites: views where they can.
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    plain = all(a.alias_info is None for a in (*schema.arguments, *schema.returns))
    return registry.find(target) is not None or (plain and (not composite or target is torch.ops.aten.linear.default))


def _another(tensor: Tensor) -> Tensor:
    """A fake tensor like this one, in memory of its own."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _signature(value: Any) -> Any:
    """Hashable: equal for arguments that give results of equal shape, strides, dtype and device."""
    if isinstance(value, Tensor):
        sizes = (*value.shape, *value.stride())
        return (value.dtype, value.device, value.dim(), tuple(_signature(s) for s in sizes))
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, (list, tuple)):
        return tuple(_signature(v) for v in value)
    return value


Rule = Callable[[fx.Node, Edit], "fx.Node | NoMatch | None"]


@dataclass
class RewriteLog:
    """What a pass of rules did: hits by rule name, and the refusals it met, by node name."""

    hits: Counter[str] = field(default_factory=Counter)
    refusals: dict[str, NoMatch] = field(default_factory=dict)


def apply_rules(program: Program, rules: Iterable[Rule]) -> RewriteLog:
    """Apply every rule to every node, in graph order, rule by rule, once.

    Rule by rule and not node by node: a later rule may rely on the earlier ones having seen the whole graph.
    """
    log = RewriteLog()
    edit = Edit(program)
    for rule in rules:
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.graph is not program.graph or node._erased:
                continue
            result = rule(node, edit)
            if isinstance(result, NoMatch):
                log.refusals[node.name] = result
            elif result is not None:
                node.replace_all_uses_with(result)
                log.hits[rule.__name__] += 1
        program.graph.eliminate_dead_code()
    program.gm.recompile()
    return log


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, device, shape and strides, provably (no guard is added for symbolic sizes)."""
    return (
        a.dtype == b.dtype
        and a.device == b.device
        and a.dim() == b.dim()
        and statically_known_true(sym_eq(tuple(a.shape), tuple(b.shape)))
        and statically_known_true(sym_eq(tuple(a.stride()), tuple(b.stride())))
    )
