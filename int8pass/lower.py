"""Lower: each op of ours → its implementation for the device; constants → static inputs; then Inductor.

Requires: a graph whose `int8pass::` nodes all have an implementation for the device of their tensors.
Ensures: no `int8pass::` node is left (an op without an implementation is an error that names op and device, never a
fallback), and the compiled callable takes the inputs of the original graph.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

from int8pass.asked_once import asked_once
from int8pass.capture import Program
from int8pass.errors import UnsupportedError
from int8pass.graph.constants import Constant, Store
from int8pass.graph.rewrite import Edit
from lowering import registry

TARGETS = {"cpu": "cpu", "cuda": "triton"}


def choose_implementations(program: Program) -> Counter[tuple[str, str]]:
    """Replace every op of ours by its implementation; returns (op, implementation) → how often it was chosen.

    Raises:
        UnsupportedError: an op has no implementation for its device and arguments.
    """
    chosen: Counter[tuple[str, str]] = Counter()
    for node in list(program.graph.nodes):
        op = registry.find(node.target) if node.op == "call_function" else None
        if op is None:
            continue
        values = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        implementation = choose(op, tuple(values))
        if implementation.prepack is not None:
            _prepack(node, op, implementation.prepack, Edit(program))
        node.target = implementation.function
        node.meta["int8pass.implementation"] = implementation.name
        chosen[op.name, implementation.name] += 1
    program.gm.recompile()
    return chosen


def _prepack(node: fx.Node, op: registry.Op, prepack: registry.Prepack, edit: Edit) -> None:
    """Give an implementation the argument it prefers, if the one in the graph is a constant."""
    position = op.position(prepack)
    constant = edit.constant(node.args[position])
    if constant is not None:
        options = prepack.options(*fx.node.map_arg(node.args, lambda n: n.meta["val"]))
        label = f"{constant.label}.{prepack.compute.__name__}"
        (packed,) = edit.derive(label, prepack.compute, [constant], *options, before=node)
        node.update_arg(position, packed)


def choose(op: registry.Op, values: tuple[Any, ...]) -> registry.Implementation:
    """The implementation of `op` for these fake arguments, by the device they are on."""
    device = next(v.device.type for v in values if isinstance(v, Tensor))
    if device not in TARGETS:
        raise UnsupportedError(f"op {op.name!r} on device {device!r}: int8pass runs on {', '.join(sorted(TARGETS))}")
    target = TARGETS[device]
    load_target(target)
    try:
        return op.choose(target, values)
    except registry.LoweringError as error:
        raise UnsupportedError(str(error)) from error


def load_target(target: str) -> None:
    """Import the implementations of one target; the others need not be installed."""
    if target == "triton":
        import lowering.triton
    else:
        import lowering.cpu  # noqa: F401


class Preparation(NamedTuple):
    """What `compile_with_inductor` owes to what was begun: to call `before`, and to let Inductor compile `within`."""

    before: Callable[[], None] = lambda: None
    within: Callable[[], AbstractContextManager[None]] = nullcontext


UNPREPARED = Preparation()


def prepare(inputs: Sequence[Any]) -> Preparation:
    """Let the target of these inputs begin to build what it needs, beside the stages that come before lowering."""
    devices = {v.device.type for v in inputs if isinstance(v, Tensor)}
    if "cuda" in devices:
        from lowering.triton import ahead

        ahead.prepare(torch.device("cuda"))
        return Preparation(ahead.workers_started, ahead.beside_inductor)
    if devices == {"cpu"}:
        from lowering.cpu import native

        native.prepare()
    return UNPREPARED


def lift_constants(program: Program) -> list[Constant]:
    """Turn every constant's `get_attr` into a placeholder after the others; returns these in placeholder order.

    As inputs and not attributes, packed weights can be checked on every call against the parameters they were made
    from, and one compiled graph serves every module that shares its code (regional compilation).
    """
    graph = program.graph
    last = [n for n in graph.nodes if n.op == "placeholder"]
    lifted: list[Constant] = []
    for node in graph.find_nodes(op="get_attr"):
        constant = program.constants.get(node)
        if constant is None:
            continue  # a subgraph of a higher-order operator
        with graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes))):
            placeholder = graph.placeholder(str(node.target))
        last.append(placeholder)
        placeholder.meta = {"val": node.meta["val"], **_dynamo_marks(program, constant, str(node.target))}
        if constant.position is not None and program.origins:
            placeholder._dynamo_source = program.origins[constant.position]._dynamo_source  # type: ignore[attr-defined]
        else:
            # A name no user variable can have; AOTAutograd wants sources, and wants them unique.
            placeholder._dynamo_source = LocalSource(f"__int8pass_{len(lifted)}")
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
        lifted.append(constant)
    for name in program.constants.used():
        delattr(program.gm, name)
    return lifted


def _dynamo_marks(program: Program, constant: Constant, name: str) -> dict[str, Any]:
    """Placeholder metadata that makes AOTAutograd treat a constant as a static input (same address on every call)."""
    if constant.position is not None and program.origins:
        meta = program.origins[constant.position].meta
        return {k: meta[k] for k in ("tensor_dict", "grapharg", "example_value") if k in meta}
    return {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}}


class Compiled:
    """What Dynamo calls: the user's inputs go in, packed weights are added, the compiled graph runs.

    Packed weights are checked against the parameters of *this* call, by identity and version: a weight that was
    replaced or written in place is packed anew, never silently ignored. (A write through `.data` changes neither;
    `torch.autograd.graph.increment_version` tells.)
    """

    def __init__(
        self,
        positions: Sequence[int],
        constants: Sequence[Constant],
        store: Store,
        arguments: Sequence[Any],
        counts_overflow: bool,
        after_first_run: Callable[[], None] | None,
    ) -> None:
        self.function: Callable[..., Any] = _not_compiled
        self._positions = tuple(positions)
        self._constants = tuple(constants)
        self._store = store
        parameters = dict.fromkeys(p for c in constants for p in c.parameters())
        self._watched = tuple(p.position for p in parameters if p.position is not None)
        self._counts_overflow = counts_overflow
        self._overflow: Tensor | None = None
        self._after_first_run = after_first_run
        self._pack(arguments)

    def _pack(self, arguments: Sequence[Any]) -> None:
        self._packed = [
            self._store.value(c, lambda p: arguments[p.position])  # type: ignore[index]
            for c in self._constants
        ]
        self._seen = [arguments[i] for i in self._watched]
        self._remember_versions()

    def _remember_versions(self) -> None:
        # Inference tensors count no writes. The others are asked on every call, hundreds of them: without a function.
        self._counting = [t for t in self._seen if not t.is_inference()]
        self._versions = [t._version for t in self._counting]

    def inputs(self, arguments: Sequence[Any]) -> list[Any]:
        """The flat inputs of the compiled graph."""
        return [*(arguments[i] for i in self._positions), *self._packed]

    def __call__(self, *arguments: Any) -> Any:
        if not all(map(operator.is_, map(arguments.__getitem__, self._watched), self._seen)) or (
            [t._version for t in self._counting] != self._versions
        ):
            self._pack(arguments)
        result = self.function(*self.inputs(arguments))
        if self._after_first_run is not None:
            self._after_first_run()
            self._remember_versions()
            self._after_first_run = None
        if self._counts_overflow:
            *result, overflow = result
            self._count(overflow)
        return result

    def _count(self, overflow: Tensor) -> None:
        """Add up on the device: no synchronization, and a CUDA graph may reuse the memory of `overflow`."""
        if self._overflow is None:
            self._overflow = torch.zeros_like(overflow, dtype=torch.int64)
        self._overflow.add_(overflow)

    def overflow(self) -> int:
        """Outlier columns without a place, over all calls so far."""
        return 0 if self._overflow is None else int(self._overflow)

    def reads_any(self, parameters: set[int]) -> bool:
        """True when one of these parameters (by id) goes into the graph."""
        return any(id(t) in parameters for t in self._seen)


def _not_compiled(*arguments: Any) -> Any:
    raise RuntimeError("called before compile_with_inductor")


def mark_placeholders(program: Program, gm: fx.GraphModule) -> None:
    """Give surviving inputs Dynamo's source and metadata, and the module what AOT knows Dynamo's graphs by."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node, position in zip(placeholders, program.placeholders):
        origin = program.origins[position]
        node.meta.update({k: origin.meta[k] for k in ("tensor_dict", "grapharg", "example_value") if k in origin.meta})
        node._dynamo_source = origin._dynamo_source  # type: ignore[attr-defined]
    program.gm.meta.update(gm.meta)
    program.gm._param_name_to_source = dict(getattr(gm, "_param_name_to_source", None) or {})  # type: ignore[assignment]


