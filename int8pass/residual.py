"""The sum with a residual is made by the linear before it, where a kernel of the device does that in its epilogue.

Requires: fused ops. Ensures: every sum of a linear that nothing else reads and of a tensor laid out like its result is
a `linear_…_add`, and the norm that took the sum takes its result, where the chosen implementation is one kernel: the
sum is then written once and read once, never apart from the linear's result, which is rounded once instead of twice.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from int8pass.capture import Program
from int8pass.graph.pattern import op_name
from int8pass.graph.rewrite import Edit, same_layout
from int8pass.lower import choose
from lowering import registry
from lowering.ops import hilo, linear, norm

_LINEARS = {
    "linear_w8a8": linear.linear_w8a8_add,
    "linear_w8a8_hilo": hilo.linear_w8a8_hilo_add,
    "linear_w8a16": linear.linear_w8a16_add,
}
_NORMS = {"add_norm_quantize": norm.norm_quantize, "add_norm_quantize_hilo": hilo.norm_quantize_hilo}


def residuals_into_linears(program: Program) -> int:
    """Rewrite what can be; returns how many sums were.

    `add_norm_quantize(linear(x), r, …)` ⇒ `h = linear_add(x, r) ; norm_quantize(h, …)`, with outlier blocks too, and
    `linear(x) + r` ⇒ `linear_add(x, r)`
    """
    edit, count = Edit(program), 0
    for node in list(program.graph.nodes):
        name = op_name(node)
        if name not in _NORMS and (name != "add" or node.kwargs):
            continue
        found = _linear_and_residual(node)
        if found is None:
            continue
        layer, residual = found
        op = _LINEARS[op_name(layer)]
        if _composed(op, layer, residual):
            continue
        total = edit.call(op.overload, *layer.args, residual, before=node, like=layer)
        if name == "add":
            node.replace_all_uses_with(total)
        else:
            _norm_of(node, total, edit)
        program.graph.erase_node(node)
        program.graph.erase_node(layer)
        count += 1
    if count:
        program.gm.recompile()
    return count


def _linear_and_residual(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two terms of a sum, if one is a linear's result that nothing else reads, and neither is broadcast or cast."""
    terms = node.args[:2]
    if not all(isinstance(term, fx.Node) and isinstance(term.meta.get("val"), Tensor) for term in terms):
        return None
    for layer, residual in (terms, terms[::-1]):
        assert isinstance(layer, fx.Node)
        assert isinstance(residual, fx.Node)
        if op_name(layer) not in _LINEARS or len(layer.users) != 1 or layer is residual:
            continue
        if same_layout(layer.meta["val"], residual.meta["val"]):
            return layer, residual
    return None


def _composed(op: registry.Op, layer: fx.Node, residual: fx.Node) -> bool:
    """Whether the device would make the sum apart, all the same."""
    values = fx.node.map_arg((*layer.args, residual), lambda n: n.meta["val"])
    return choose(op, tuple(values)).composed


def _norm_of(node: fx.Node, total: fx.Node, edit: Edit) -> None:
    """The norm and its quantization of a sum that is there, in place of one that makes it."""
    new = edit.call(_NORMS[op_name(node)].overload, total, *node.args[2:], before=node)
    for element in list(node.users):
        assert element.target is operator.getitem
        index = int(element.args[1])  # type: ignore[arg-type]
        element.replace_all_uses_with(total if index == 0 else edit.element(new, index - 1))
        edit.program.graph.erase_node(element)
