"""What ran and how long: the lowered program and the captured one, node by node on the same arguments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from int8pass.capture import Program
from int8pass.fuse import GATE_ACTIVATIONS
from int8pass.graph.constants import Store
from int8pass.graph.pattern import op_name
from int8pass.graph.rewrite import LINEAR
from int8pass.inspect.facts import Ran
from int8pass.inspect.replay import Arguments, Timed, linear_names
from int8pass.inspect.stages import kind_of
from int8pass.match import VIEWS, Site

PRODUCTS = ("linear", "gated_linear")
"""How the ops begin that multiply with a site's weights."""
ROUNDS = 3
NOTE = "node by node, without Inductor's fusion; the fastest of 3 runs"


@dataclass
class Lowered:
    """A program with an implementation for every op, and what its nodes were before they had one."""

    program: Program
    ops: dict[str, str]
    """Name of a node → its op."""

    def nodes_of(self, site: Site) -> list[fx.Node]:
        """The calls that replaced a site's linears and what feeds them."""
        own = set(linear_names(site))
        return [n for n in self.program.graph.nodes if n.op == "call_function" and n.meta.get(LINEAR) in own]

    def implementations(self, site: Site) -> tuple[str, ...]:
        """Names of what runs the products of a site."""
        names = {
            n.meta["int8pass.implementation"]
            for n in self.nodes_of(site)
            if "int8pass.implementation" in n.meta and self.ops[n.name].startswith(PRODUCTS)
        }
        return tuple(sorted(names))

    def has_blocks(self, site: Site) -> bool:
        """Whether the products of a site read blocks of outliers (`int8pass.hilo`)."""
        return any("_hilo" in self.ops.get(n.name, "") for n in self.nodes_of(site))

    def bytes_of(self, site: Site) -> int:
        """Of all constants that only the site's products read: codes, scales, sums, float columns."""
        nodes = [
            n
            for n in self.nodes_of(site)
            if self.ops[n.name].startswith((*PRODUCTS, "index_select", "dequantize_weight"))
        ]
        return constant_bytes(nodes)


def _nbytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def constant_bytes(nodes: Iterable[fx.Node]) -> int:
    """Of the constants that these nodes read, each once."""
    read = dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a.op == "get_attr")
    return sum(_nbytes(a) for a in read)


def weight_bytes(site: Site) -> int:
    """Of the site's original weights."""
    weights = [reader.node.args[1] for reader in site.readers]
    return sum(_nbytes(weight) for weight in weights if isinstance(weight, fx.Node))


@dataclass
class Measured:
    """Times of a program's calls."""

    seconds: dict[fx.Node, float]
    """The shortest of several runs"""
    output: Any
    """Of the program"""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def measured(program: Program, arguments: Arguments, store: Store, rounds: int = ROUNDS) -> Measured:
    """Time every call of a program; what it derives from parameters is computed once, into `store`."""
    best: dict[fx.Node, float] = {}
    output = None
    for _ in range(rounds):
        run = Timed(program, arguments, store)
        output = run.finish()
        for node, seconds in run.seconds.items():
            if node.op == "call_function":
                best[node] = min(seconds, best.get(node, seconds))
    return Measured(best, output)


def originals(site: Site, fused: set[str]) -> list[fx.Node]:
    """The captured nodes whose work the site's fused ops do: its linears, and what was fused into its quantize."""
    nodes = [reader.node for reader in site.readers]
    names = {name.removesuffix("_dynamic").removesuffix("_hilo") for name in fused}
    if names & {"norm_quantize", "add_norm_quantize", "act_mul_quantize"}:
        nodes.append(site.source)
        wanted = {"add_norm_quantize": {"add"}, "act_mul_quantize": set(GATE_ACTIVATIONS)}
        for name in names & set(wanted):
            nodes += [n for n in site.source.all_input_nodes if op_name(n) in wanted[name]]
    if "gated_linear_quantize" in names:
        activations = [n for reader in site.readers for n in reader.node.users if op_name(n) in GATE_ACTIVATIONS]
        nodes += [*activations, *(n for activation in activations for n in activation.users if op_name(n) == "mul")]
    if any(name.startswith("linear_") and name.endswith("_add") for name in names):
        nodes += [n for reader in site.readers for n in reader.node.users if op_name(n) == "add"]
    return nodes


def rows(lowered: Lowered, seconds: dict[fx.Node, float], sites: dict[str, str]) -> list[Ran]:
    """One row per call of ours, one per op for all others; the slowest first."""
    ours, rest = [], defaultdict[str, list[float]](list)
    for node, spent in seconds.items():
        op = lowered.ops.get(node.name) or kind_of(node)
        if "int8pass.implementation" in node.meta:
            site, size = sites.get(node.meta.get(LINEAR) or "", ""), constant_bytes([node])
            row = Ran(node.name, op, node.meta["int8pass.implementation"], 1, spent, size, site, (node.name,))
            ours.append(row)
        elif op not in VIEWS:
            rest[op].append(spent)
    others = [Ran(op, op, "torch", len(times), sum(times), 0) for op, times in rest.items()]
    return sorted([*ours, *others], key=lambda row: -row.seconds)
