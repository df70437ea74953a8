"""Capture: a Dynamo graph or an ExportedProgram → one IR, pre-dispatch ATen.

Requires: a GraphModule from Dynamo inside its tracing context, or an ExportedProgram.
Ensures: a `Program` whose graph holds only ATen calls (`aten.linear`, `aten.layer_norm`, `aten.rms_norm` whole), whose
parameters and module buffers are constants (`get_attr`), and whose nodes carry fake values with symbolic shapes.
Never looks at weights' values.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import exc as dynamo_exc
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from int8pass.errors import CaptureError
from int8pass.graph.constants import Constant, Constants, Fixed, fixed_value
from int8pass.regions import in_plain_calls

# What a backend may raise and Dynamo swallows into eager execution (torch/_dynamo/exc.py): made loud below.
_SWALLOWED: tuple[type[Exception], ...] = tuple(dynamo_exc.exceptions_allowed_to_be_fallback)


@dataclass
class Program:
    """One captured graph on its way through the pipeline.

    `placeholders[i]` is the position, among the inputs the graph was captured with, of the i-th remaining placeholder.
    """

    gm: fx.GraphModule
    constants: Constants
    fake_mode: FakeTensorMode
    placeholders: list[int]
    origins: list[fx.Node] = field(default_factory=list)
    """Dynamo's placeholder of every captured input, whose source and metadata AOTAutograd asks for."""
    evaluated: dict[Any, Any] = field(default_factory=dict)
    """Fake results of our ops by the signature of their arguments (`graph.rewrite.Edit.evaluate`)."""

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def copy(self) -> Program:
        """The same program with a graph of its own: stages may change one and not the other."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        output, old = (next(n for n in reversed(g.nodes) if n.op == "output") for g in (graph, self.graph))
        output.meta.update(old.meta)
        gm = fx.GraphModule(self.gm, graph)
        gm._buffers.clear()  # constants are plain attributes, and the compiler looks for the source of a buffer
        constants, placeholders = self.constants.copy(gm), list(self.placeholders)
        return Program(gm, constants, self.fake_mode, placeholders, self.origins, self.evaluated)


def from_dynamo(gm: fx.GraphModule, inputs: Sequence[Any]) -> Program:
    """Retrace what Dynamo handed to the backend.

    Raises:
        CaptureError: retracing failed; these failures would otherwise become silent eager execution.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise CaptureError("no tracing context: use torch.compile(model, backend='int8'), not the backend by itself")
    fake_mode = context.fake_mode  # Dynamo's own: a fresh one would lose the symbolic sizes
    fakes = [_fake(v, context) if isinstance(v, Tensor) else v for v in inputs]
    try:
        plain = in_plain_calls(gm, fake_mode)
        with torch.no_grad(), fake_mode, enable_python_dispatcher(), preserve_node_meta():
            traced = make_fx(fx.Interpreter(plain).run, pre_dispatch=True)(*fakes)
    except _SWALLOWED as error:
        raise CaptureError(f"the model has an operation whose result depends on data: {error}") from error
    origins = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return _with_constants(traced, fake_mode, origins)


def _fake(tensor: Tensor, context: TracingContext) -> Tensor:
    """The fake tensor of an input with Dynamo's symbols, which are known by the source: views are not remembered."""
    assert context.fake_mode is not None
    known = context.tensor_to_context.get(tensor)
    source = getattr(known, "tensor_source", None)
    return context.fake_mode.from_tensor(tensor, symbolic_context=known, source=source)


def _with_constants(traced: fx.GraphModule, fake_mode: FakeTensorMode, origins: list[fx.Node]) -> Program:
    """Turn the placeholders of parameters and module buffers into constants."""
    constants = Constants(traced, fake_mode)
    mutated = mutated_values(traced.graph)
    remaining = []
    for position, (node, origin) in enumerate(zip(_placeholders(traced.graph), origins)):
        if not _is_static(origin) or node in mutated:
            remaining.append(position)
            continue
        constant = Constant(parameter_path(origin), position)
        _read_as_constant(node, constant, constants)
    _adopt_fixed(traced, constants)
    _reads_after_placeholders(traced.graph)
    traced.recompile()
    return Program(traced, constants, fake_mode, remaining, origins)


def _read_as_constant(placeholder: fx.Node, constant: Constant, constants: Constants) -> None:
    """Replace a placeholder by a `get_attr` of the constant it stands for."""
    graph = placeholder.graph
    name = constants.add(constant, placeholder.meta["val"])
    with graph.inserting_after(placeholder):
        read = graph.create_node("get_attr", name)
    read.meta["val"] = placeholder.meta["val"]
    placeholder.replace_all_uses_with(read)
    graph.erase_node(placeholder)


def _adopt_fixed(gm: fx.GraphModule, constants: Constants) -> None:
    """Tensors written in the model's code, which tracing left as attributes, become constants like the others."""
    found: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        if constants.get(node) is None:
            found.setdefault(str(node.target), []).append(node)
    for name, nodes in found.items():
        value = getattr(gm, name)
        if not isinstance(value, Tensor):
            continue  # a subgraph of a higher-order operator
        if isinstance(value, FakeTensor):
            raise CaptureError(
                "the model has an operation that tracing cannot follow, as a transform of torch.func other than vmap: "
                "what comes out of it is not computed in the graph"
            )
        constant = Constant(name, compute=fixed_value, options=(Fixed(value),))
        for node in nodes:
            node.target = constants.add(constant, node.meta["val"])
        delattr(gm, name)  # a buffer, of which AOTAutograd would look for the source


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def _reads_after_placeholders(graph: fx.Graph) -> None:
    placeholders = _placeholders(graph)
    for node in list(graph.nodes):
        if node.op == "get_attr" and placeholders and node < placeholders[-1]:
            placeholders[-1].append(node)


