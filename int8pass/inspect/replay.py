"""Run captured programs node by node on real tensors, in step with each other, and parts of them.

Nothing is kept longer than the graph needs it: what is compared is compared as soon as both sides are there.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from int8pass.capture import Program, mutated_values
from int8pass.graph.constants import Constant, Store
from int8pass.graph.rewrite import LINEAR
from int8pass.match import Site

Arguments = Sequence[Any]
_RECENT = 8
"""Weights whose packed forms a replay remembers: those of one site and a few more."""


def mark_linears(program: Program) -> None:
    """Let every linear carry its own name through the stages (`graph.rewrite.LINEAR`)."""
    for node in program.graph.nodes:
        if node.op == "call_function":
            node.meta[LINEAR] = node.name if "linear" in str(node.target) else None


def results(program: Program) -> dict[str, fx.Node]:
    """Name of a captured linear → the node that gives its result in this program."""
    return {node.meta[LINEAR]: node for node in program.graph.nodes if node.meta.get(LINEAR)}


class Replay(fx.Interpreter):
    """A program on the arguments of one call of its graph, advanced from outside.

    A graph reads all its constants at its head. With `lazy`, they are computed where they are used and let go soon
    after: an inspection must not double the memory of a model.
    """

    def __init__(self, program: Program, arguments: Arguments, store: Store | None = None, lazy: bool = False) -> None:
        """`store` keeps what it derives, for others to read; without one nothing is kept."""
        super().__init__(program.gm, garbage_collect_values=True)
        self.program, self.arguments = program, arguments
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.position = 0
        self.result: Any = None
        """Of the graph, once it is done."""
        self._values = self._inputs()
        self._kept, self._lazy = store, lazy
        self._recent: OrderedDict[tuple[Constant, ...], Store] = OrderedDict()

    def _inputs(self) -> dict[str, Any]:
        """The placeholders' values; what the graph writes into is copied, so that the caller's tensors stay."""
        written = mutated_values(self.program.graph)
        nodes = [n for n in self.nodes if n.op == "placeholder"]
        values = [self.arguments[i] for i in self.program.placeholders]
        return {
            str(n.target): v.clone() if n in written and isinstance(v, Tensor) else v for n, v in zip(nodes, values)
        }

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """By name: a fork asks for those that come after it a second time."""
        return self._values[str(target)]

    def value(self, constant: Constant) -> Tensor:
        """The real tensor of a constant. Those of the last few weights (codes and scales) are still there."""
        store, parameters = self._kept, constant.parameters()
        if store is None:
            store = self._recent.setdefault(parameters, Store())
            self._recent.move_to_end(parameters)
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        return store.value(constant, lambda p: self.arguments[p.position])  # type: ignore[index]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Constants come from the parameters of this call."""
        if not self._is_constant(target):
            return super().get_attr(target, args, kwargs)
        return self.value(self.program.constants[str(target)])

    def _is_constant(self, target: Any) -> bool:
        """False for the body of a higher-order operator."""
        return not isinstance(getattr(self.program.gm, str(target), None), fx.GraphModule)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """Values of what a node reads; lazy constants are computed here."""
        return fx.node.map_arg(args, self._read)

    def _read(self, node: fx.Node) -> Any:
        if node not in self.env and node.op == "get_attr":
            return self.get_attr(node.target, (), {})
        return self.env[node]

    def step(self) -> tuple[fx.Node, Any]:
        """Run the next node; returns it and its value."""
        node = self.nodes[self.position]
        self.position += 1
        if self._lazy and node.op == "get_attr" and self._is_constant(node.target):
            return node, None
        result = self.env[node] = self.run_node(node)
        self.drop_unread(node)
        if node.op == "output":
            self.result = result
        return node, result

    def drop_unread(self, node: fx.Node) -> None:
        """Forget what no later node reads."""
        for unread in self.user_to_last_uses.get(node, []):
            self.env.pop(unread, None)

    def constant_result(self, node: fx.Node) -> Tensor:
        """The value of a call whose arguments are constants, apart from the run."""
        values = fx.node.map_arg(node.args, lambda n: self.get_attr(str(n.target), (), {}))
        return node.target(*values, **node.kwargs)  # type: ignore[operator]

    @property
    def done(self) -> bool:
        return self.position == len(self.nodes)

    def finish(self) -> Any:
        """Run what is left; the graph's output."""
        while not self.done:
            self.step()
        return self.result

    def fork(self, replaced: Mapping[fx.Node, Tensor]) -> Any:
        """The output, when the nodes still to come that are in `replaced` give these values. This replay stays put.

        The graph must write into nothing in place: both would write into the same.
        """
        position, env = self.position, dict(self.env)
        try:
            while not self.done:
                node = self.nodes[self.position]
                if node not in replaced:
                    self.step()
                    continue
                self.position += 1
                self.env[node] = replaced[node]
                self.drop_unread(node)
            return self.result
        finally:
            self.position, self.env, self.result = position, env, None


class Part:
    """The nodes of a program that lead from the input of one site to the results of its linears."""

    def __init__(self, program: Program, linears: Sequence[str], ends: Mapping[str, fx.Node]) -> None:
        self.program = program
        self.ends = [ends[name] for name in linears]
        own, inside = set(linears), set[fx.Node]()
        todo = list(self.ends)
        self.entries = set[fx.Node]()
        while todo:
            node = todo.pop()
            if node.meta.get(LINEAR) in own and node not in inside:
                inside.add(node)
                todo += node.all_input_nodes
            elif node.op == "get_attr":
                inside.add(node)
            elif node not in inside:
                self.entries.add(node)
        self.nodes = [node for node in program.graph.nodes if node in inside]

    def run(
        self, x: Tensor, replay: Replay, see: Callable[[fx.Node, Any], None] = lambda node, value: None
    ) -> list[Tensor]:
        """The results for the input `x[..., K]`; `see` is shown every node's value. `replay` gives the constants."""
        env: dict[fx.Node, Any] = dict.fromkeys(self.entries, x)
        for node in self.nodes:
            if node.op == "get_attr":
                env[node] = replay.env[node] if node in replay.env else replay.get_attr(node.target, (), {})
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
            see(node, env[node])
        return [env[node] for node in self.ends]


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]


def linear_names(site: Site) -> list[str]:
    """The names by which the linears of a site are followed through the stages."""
    return [reader.node.name for reader in site.readers]


class Timed(Replay):
    """A replay that notes how long every node takes."""

    def __init__(self, program: Program, arguments: Arguments, store: Store) -> None:
        super().__init__(program, arguments, store)
        self.seconds: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run and time; on a GPU, to its end."""
        synchronize()
        begin = time.perf_counter()
        result = super().run_node(n)
        synchronize()
        self.seconds[n] = time.perf_counter() - begin
        return result


def synchronize() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
