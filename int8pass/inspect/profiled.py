"""What really ran: the graph as Inductor compiles it, under torch's profiler, every kernel traced back to its nodes.

Inductor's provenance tracking names the nodes of every kernel it emits, in the order of emission, which is the order of
execution. The n-th event of a name therefore belongs to the n-th kernel of that name.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._C._autograd import DeviceType
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import debug
from torch._inductor.compile_fx import compile_fx_inner
from torch.profiler import ProfilerActivity, profile

from int8pass.capture import Program
from int8pass.graph.constants import Store
from int8pass.graph.rewrite import LINEAR
from int8pass.inspect.facts import Ran
from int8pass.inspect.replay import Arguments
from int8pass.inspect.timing import Lowered, constant_bytes
from int8pass.lower import Compiled, compile_with_inductor, lift_constants, mark_placeholders

ROUNDS = 3
NOTE = "the graph compiled by Inductor, under torch.profiler; the fastest of 3 calls"
_NODE = "int8pass_node"
_CONFIG = {"cpp.enable_kernel_profile": True, "trace.provenance_tracking_level": 1, "fx_graph_cache": False}
_REGIONS = ("##", "Torch-Compiled", "AOTDispatcher", "Pregraph", "TorchDynamo", "ProfilerStep")


@dataclass
class Kernels:
    """Which nodes of the lowered program each kernel computes."""

    nodes: dict[str, list[tuple[str, ...]]] = field(default_factory=lambda: defaultdict(list))
    """Name of a kernel → for every call of it, in order, the names of its nodes."""

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        """Inductor's inner compiler, with a look at what it emitted before it forgets."""
        names: dict[str, str] = {}

        def see(operations: list[Any]) -> list[Any]:
            """The compiler put nodes of its own in place of some of `gm`'s: each call of a Triton kernel is one."""
            origins = (origin for operation in operations for origin in getattr(operation.node, "origins", ()))
            names.update({n.name: n.meta.get("custom", {}).get(_NODE, "") for n in origins})
            return operations

        with inductor_config.patch(_pre_fusion_custom_pass=see):
            result = compile_fx_inner(gm, inputs, **options)
        emitted = debug._inductor_triton_kernel_to_post_grad_node_info
        for kernel in sorted(emitted, key=lambda k: int(k.rpartition(":")[2])):
            found = dict.fromkeys(names.get(post, "") for post in emitted[kernel])
            self.nodes[plain_name(kernel.rpartition(":")[0])].append(tuple(filter(None, found)))
        return result


def compile_observed(
    program: Program, gm: fx.GraphModule, context: TracingContext, arguments: Arguments, store: Store
) -> tuple[Callable[..., Any], Kernels]:
    """The lowered program as the backend would compile it, and what its kernels are made of.

    `context` is the one that Dynamo captured `gm` in; packed weights come from `store`.
    """
    copied, kernels = program.copy(), Kernels()
    for node in copied.graph.nodes:
        if node.op == "call_function":
            node.meta["custom"] = {**node.meta.get("custom", {}), _NODE: node.name}
    constants = lift_constants(copied)
    mark_placeholders(copied, gm)
    compiled = Compiled(copied.placeholders, constants, store, arguments, False, None)
    # A cached graph would come without its provenance; compiled kernels are cached by their code all the same.
    with tracing(context), functorch_config.patch(enable_autograd_cache=False):
        compiled.function = compile_with_inductor(copied, compiled.inputs(arguments), _CONFIG, kernels.compile)
    return compiled, kernels


def plain_name(kernel: str) -> str:
    """One name for what the compiler and the profiler call differently.

    `torch.ops.aten.mm.default`, `extern_kernels.mm`, `aten::mm` → `mm`; `graph_0_cpp_fused_add` → `cpp_fused_add`;
    Triton kernels that Inductor did not write get a number when they are emitted: `_gemm_kernel_3` → `_gemm_kernel`.
    """
    kernel = re.sub(r"^graph_\d+_", "", kernel)
    if _generated(kernel):
        return kernel
    kernel = re.sub(r"^torch\.ops\.\w+\.(\w+)(\.\w+)?$", r"\1", kernel)
    kernel = kernel.rpartition("::")[2].removeprefix("extern_kernels.").removeprefix("aten.")
    return re.sub(r"_\d+$", "", kernel)


