"""Channels: which output channel of a norm or linear becomes which input channel of the linears after it.

A scale that divides output channels of one op may be undone in the weights of the linears after it only if every op on
the way carries it through. The way is found without names: a tensor of channel numbers takes the place of the output
and goes through the graph's own views, grouped-query repeats, attention values, gate products and ReLUs. Where the
numbers arrive is the map; other linears they reach must be rescaled too; whatever else reads them freezes its channels.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from int8pass.graph.pattern import CASTS, op_name

_PRODUCERS = {"linear", "rms_norm", "layer_norm"}
_VIEWS = {
    "view", "reshape", "_unsafe_view", "transpose", "permute", "t", "numpy_T", "unsqueeze", "squeeze", "slice",
    "select", "expand", "broadcast_to", "alias", "contiguous", "clone", "flatten", "unflatten", "chunk", "split",
    "split_with_sizes", "unbind", "repeat", "repeat_interleave", "roll", "movedim", "detach", "getitem",
}  # fmt: skip
_SAME = {"to", "_to_copy", "type_as", "relu", "neg"}
_SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_empty", "new_full"}
MOST_ELEMENTS = 2**26
_RESHAPES = {"view", "_unsafe_view"}


class Blocked(Exception):
    """The numbers cannot go through an op."""


@dataclass(frozen=True)
class ChannelMap:
    """`source[..., j]` is linear in channel `channels[j]` of the output of `producer`, and in no other."""

    producer: fx.Node
    channels: tuple[int, ...]
    width: int
    """Output channels of the producer."""
    path: tuple[fx.Node, ...]
    """The ops on the way, in graph order."""
    followers: tuple[tuple[fx.Node, tuple[int, ...]], ...] = ()
    """Other linears that read these channels, with the channel that each of their inputs is."""


def trace_channels(source: fx.Node, readers: frozenset[fx.Node]) -> ChannelMap | str:
    """The norm or linear that makes `source` channel by channel, seen by linears only; or why there is none."""
    producers, reason = _producers(source)
    for producer in producers:
        found = _forward(producer, source, readers)
        if isinstance(found, ChannelMap):
            return found
        reason = found
    return reason


def gamma_of(node: fx.Node) -> fx.Node | None:
    """The vector that a norm, or a product with a constant, multiplies the channels of its result by."""
    name, arguments = op_name(node), node.args
    if name == "rms_norm":
        return arguments[1]  # type: ignore[return-value]
    if name == "layer_norm":
        return arguments[2] if len(arguments) > 2 else None  # type: ignore[return-value]
    if name == "mul":
        width = node.meta["val"].shape[-1:]
        for argument in arguments:
            while op_name(argument) in CASTS and len(argument.users) == 1:  # type: ignore[union-attr]
                argument = argument.args[0]  # type: ignore[union-attr]
            if isinstance(argument, fx.Node) and argument.op == "get_attr" and argument.meta["val"].shape == width:
                return argument
    return None


def _producers(source: fx.Node) -> tuple[list[fx.Node], str]:
    """Linears that may make `source`, walking back through what carries a scale; and the op that ended a walk."""
    todo, found, reason, seen = [source], [], "no norm or linear makes its input", set()
    while todo:
        node = todo.pop(0)
        name = op_name(node) or ("getitem" if "getitem" in str(node.target) else "")
        if node in seen:
            continue
        seen.add(node)
        if name in _PRODUCERS or gamma_of(node) is not None:
            found.append(node)
        elif name in _VIEWS | _SAME or (name in {"mul", "div"} and not isinstance(node.args[1], fx.Node)):
            todo.append(node.args[0])  # type: ignore[arg-type]
        elif name == "mul":
            todo += [a for a in node.args if isinstance(a, fx.Node)]
        elif name == "scaled_dot_product_attention":
            todo.append(node.args[2])  # type: ignore[arg-type]
        elif name in {"matmul", "bmm"}:
            todo.append(node.args[1])  # type: ignore[arg-type]
        elif name:
            reason = f"no scale passes through {name}"
    return found, reason


def _forward(producer: fx.Node, source: fx.Node, readers: frozenset[fx.Node]) -> ChannelMap | str:
    """Send channel numbers from `producer` to `source`."""
    try:
        shape = sizes(producer.meta["val"])
    except Blocked as blocked:
        return str(blocked)
    at: dict[fx.Node, Any] = {producer: torch.arange(shape[-1], dtype=torch.int32).expand(shape)}
    frozen: dict[int, fx.Node] = {}
    path: list[fx.Node] = []
    followers: list[fx.Node] = []
    todo = list(producer.users)
    heapq.heapify(todo)
    while todo:
        node = heapq.heappop(todo)
        arrived = [a for a in node.all_input_nodes if a in at]
        if node in at or node in followers or (node in readers and arrived == [source]):
            continue
        if op_name(node) in _SHAPE_ONLY:
            continue
        if op_name(node) == "linear" and arrived == [node.args[0]]:
            followers.append(node)
            continue
        try:
            at[node] = _carry(node, at, frozen)
        except Blocked:
            for argument in arrived:
                _freeze(at[argument], node, frozen)
            continue
        path.append(node)
        for user in node.users:
            heapq.heappush(todo, user)
    return _arrival(producer, source, at, frozen, path, followers)


def _arrival(
    producer: fx.Node,
    source: fx.Node,
    at: dict[fx.Node, Any],
    frozen: dict[int, fx.Node],
    path: list[fx.Node],
    followers: list[fx.Node],
) -> ChannelMap | str:
    """What came of the numbers: the map, or who stands in its way."""
    if source not in at or not isinstance(at[source], Tensor):
        blocker = next(iter(frozen.values()), source)
        return f"no scale passes through {op_name(blocker) or blocker.op}"
    channels = _per_channel(at[source])
    if channels is None:
        return "its channels are not those of one norm or linear"
    for channel in channels:
        if channel in frozen:
            user = frozen[channel]
            return f"what makes it is also read by {op_name(user) or user.op}"
    taken, others = set(channels), []
    for node in followers:
        read = _per_channel(at[node.args[0]])  # type: ignore[index]
        if read is None:
            if taken.isdisjoint(torch.unique(at[node.args[0]]).tolist()):  # type: ignore[index]
                continue
            return f"{node.name} reads its channels in another order"
        if not taken.isdisjoint(read):
            others.append((node, read))
    return ChannelMap(producer, channels, sizes(producer.meta["val"])[-1], tuple(path), tuple(others))


def _per_channel(numbers: Tensor) -> tuple[int, ...] | None:
    """The channel numbers along the last axis, if they are the same everywhere else."""
    rows = numbers.reshape(-1, numbers.shape[-1])
    if rows.shape[0] == 0 or not bool((rows == rows[:1]).all()):
        return None
    return tuple(rows[0].tolist())


def _freeze(numbers: Any, user: fx.Node, frozen: dict[int, fx.Node]) -> None:
    for part in numbers if isinstance(numbers, (list, tuple)) else (numbers,):
        for channel in torch.unique(part).tolist():
            frozen.setdefault(channel, user)


def _carry(node: fx.Node, at: dict[fx.Node, Any], frozen: dict[int, fx.Node]) -> Any:
    """The channel numbers of a node's result; `Blocked` where its result is not linear in them."""
    name = op_name(node)
    if "getitem" in str(node.target) and not name:
        return at[node.args[0]][node.args[1]]  # type: ignore[index]
    if name in _VIEWS:
        return _view(node, name, at)
    if name in _SAME or (name in {"mul", "div"} and not isinstance(node.args[1], fx.Node)):
        return at[node.args[0]]  # type: ignore[index]
    if name == "mul":
        carried = [a for a in node.args if a in at]
        if len(carried) != 1:
            raise Blocked("both factors")
        return at[carried[0]].expand(sizes(node.meta["val"]))  # type: ignore[index]
    if name == "scaled_dot_product_attention" or name in {"matmul", "bmm"}:
        return _attend(node, name, at, frozen)
    raise Blocked(name)


