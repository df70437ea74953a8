"""A program in portable form as an ExportedProgram again: its int8 linears one op each, packed weights its buffers.

Requires: a program that `capture.from_export` made. Ensures: an ExportedProgram with the inputs and outputs of the
original, every constant computed, named after the module it belongs to.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from int8pass import pipeline
from int8pass.capture import Program, from_export
from int8pass.errors import UnsupportedError
from int8pass.fuse import fuse_linears
from int8pass.graph.constants import Constant, Store
from int8pass.graph.pattern import op_name
from int8pass.masks import simplify_masks
from int8pass.match import module_path, source_line
from int8pass.pipeline import Facts
from int8pass.quantize import pack_rounded, pack_weight
from int8pass.recipe import Recipe


def to_portable(exported: ExportedProgram, recipe: Recipe) -> tuple[ExportedProgram, Facts]:
    """The exported program in portable form, its int8 linears as one op each, with packed weights as its buffers.

    Raises:
        UnsupportedError: a linear to quantize computes in another dtype than float32.
    """
    program = from_export(exported)
    facts = pipeline.to_portable(program, recipe)
    fuse_linears(program)
    simplify_masks(program)
    _require_float32(program)
    _refuse_groups(program)
    return _repacked(exported, program), facts


def _require_float32(program: Program) -> None:
    for node in program.graph.nodes:
        if op_name(node) in {"linear_w8a8", "linear_w8a16"} and node.meta["val"].dtype != torch.float32:
            raise UnsupportedError(
                f"{module_path(node)} computes in {node.meta['val'].dtype} ({source_line(node)}). The int8 kernels of "
                "ONNX Runtime and OpenVINO on a CPU work with float32 around them, and leave other types unfused "
                "(trap T8): export model.float()."
            )


def _refuse_groups(program: Program) -> None:
    for node in program.graph.nodes:
        if op_name(node) == "linear" and op_name(node.args[1]) == "dequantize_weight_groups":
            raise UnsupportedError(
                f"{module_path(node)} ({source_line(node)}): group-wise weights have no int8 kernel in ONNX runtimes. "
                "ONNX Runtime fails when it runs them with quantized activations (trap T7) and multiplies in float "
                'without. Export recipe.override(weights="per_channel").'
            )


def _repacked(exported: ExportedProgram, program: Program) -> ExportedProgram:
    """`program` as an ExportedProgram: constants become buffers with real values, inputs and outputs stay."""
    specs = exported.graph_signature.input_specs
    tensors = {**exported.constants, **exported.state_dict}
    store = Store()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[InputSpec] = []
    state: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    names: dict[str, str] = {}
    for attribute, constant in program.constants.used().items():
        name = _unused(_name(constant), state)
        state[name] = store.value(constant, lambda p: tensors[specs[p.position].target])
        node = graph.placeholder(f"b_{attribute}")
        node.meta["val"] = getattr(program.gm, attribute)
        names[attribute] = node.name
        inputs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True))
    lifted = {node.name: node for node in graph.nodes}
    remaining = iter(program.placeholders)
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in names:
            copies[node] = lifted[names[str(node.target)]]
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node.op == "placeholder":
            spec = specs[next(remaining)]
            inputs.append(InputSpec(spec.kind, _renamed(spec.arg, copies[node]), spec.target, spec.persistent))
            if spec.target is not None:  # a tensor that is written in place, and so is no constant
                (kept if spec.target in exported.constants else state)[spec.target] = tensors[spec.target]
    results = graph.output_node().args[0]
    outputs = [
        OutputSpec(spec.kind, _renamed(spec.arg, result), spec.target)
        for spec, result in zip(exported.graph_signature.output_specs, results)  # type: ignore[arg-type]
    ]
    return ExportedProgram(
        root=_subgraphs(program),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints=exported.range_constraints,
        module_call_graph=[_flat_call(exported)],
        example_inputs=None,  # with them, torch guards against inputs of other containers
        constants=kept,
        verifiers=exported.verifiers,  # of the dialect in which ops may write in place; torch.onnx takes that out
    )


def _flat_call(exported: ExportedProgram) -> ModuleCallEntry:
    """A call with flat inputs and outputs: torch traces the program again for ONNX, and would make the user's
    containers in there (an empty key/value cache holds tensors, which it then misses among its constants)."""
    inputs = pytree.tree_structure((tuple(pytree.tree_leaves(exported.example_inputs)), {}))
    outputs = pytree.tree_structure([0] * len(exported.graph_signature.user_outputs))
    return ModuleCallEntry("", ModuleCallSignature([], [], inputs, outputs))


def _renamed(argument: Any, node: Any) -> Any:
    return TensorArgument(node.name) if isinstance(argument, TensorArgument) and isinstance(node, fx.Node) else argument


def _subgraphs(program: Program) -> nn.Module:
    root = nn.Module()
    for node in program.graph.nodes:
        if node.op == "get_attr" and program.constants.get(node) is None:
            setattr(root, str(node.target), getattr(program.gm, str(node.target)))
    return root


def _name(constant: Constant) -> str:
    """What a constant is called in the file: `layers.0.q_proj.weight_int8` and `…weight_scale` for a packed weight."""
    if constant.compute in (pack_weight, pack_rounded):
        path = constant.label.removesuffix("_1").removesuffix(".int8")
        return f"{path}.weight_scale" if constant.output else f"{path}.weight_int8"
    return constant.label


def _unused(name: str, taken: Mapping[str, object]) -> str:
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    return next(n for n in candidates if n not in taken)