def _is_static(origin: fx.Node) -> bool:
    """A parameter or buffer of a module, as Dynamo marks it; a static KV cache is marked too but is no parameter."""
    value = origin.meta.get("example_value")
    if not isinstance(value, Tensor) or "_dynamo_static_input_type" not in origin.meta.get("tensor_dict", {}):
        return False
    return isinstance(value, torch.nn.Parameter) or "_buffers" in source_name(origin)


def source_name(origin: fx.Node) -> str:
    """Where Dynamo found an input, e.g. `L['self']._modules['fc']._parameters['weight']`; "" when unknown."""
    source = getattr(origin, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else str(name)  # a method until torch 2.11, a property later


def parameter_path(origin: fx.Node) -> str:
    """The dotted path of a parameter in its root module, from Dynamo's source: `layers.0.self_attn.q_proj.weight`."""
    # What Dynamo had to look up a second time it finds in the module's dictionary: `.__dict__['_modules']['fc']`.
    name = re.sub(r"\.__dict__\['(_modules|_parameters|_buffers)'\]", r".\1", source_name(origin).replace('"', "'"))
    parts = name.split("['")[1:]
    keys = [part.split("']")[0] for part in parts]
    # The first key is the local variable that holds the module ('self', 'fn').
    return ".".join(keys[1:]) or origin.name


def mutated_values(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value (or whose base, through views) is written in place somewhere in the graph."""
    mutated: set[fx.Node] = set()
    for node in graph.nodes:
        for value in _written_by(node):
            mutated.update(_view_chain(value))
    return mutated


def written_between(first: fx.Node, last: fx.Node, of: fx.Node | None = None) -> bool:
    """Whether a node from `first` to `last`, without these, writes in place: anything, or what `of` is a view of."""
    shared = None if of is None else set(_view_chain(of))
    node = first.next
    while node is not last and node.op != "root":
        if any(shared is None or shared.intersection(_view_chain(value)) for value in _written_by(node)):
            return True
        node = node.next
    return False


def _written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes in place."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    pairs = zip(node.args, node.target._schema.arguments)
    return [v for v, a in pairs if a.alias_info is not None and a.alias_info.is_write and isinstance(v, fx.Node)]


def _view_chain(node: fx.Node) -> list[fx.Node]:
    """`node` and the nodes it is a view of, as far as the schema tells."""
    chain = [node]
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        target = node.target
        aliases = target is operator.getitem or (
            isinstance(target, torch._ops.OpOverload)
            and target._schema.arguments
            and target._schema.arguments[0].alias_info is not None
        )
        if not aliases:
            break
        node = node.args[0]
        chain.append(node)
    return chain


def from_export(exported: torch.export.ExportedProgram) -> Program:
    """The same IR from torch.export: parameters and buffers become constants, inputs stay placeholders.

    Raises:
        CaptureError: a region computes under autocast.
    """
    lifted = exported.graph_signature
    inputs = {**lifted.inputs_to_parameters, **lifted.inputs_to_buffers, **lifted.inputs_to_lifted_tensor_constants}
    gm = fx.GraphModule(exported.graph_module, fx.Graph())
    gm.graph.output(gm.graph.graph_copy(exported.graph, {}))
    for node in gm.graph.find_nodes(op="get_attr"):
        setattr(gm, str(node.target), getattr(exported.graph_module, str(node.target)))
    values = (n.meta.get("val") for n in _placeholders(gm.graph))
    fake_mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    gm = in_plain_calls(gm, fake_mode)
    _drop_aliases(gm)
    nodes = _placeholders(gm.graph)
    constants = Constants(gm, fake_mode)
    mutated = mutated_values(gm.graph)
    remaining = []
    for position, node in enumerate(nodes):
        if node.name not in inputs or node in mutated:
            remaining.append(position)
            continue
        _read_as_constant(node, Constant(inputs[node.name], position), constants)
    _reads_after_placeholders(gm.graph)
    gm.recompile()
    return Program(gm, constants, fake_mode, remaining)


def _drop_aliases(gm: fx.GraphModule) -> None:
    """`detach_(x)`, `lift_fresh_copy(x)`, `cat([empty, x])` ⇒ `x`, assertions on dtypes ⇒ nothing.

    How torch.export writes tensors made in the model's code, casts, and the first step of a growing cache. Of what is
    written in place a copy stays one.
    """
    aten = torch.ops.aten
    names = {aten.detach_.default, aten.detach.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}
    mutated = mutated_values(gm.graph)
    for node in list(gm.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
            continue
        source = node.args[0] if node.target in names else None
        if node.target is aten.cat.default:
            parts = [part for part in node.args[0] if tuple(part.meta["val"].shape) != (0,)]
            source = parts[0] if len(parts) == 1 else None
        if source is None:
            continue
        if node.target in (aten.cat.default, aten.lift_fresh_copy.default) and not mutated.isdisjoint((node, source)):
            node.target, node.args, node.kwargs = aten.clone.default, (source,), {}
            continue
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