def _view(node: fx.Node, name: str, at: dict[fx.Node, Any]) -> Any:
    if node.args[0] not in at or any(a in at for a in node.all_input_nodes[1:]):
        raise Blocked(name)
    arguments = [_concrete(a) for a in node.args[1:]]
    keywords = {k: _concrete(v) for k, v in node.kwargs.items() if k != "memory_format"}
    numbers = at[node.args[0]]  # type: ignore[index]
    if name in {"contiguous", "clone"}:
        return numbers
    if name in _RESHAPES:
        return numbers.reshape(*arguments)
    assert callable(node.target)
    return node.target(numbers, *arguments, **keywords)


def _attend(node: fx.Node, name: str, at: dict[fx.Node, Any], frozen: dict[int, fx.Node]) -> Tensor:
    """Weighted sums over tokens: linear in the values, channel by channel; not in what the weights come from."""
    index = 2 if name == "scaled_dot_product_attention" else 1
    value = node.args[index]
    if value not in at:
        raise Blocked(name)
    for argument in node.all_input_nodes:
        if argument in at and argument is not value:
            _freeze(at[argument], node, frozen)
    if sum(a is value for a in node.args) > 1:
        raise Blocked("keys are values")
    numbers = at[value]  # type: ignore[index]
    row = numbers[..., :1, :]
    if not bool((numbers == row).all()):
        raise Blocked("tokens are not on the last axis but one")
    out = sizes(node.meta["val"])
    if node.kwargs.get("enable_gqa") and row.dim() >= 3 and row.shape[-3] != out[-3]:
        row = row.repeat_interleave(out[-3] // row.shape[-3], -3)
    return row.expand(out)


def _concrete(value: Any) -> Any:
    """An argument with numbers in the place of symbols."""
    if isinstance(value, fx.Node):
        return _concrete(value.meta["val"])
    if isinstance(value, (list, tuple)):
        return [_concrete(v) for v in value]
    if isinstance(value, torch.SymInt):
        return size(value)
    if isinstance(value, Tensor):
        raise Blocked("an index that is a tensor")
    return value


def size(value: Any) -> int:
    """A size as a number; of a symbol, the value it was traced with (no guard is added)."""
    if isinstance(value, torch.SymInt):
        if not value.node.has_hint():
            raise Blocked("an unknown size")
        return int(value.node.hint)
    return int(value)


def sizes(value: Tensor) -> tuple[int, ...]:
    """The shape of a fake tensor as numbers."""
    return tuple(size(s) for s in value.shape)


def carries_scale(found: ChannelMap, source: fx.Node) -> bool:
    """Run the way on random fp32 numbers, with and without a scale: the same within 1e-5, or the map is wrong.

    Tensors of more than `MOST_ELEMENTS` are taken at the map's word: their random twins would not fit.
    """
    if math.prod(sizes(found.producer.meta["val"])) > MOST_ELEMENTS:
        return True
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return _concrete(value) if isinstance(value, torch.SymInt) else value
        if value.dtype == torch.bool:
            return torch.ones(sizes(value), dtype=torch.bool)
        if not value.is_floating_point():
            return torch.zeros(sizes(value), dtype=value.dtype)
        return torch.randn(sizes(value), generator=generator)

    first = torch.randn(sizes(found.producer.meta["val"]), generator=generator)
    scale = torch.exp2(torch.randint(-3, 4, (found.width,), generator=generator).float())
    used = torch.zeros(found.width, dtype=torch.bool)
    used[list(found.channels)] = True
    scale = torch.where(used, scale, 1.0)
    others = {
        a: noise(a.meta["val"]) for n in found.path for a in n.all_input_nodes if a not in {found.producer, *found.path}
    }
    plain = _run(found, source, {**others, found.producer: first})
    scaled = _run(found, source, {**others, found.producer: first / scale})
    difference = (scaled * scale[list(found.channels)] - plain).norm()
    return bool(difference <= 1e-5 * plain.norm())


def _run(found: ChannelMap, source: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    for node in found.path:
        if values.get(source) is not None:
            break
        name = op_name(node)
        if not name:  # an element of a split
            values[node] = values[node.args[0]][node.args[1]]  # type: ignore[index]
            continue
        given: Any = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        arguments = tuple(a if isinstance(a, Tensor) else _concrete(a) for a in given[0])
        keywords = {k: _concrete(v) for k, v in given[1].items() if not isinstance(v, Tensor)}
        if name in {"to", "_to_copy", "type_as"}:
            values[node] = arguments[0]
        elif name in _RESHAPES:
            shape: Any = arguments[1]
            values[node] = arguments[0].reshape(shape)
        else:
            assert callable(node.target)
            values[node] = node.target(*arguments, **keywords)
    result = values[source]
    assert isinstance(result, Tensor)
    return result