def events(function: Callable[..., Any], arguments: Arguments) -> list[tuple[str, float]]:
    """(name, seconds) of every kernel of the fastest of `ROUNDS` calls, in order."""
    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    best: list[tuple[str, float]] = []
    function(*arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself on stderr
    for _ in range(ROUNDS):
        with profile(activities=activities, acc_events=True) as recorded:  # else a warning that events were dropped
            function(*arguments)
            if gpu:
                torch.cuda.synchronize()
        found = [e for e in recorded.events() if (_on_gpu(e) if gpu else _outermost(e))]
        found.sort(key=lambda e: e.time_range.start)
        times = own_times([(e.time_range.start, e.time_range.end) for e in found])
        run = [(e.name, us * 1e-6) for e, us in zip(found, times, strict=True)]
        if not best or sum(s for _, s in run) < sum(s for _, s in best):
            best = run
    return best


def own_times(spans: Sequence[tuple[float, float]]) -> list[float]:
    """How long each of several spans (start, end), in order of their starts, went on after all before it had ended.

    A kernel may start while the one before it still runs, and wait for it: what it waits is no time of its own.
    """
    times, last = [], float("-inf")
    for start, end in spans:
        times.append(max(0.0, end - max(start, last)))
        last = max(last, end)
    return times


def _on_gpu(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation and "Sync" not in event.name


def _outermost(event: Any) -> bool:
    """An operator or kernel that no other one calls: what surrounds it are the profiler's regions alone."""
    parent = event.cpu_parent
    return not _is_region(event) and (parent is None or _is_region(parent))


def _is_region(event: Any) -> bool:
    return bool(event.name.startswith(_REGIONS))


def rows(lowered: Lowered, kernels: Kernels, found: Sequence[tuple[str, float]], sites: Mapping[str, str]) -> list[Ran]:
    """One row per call of an op of ours, one per kernel for all others; the slowest first.

    Where a kernel ran another number of times than it was emitted (in the branch of a condition, say), its calls cannot
    be told apart: they are one row without nodes.
    """
    by_name = {n.name: n for n in lowered.program.graph.nodes}
    ours: list[Ran] = []
    others: dict[str, list[tuple[float, list[fx.Node]]]] = defaultdict(list)
    for (event, seconds), names in zip(found, _nodes_of_calls(kernels, [name for name, _ in found])):
        nodes = [node for name, node in by_name.items() if name in names]  # in the order of the graph
        if not _generated(event):
            nodes = nodes[-1:]  # an operator is one node; those before it are what its arguments came from
        if nodes and not _generated(event) and "int8pass.implementation" in nodes[0].meta:
            ours.append(_of_ours(nodes[0], seconds, lowered, sites))
        else:
            others[event].append((seconds, nodes))
    return sorted([*ours, *(_of_others(*item) for item in others.items())], key=lambda row: -row.seconds)


def _nodes_of_calls(kernels: Kernels, names: Sequence[str]) -> Iterator[set[str]]:
    """For every event, the nodes that it computed; none when they are not known."""
    ran, place = Counter(map(plain_name, names)), Counter[str]()
    for name in map(plain_name, names):
        emitted = kernels.nodes.get(name, [])
        yield set(emitted[place[name]]) if len(emitted) == ran[name] else set()
        place[name] += 1


def _of_ours(node: fx.Node, seconds: float, lowered: Lowered, sites: Mapping[str, str]) -> Ran:
    implementation, site = node.meta["int8pass.implementation"], sites.get(node.meta.get(LINEAR) or "", "")
    size = constant_bytes([node])
    return Ran(node.name, lowered.ops[node.name], implementation, 1, seconds, size, site, (node.name,))


def _of_others(event: str, calls: Sequence[tuple[float, list[fx.Node]]]) -> Ran:
    nodes = dict.fromkeys(node for _, found in calls for node in found)
    names, maker = tuple(node.name for node in nodes), "Inductor" if _generated(event) else "torch"
    seconds, op = sum(s for s, _ in calls), plain_name(event)
    return Ran(event, op, maker, len(calls), seconds, constant_bytes(nodes), "", names)


def _generated(kernel: str) -> bool:
    """By Inductor: `cpp_fused_…`, `triton_poi_fused_…`."""
    return "fused_" in kernel and "::" not in kernel


__all__ = ["NOTE", "Kernels", "compile_observed", "events", "plain_name", "rows"]