def _keep_static(program: Program, packed: Sequence[Tensor]) -> None:
    """Packed weights have no dynamic sizes: Dynamo knows nothing of them, and would make a symbol of every size."""
    context = TracingContext.get()
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"][len(program.placeholders) :]
    for node, tensor in zip(placeholders, packed, strict=True):
        if tensor not in context.tensor_to_context:
            context.tensor_to_context[tensor] = StatefulSymbolicContext(
                dynamic_sizes=[DimDynamic.STATIC] * tensor.dim(),
                tensor_source=node._dynamo_source,
                shape_env_to_source_to_symbol_cache={},
            )


# Inductor checks the sizes and alignment of every result of an operator it did not generate, on every call: a hundred
# sites with six results each. What our operators return is compared with their fakes in the tests.
_SETTINGS: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}
# For kernels of its own Inductor has a launcher; for others a C compiler makes one, 0.25 s each, unless it is told that
# its own will do. It checks that, and falls back.
if hasattr(torch._inductor.config, "static_launch_user_defined_triton_kernels"):
    _SETTINGS["static_launch_user_defined_triton_kernels"] = True
# Kernels that Inductor launches early read, before they wait, what the kernel just ahead did not write, which is right
# where every kernel lets the next one start after its own wait. Ours do so before.
_FIXED: dict[str, Any] = {"triton.enable_pdl": False} if hasattr(torch._inductor.config.triton, "enable_pdl") else {}


def compile_with_inductor(
    program: Program,
    inputs: Sequence[Any],
    config: dict[str, Any],
    inner_compile: Callable[..., Any] = compile_fx_inner,
    preparation: Preparation = UNPREPARED,
) -> Callable[..., Any]:
    """Inductor on the lowered graph; `config` patches its configuration for this compilation only.

    `inner_compile` stands where Inductor compiles what AOTAutograd made of the graph (inspection looks on there).
    """

    def compile_inner(*args: Any, **named: Any) -> Any:
        with preparation.within():
            return inner_compile(*args, **named)

    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.gm.recompile()
    _keep_static(program, inputs[len(program.placeholders) :])
    preparation.before()
    with torch.no_grad(), asked_once():
        function = compile_fx(program.gm, list(inputs), compile_inner, config_patches=_SETTINGS | config | _FIXED)
    assert callable(function)
    return function
