"""Export: the graph that torch.compile would run, as an ONNX QDQ file for a named runtime, checked in that runtime.

    torch.export ─ capture ─ normalize ─ match ─ smooth ─ quantize ─ export ─ ONNX QDQ

Requires: a program in portable form. Ensures: an ONNX model in which every planned linear is a MatMul between two
DequantizeLinear, its weight int8 `[K, N]`, each named after the module it comes from; and, unless told otherwise, that
the runtime named as target runs every one of them in int8, with the numbers of the portable form.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from int8pass.errors import CaptureError, ExportError, OptionError, UnsupportedError
from int8pass.pipeline import Facts
from int8pass.recipe import Options, Recipe, Scheme
from int8pass.repack import to_portable
from int8pass.translate import OPSETS, quiet, to_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

    from int8pass.qdq.verify import Verification

Target = Literal["onnxruntime", "openvino", "tensorrt", "portable"]
TARGETS: tuple[str, ...] = get_args(Target)

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
        target: whose int8 kernels the graph is written for. "portable": one file for ONNX Runtime and OpenVINO.
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
            if target == "tensorrt" and (tiny := _tiny(facts)):
                chosen = chosen.override(tiny, keep=True)
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
                verification = verify_file(
                    written, target, _planned(facts), *_expected(exported, portable, args),
                    shortest=_shortest(model, exported, args) if _has_static(chosen) else None,
                )  # fmt: skip
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
        with quiet():
            return torch.export.export(
                model, positional, keywords, dynamic_shapes=dynamic_shapes, strict=False,
                # what torch cannot prove of a dynamic size is no reason to refuse it (strides of past keys and values)
                prefer_deferred_runtime_asserts_over_guards=True,
            )  # fmt: skip
    except Exception as error:
        reason = str(error).strip().split("\n\n")[0][:2000]
        raise CaptureError(f"torch.export cannot trace the model: {type(error).__name__}: {reason}") from error


def _arguments(args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(args, Mapping):
        return (), dict(args)
    return ((args,) if isinstance(args, Tensor) else tuple(args)), {}


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


def _has_static(recipe: Recipe) -> bool:
    """Whether a range of activations was calibrated: then it was for some lengths, and may not hold at others."""
    schemes = [recipe.scheme, *(site.scheme for site in recipe.sites.values() if site.scheme is not None)]
    return any(scheme.activations == "static" for scheme in schemes)


def _tiny(facts: Facts) -> list[str]:
    """Sites with a linear so small that TensorRT takes longer for it in int8 than in float."""
    from int8pass.qdq.traps import SMALLEST_TENSORRT

    return [s.name for s in facts.matches.sites if min(min(r.shape) for r in s.readers) < SMALLEST_TENSORRT]


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


def _shortest(model: nn.Module, exported: ExportedProgram, args: Any) -> tuple[list[Tensor], list[Tensor]] | None:
    """The example's inputs with every dynamic axis at its smallest size, and what the model computes from them.

    None where no axis is dynamic, or the model does not take sizes as small.
    """
    symbols = {s: 1 if r.lower <= 2 else int(r.lower) for s, r in exported.range_constraints.items()}  # 2: torch's own
    flat, spec = pytree.tree_flatten(copy.deepcopy(_arguments(args)))
    shapes = [n.meta["val"] for n in exported.graph.nodes if n.name in exported.graph_signature.user_inputs]
    short = [_cut(value, like, symbols) for value, like in zip(flat, shapes, strict=True)]
    if all(a is b for a, b in zip(flat, short)):
        return None
    inputs = [v.clone() for v in short if isinstance(v, Tensor)]
    positional, keywords = pytree.tree_unflatten(short, spec)
    try:
        found = model(*positional, **keywords)
    except (RuntimeError, ValueError, IndexError):
        return None
    return inputs, [v for v in pytree.tree_leaves(found) if isinstance(v, Tensor)]


def _cut(value: Any, like: Any, symbols: Mapping[Any, int]) -> Any:
    """The first entries of `value` along the axes that are symbols in `like`."""
    if not isinstance(value, Tensor) or not isinstance(like, Tensor):
        return value
    sizes: list[Any] = list(like.shape)
    for axis, size in enumerate(sizes):
        if isinstance(size, torch.SymInt):
            value = value.narrow(axis, 0, min(int(size.node.expr.xreplace(symbols)), value.shape[axis]))
    return value


__all__ = ["OPSETS", "TARGETS", "Export", "export_onnx"]
