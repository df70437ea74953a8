"""The `torch.compile` backend, found by name through the entry point `torch_dynamo_backends`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from int8pass import pipeline
from int8pass.capture import Program, from_dynamo
from int8pass.errors import GradientError
from int8pass.graph.constants import Constant, Store
from int8pass.graph.rewrite import Edit
from int8pass.inspect import trace
from int8pass.lower import Compiled, compile_with_inductor, lift_constants, mark_placeholders, prepare
from int8pass.quantize import pack_rounded, pack_weight
from int8pass.recipe import Options
from int8pass.release import release_weights

# Packed weights of every live parameter, shared by all graphs of a process: recompiles, prefill and decode read the
# same int8 tensors. Keys are weak; the entry of a parameter goes with it.
_STORE = Store()
_COMPILED: weakref.WeakSet[Compiled] = weakref.WeakSet()


def int8(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph to int8. Called by `torch.compile(model, backend="int8", options=..., mode=...)`.

    Options: `recipe` (a preset name, a `Recipe`, or the path of one), `free_weights`, `quantize_head`, `mode` (as in
    torch.compile, which does not take mode and options together), `inductor` (Inductor settings for this compilation),
    and any field of `Scheme`.

    Raises (as torch's BackendCompilerFailed):
        OptionError: an unknown option, preset, mode or value.
        GradientError: gradients are enabled and an input requires one.
        CaptureError, WeightError, UnsupportedError: see `int8pass.errors`.
    """
    settings = Options.parse(options, mode)
    _refuse_gradients(example_inputs)
    preparation = prepare(example_inputs)
    program = from_dynamo(gm, example_inputs)
    facts = pipeline.to_portable(program, settings.recipe)
    results = _results(program)
    _output_overflow(program, facts.overflows)
    pipeline.to_lowered(program, facts)
    counts_overflow = _results(program) > results
    trace.emit(facts, settings.recipe)
    constants = lift_constants(program)
    mark_placeholders(program, gm)
    release = _releaser(constants, example_inputs) if settings.free_weights else None
    compiled = Compiled(program.placeholders, constants, _STORE, example_inputs, counts_overflow, release)
    compiled.function = compile_with_inductor(
        program, compiled.inputs(example_inputs), dict(settings.inductor), preparation=preparation
    )
    _COMPILED.add(compiled)
    return compiled


def _refuse_gradients(inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in inputs):
        raise GradientError(
            "int8pass compiles for inference, and gradients are enabled for this call. Call the model under "
            "torch.no_grad() or torch.inference_mode(), or call model.requires_grad_(False) first."
        )


def _results(program: Program) -> int:
    """How many values the graph returns."""
    return len(next(n for n in reversed(program.graph.nodes) if n.op == "output").args[0])


def _output_overflow(program: Program, overflows: list[fx.Node]) -> None:
    """Add the number of outlier columns that found no place, over all sites, as a last output of the graph. Later
    stages take those of sites out that have no columns on this device."""
    if not overflows:
        return
    output = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    edit = Edit(program)
    total = overflows[0]
    for more in overflows[1:]:  # a chain of additions is one kernel; a stack copies every number with one of its own
        total = edit.call(torch.ops.aten.add.Tensor, total, more, before=output)
    output.args = ((*output.args[0], total),)


def _releaser(constants: list[Constant], inputs: Sequence[Any]) -> Callable[[], None]:
    """What releases the parameters that the graph reads in packed form only."""
    direct = {c for c in constants if c.compute is None}
    packed = {p for c in constants for p in _packed_weights(c)}
    tensors = {p.label: inputs[p.position] for p in packed - direct if p.position is not None}
    return lambda: release_weights(tensors, _STORE)


def _packed_weights(constant: Constant) -> set[Constant]:
    """The 2-D weights that a constant replaces (not the norms and biases it was made with)."""
    if constant.compute in (pack_weight, pack_rounded):
        # The first: a smoothed weight is made from the weight and, after it, what its norm gives the vector.
        return set(constant.sources[0].parameters()[:1])
    return {p for source in constant.sources for p in _packed_weights(source)}


def packed_bytes(model: nn.Module) -> int:
    """Bytes of everything int8pass made from the parameters of `model`: int8 weights, scales, sums, float columns."""
    return _STORE.packed_bytes([*model.parameters()])


def outlier_overflow(model: nn.Module) -> int:
    """Outlier columns, summed over all calls of the graphs compiled for `model`, that exceeded the threshold but found
    the capacity full: they stayed in int8 and cost accuracy, no more. Reading it synchronizes with the device."""
    parameters = {id(p) for p in model.parameters()}
    return sum(c.overflow() for c in list(_COMPILED) if c.reads_any(parameters))
