"""What a captured graph holds in one piece, put where it is called: regions, checkpoints, `torch.vmap`.

Requires: a graph from torch.export or from Dynamo, as it came. Ensures: linears in such a piece are seen like others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap_with_autocast, wrap_with_set_grad_enabled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from int8pass.errors import CaptureError

# Higher-order operators that say nothing in inference → where the subgraph is among their arguments.
_TRANSPARENT: dict[Any, int] = {wrap_with_set_grad_enabled: 1, wrap_with_autocast: 4, tag_activation_checkpoint: 0}


def in_plain_calls(gm: fx.GraphModule, fake_mode: FakeTensorMode) -> fx.GraphModule:
    """A graph without regions, checkpoints and `torch.vmap`: itself where it has none, else a copy of the same inputs.

    A batched tensor of `vmap` is no value to a trace before dispatch. What lies between the outermost begin and end is
    traced below it, by itself: what is left are calls on whole batches. Before anything takes calls out that nobody
    reads: that is what begin and end are.

    Raises:
        CaptureError: a region computes under autocast.
    """
    if not any(n.target in _TRANSPARENT or _opens(n) for n in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    plain = fx.GraphModule(gm, graph)
    _inline_regions(plain)
    while any(map(_opens, plain.graph.nodes)):
        _trace_vmap(plain, fake_mode)
    plain.recompile()
    return plain


def _inline_regions(gm: fx.GraphModule) -> None:
    """Put the bodies of `torch.no_grad()` and disabled `autocast` regions and of checkpoints where they are called.

    torch.export and Dynamo make a subgraph of each. For inference they say nothing, and a linear in one would not be
    seen.
    """
    for node in [n for n in gm.graph.nodes if n.target in _TRANSPARENT]:
        position = _TRANSPARENT[node.target]
        if node.target is wrap_with_autocast and node.args[2]:
            raise CaptureError("a part of the model computes under torch.autocast: export it in one dtype instead")
        read = node.args[position]
        body = getattr(gm, str(read.target))
        _inline_regions(body)
        inputs = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[position + 1 :]))
        with gm.graph.inserting_before(node):
            results = gm.graph.graph_copy(body.graph, inputs)
        for user in list(node.users):  # a region returns a tuple
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        if not read.users:
            gm.graph.erase_node(read)


def _opens(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "_vmap_increment_nesting"


def _closes(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "_vmap_decrement_nesting"


def _trace_vmap(gm: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
    """Replace the first outermost `vmap` of a graph by the calls it makes."""
    region = _first_vmap(gm.graph)
    inside = set(region)
    around = list(dict.fromkeys(n for node in region for n in node.all_input_nodes if n not in inside))
    attributes, inputs = ([n for n in around if (n.op == "get_attr") == kind] for kind in (True, False))
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    body = fx.Graph()
    copied = {n: body.placeholder(n.name) for n in inputs}
    for node in (*attributes, *region):
        copied[node] = body.node_copy(node, lambda n: copied[n])
    body.output(tuple(copied[n] for n in outputs))
    values = [_in_mode(n.meta.get("example_value", n.meta.get("val")), fake_mode) for n in inputs]
    traced = _traced(fx.GraphModule(gm, body), values, fake_mode)
    for number, read in enumerate(traced.graph.find_nodes(op="get_attr")):
        name = f"_of_vmap_{number}_{region[0].name}"
        setattr(gm, name, getattr(traced, str(read.target)))
        read.target = name
    given = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with gm.graph.inserting_before(region[0]):
        results = gm.graph.graph_copy(traced.graph, given)
    assert isinstance(results, tuple)
    for old, new in zip(outputs, results, strict=True):
        old.replace_all_uses_with(new)
    for node in (*reversed(region), *(n for n in attributes if set(n.users) <= inside)):
        gm.graph.erase_node(node)


def _first_vmap(graph: fx.Graph) -> list[fx.Node]:
    """Nodes from the first begin of a `vmap` to its end, those of others within it included."""
    region: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        depth += _opens(node)
        if depth:
            region.append(node)
        if _closes(node):
            depth -= 1
            if depth == 0:
                return region
    raise CaptureError("torch.vmap begins in the graph and does not end there")


def _in_mode(value: Any, fake_mode: FakeTensorMode) -> Any:
    """A fake tensor of Dynamo's as one of the mode that it leaves to backends; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    with fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _traced(gm: fx.GraphModule, values: Sequence[Any], fake_mode: FakeTensorMode) -> fx.GraphModule:
    levels = len(torch._C._functorch.get_interpreter_stack() or ())
    try:
        with torch.no_grad(), fake_mode, enable_python_dispatcher():
            return make_fx(fx.Interpreter(gm).run)(*values)
    finally:  # a region that failed has not ended what it began
        while len(torch._C._functorch.get_interpreter_stack() or ()) > levels:
            torch._C._functorch._vmap_decrement_nesting()
