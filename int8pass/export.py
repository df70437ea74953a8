"""Export: the graph that torch.compile would run, as an ONNX QDQ file for a named runtime, checked in that runtime.

    torch.export ─ capture ─ normalize ─ match ─ smooth ─ quantize ─ export ─ ONNX QDQ

Requires: a program in portable form. Ensures: an ONNX model in which every planned linear is a MatMul between two
DequantizeLinear, its weight int8 `[K, N]`, each named after the module it comes from; and, unless told otherwise, that
the runtime named as target runs every one of them in int8, with the numbers of the portable form.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from int8pass import pipeline
from int8pass.capture import Program, from_export
from int8pass.errors import CaptureError, ExportError, OptionError, UnsupportedError
from int8pass.fuse import fuse_linears
from int8pass.graph.constants import Constant, Store
from int8pass.graph.pattern import op_name
from int8pass.match import module_path, source_line
from int8pass.pipeline import Facts
from int8pass.quantize import pack_weight
from int8pass.recipe import Options, Recipe, Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

    from int8pass.qdq.verify import Verification

Target = Literal["onnxruntime", "openvino", "tensorrt", "portable"]
TARGETS: tuple[str, ...] = get_args(Target)

OPSETS = {"onnxruntime": 23, "openvino": 23, "tensorrt": 21, "portable": 21}
"""RMSNormalization and Attention are one node from 23 on; what reads a file of the other targets may be older."""

Progress = Callable[[str, int, int], None]
"""Called with (step, 0, 1) when a step begins and (step, 1, 1) when it has ended."""


@dataclass(frozen=True)
class Export:
    """An exported file, and how it was found to run."""

    path: Path
    target: str
    opset: int
    linears: tuple[str, ...]
    """Module paths of the linears in int8."""
    refused: Mapping[str, str]
    """Linears left in float → why."""
    verification: Verification | None
    """What the runtimes did with it; None when it was not verified."""

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {len(self.linears)} linears in int8, {len(self.refused)} left in float, "
            f"opset {self.opset}, for {self.target}"
        ]
        lines += [f"  left in float: {linear}: {reason}" for linear, reason in self.refused.items()]
        lines.append(str(self.verification) if self.verification else "  not verified")
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    args: Any,
    path: str | os.PathLike[str],
    *,
    recipe: Recipe | str | None = None,
    target: Target = "onnxruntime",
    dynamic_shapes: Any = None,
    verify: bool | Literal["warn"] = True,
    quantize_head: bool | None = None,
    progress: Progress = lambda *_: None,
) -> Export:
    """Write `model`, in int8 as `torch.compile(model, backend="int8")` runs it, to an ONNX file for a runtime.

    Args:
        model: any module torch.export takes, in float32. It is not changed.
        args: example inputs: a tensor, a tuple of positional or a dictionary of keyword arguments.
        path: the file to write. An existing one is replaced at the end, in one step; a failed export leaves it as it
            was. Above 1 GiB the weights go to `<path>.data` beside it.
        recipe: preset name, `Recipe` or path of a recipe file; None is the data-free default.
        target: whose int8 kernels the graph is written for. "portable": one file for ONNX Runtime and OpenVINO, at an
            opset that older readers take.
        dynamic_shapes: as for torch.export: per input, {axis: torch.export.Dim(...)}.
        verify: open the file in the target's runtime, and require that every planned linear runs as an int8 kernel
            and the numbers are those of the portable form in PyTorch. "warn" keeps a file that fails and warns.
        quantize_head: overrides the recipe's.
        progress: called as steps begin and end, see `Progress`.

    Raises:
        ExportError: the file cannot be written, or does not verify.
        UnsupportedError: an op or dtype that has no ONNX form here, by module and line; or a runtime is not installed.
        CaptureError: torch.export cannot trace the model.
        OptionError, RecipeError, WeightError: as the backend would.
    """
    if target not in TARGETS:
        raise OptionError(f"unknown target {target!r}; targets are {', '.join(TARGETS)}")
    if verify not in (True, False, "warn"):
        raise OptionError(f"verify must be True, False or 'warn', got {verify!r}")
    _require_packages()
    from int8pass.qdq import files
    from int8pass.qdq.verify import require_runtimes, verify_file

    options: dict[str, Any] = {"recipe": recipe if recipe is not None else "default"}
    if quantize_head is not None:
        options["quantize_head"] = quantize_head
    settings = Options.parse(options, None)
    if verify:
        require_runtimes(target)
    file = Path(path)
    with files.staged(file) as folder, torch.no_grad():
        with _step(progress, "capture"):
            exported = capture(model, args, dynamic_shapes)
        with _step(progress, "quantize"):
            chosen = for_target(settings.recipe, target)
            portable, facts = to_portable(exported, chosen)
        with _step(progress, "translate to ONNX"):
            onnx_model = to_onnx(portable, target)
            _describe(onnx_model, facts, chosen, target)
        with _step(progress, "write"):
            written = files.write(onnx_model, folder, file)
            del onnx_model
        verification = None
        if verify:
            with _step(progress, "verify"):
                verification = verify_file(written, target, _planned(facts), *_expected(exported, portable, args))
            if not verification.passed and verify != "warn":
                raise ExportError(f"{file} was not written, because it does not verify:\n{verification}")
        files.publish(written, file)
    if verification is not None and not verification.passed:
        warnings.warn(f"{file} was kept although it does not verify:\n{verification}", stacklevel=2)
    refused = {r.linear: r.reason for r in facts.matches.refusals}
    return Export(file, target, OPSETS[target], tuple(_planned(facts)), refused, verification)


def _planned(facts: Facts) -> list[str]:
    return [reader.path for site in facts.matches.sites for reader in site.readers]


@contextmanager
def _step(progress: Progress, title: str) -> Iterator[None]:
    progress(title, 0, 1)
    yield
    progress(title, 1, 1)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as missing:
        raise UnsupportedError(f"exporting needs {missing.name}: pip install 'int8pass[onnx]'") from missing


def capture(model: nn.Module, args: Any, dynamic_shapes: Any = None) -> ExportedProgram:
    """`torch.export` of the model on example inputs.

    Raises:
        CaptureError: it cannot trace the model; the message has torch's reason.
    """
    positional, keywords = _arguments(args)
    try:
        with _quiet():
            return torch.export.export(model, positional, keywords, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        reason = str(error).strip().split("\n\n")[0][:2000]
        raise CaptureError(f"torch.export cannot trace the model: {type(error).__name__}: {reason}") from error


def _arguments(args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(args, Mapping):
        return (), dict(args)
    return ((args,) if isinstance(args, Tensor) else tuple(args)), {}


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's own deprecations and remarks are none of the user's business."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "torchvision is not installed"
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.filterwarnings("ignore", category=category)
            yield
    finally:
        logger.setLevel(level)


def for_target(recipe: Recipe, target: str) -> Recipe:
    """The recipe as a target can run it: TensorRT's static activations have no zero point, so those sites become
    symmetric, over the same calibrated ranges."""
    if target != "tensorrt":
        return recipe
    symmetric = {
        name: dataclasses.replace(site, scheme=_symmetric(site.scheme)) if site.scheme else site
        for name, site in recipe.sites.items()
    }
    return dataclasses.replace(recipe, scheme=_symmetric(recipe.scheme), sites=MappingProxyType(symmetric))


def _symmetric(scheme: Scheme) -> Scheme:
    return dataclasses.replace(scheme, symmetric=True) if scheme.activations == "static" else scheme


def to_portable(exported: ExportedProgram, recipe: Recipe) -> tuple[ExportedProgram, Facts]:
    """The exported program in portable form, its int8 linears as one op each, with packed weights as its buffers.

    Raises:
        UnsupportedError: a linear to quantize computes in another dtype than float32.
    """
    program = from_export(exported)
    facts = pipeline.to_portable(program, recipe)
    fuse_linears(program)
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
    if constant.compute is pack_weight:
        path = constant.label.removesuffix("_1").removesuffix(".int8")
        return f"{path}.weight_scale" if constant.output else f"{path}.weight_int8"
    return constant.label


def _unused(name: str, taken: Mapping[str, object]) -> str:
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    return next(n for n in candidates if n not in taken)


def to_onnx(portable: ExportedProgram, target: str) -> ir.Model:
    """The ONNX model of a portable program, in the form the target's kernels are matched by.

    Raises:
        UnsupportedError: an op of the model has no ONNX translation in torch; names module and line.
    """
    import lowering.onnx
    from int8pass.qdq import rewrite

    opset = OPSETS[target]
    try:
        with _quiet():
            made = torch.onnx.export(
                portable,
                dynamo=True,
                opset_version=opset,
                custom_translation_table=lowering.onnx.translations(opset, target),
                optimize=False,  # below, after the weights are where they belong
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise _untranslated(portable, opset, error) from error
    assert made is not None
    tensors = [n for n in portable.graph.nodes if n.name in portable.graph_signature.user_inputs]
    for value, node in zip(made.model.graph.inputs, (n for n in tensors if isinstance(n.meta.get("val"), Tensor))):
        value.name = node.name
    rewrite.prepare(made.model, unsigned=target != "tensorrt")
    return made.model


def _untranslated(portable: ExportedProgram, opset: int, error: Exception) -> UnsupportedError:
    """Which node of the model has no translation, for people."""
    cause = _root(error)
    text = str(cause)
    named = re.search(r"op='\w+\.(\w+)'", text)  # perhaps what torch decomposed the model's op into
    for node in portable.graph.nodes:
        if named and op_name(node).endswith(named[1]):
            return UnsupportedError(
                f"{node.target} has no translation to ONNX opset {opset}: used by {module_path(node)} at "
                f"{source_line(node)}. Write that part with other ops, or export the model without it."
            )
    return UnsupportedError(f"torch.onnx cannot translate the model: {type(cause).__name__}: {text[:1000]}")


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _describe(model: ir.Model, facts: Facts, recipe: Recipe, target: str) -> None:
    """Metadata that says what made the file and what was planned; `int8pass lint` reads it."""
    from int8pass import __version__

    model.producer_name, model.producer_version = "int8pass", __version__
    model.graph.name = "int8pass"
    model.metadata_props.update(
        {
            "int8pass.target": target,
            "int8pass.linears": json.dumps(_planned(facts)),
            "int8pass.refused": json.dumps({r.linear: r.reason for r in facts.matches.refusals}),
            "int8pass.recipe": recipe.to_json(),
            "int8pass.versions": json.dumps({"int8pass": __version__, "torch": torch.__version__}),
        }
    )


def _expected(
    exported: ExportedProgram, portable: ExportedProgram, args: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The flat inputs of the file, and what the portable form and the original model compute from them in PyTorch."""
    flat = pytree.tree_leaves(copy.deepcopy(_arguments(args)))  # a cache would be written into
    found = portable.module(check_guards=False)(*flat)
    positional, keywords = copy.deepcopy(_arguments(args))
    original = exported.module(check_guards=False)(*positional, **keywords)
    inputs = [v for v in flat if isinstance(v, Tensor)]
    return inputs, *([v for v in pytree.tree_leaves(r) if isinstance(v, Tensor)] for r in (found, original))  # type: ignore[return-value]


__all__ = ["OPSETS", "TARGETS", "Export", "export_onnx"]
