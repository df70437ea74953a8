"""Run a model through the pass with eager execution and collect the facts. Inspecting changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from int8pass import pipeline
from int8pass.capture import from_dynamo
from int8pass.errors import CaptureError
from int8pass.inspect.report import RefusedLinear, Report, SiteRow
from int8pass.pipeline import Facts
from int8pass.quantize import Quantized
from int8pass.recipe import PRESETS, Options, Recipe, Scheme


def inspect(
    model: nn.Module, args: Any, *, recipe: Recipe | str = "default", quantize_head: bool | None = None
) -> Report:
    """What `torch.compile(model, backend="int8")` does to `model` on `args`, site by site, refusal by refusal.

    Args:
        model: any module. It runs once, in its own precision; nothing of it is changed or kept.
        args: its inputs: a tensor, a tuple of positional or a dictionary of keyword arguments.
        recipe: preset name, `Recipe`, or path of a recipe file.
        quantize_head: overrides the recipe's.

    Raises:
        OptionError, RecipeError, CaptureError: as the backend would.
    """
    options: dict[str, Any] = {"recipe": recipe}
    if quantize_head is not None:
        options["quantize_head"] = quantize_head
    settings = Options.parse(options, None)
    collected: list[Facts] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, inputs)
        facts = pipeline.to_portable(program, settings.recipe)
        pipeline.to_lowered(program, facts)
        collected.append(facts)
        return gm.forward

    run(model, args, backend)
    if not collected:
        raise CaptureError("torch.compile found nothing to compile in this model (is compilation disabled for it?)")
    return _report(settings.recipe, collected)


def run(model: nn.Module, args: Any, backend: Callable[..., Any]) -> Any:
    """Call `model` once under a backend, without gradients and without touching what is compiled already."""
    compiled = torch.compile(model, backend=backend)
    # Past its limit of graphs per code object Dynamo runs eagerly without a word, and would show an empty model; many
    # models share code objects. Patched for this call only.
    limits = torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)
    with torch.no_grad(), limits:
        if isinstance(args, Mapping):
            return compiled(**args)
        return compiled(*((args,) if isinstance(args, Tensor) else args))


def _report(recipe: Recipe, graphs: Sequence[Facts]) -> Report:
    sites: dict[str, SiteRow] = {}
    refused: dict[str, RefusedLinear] = {}
    rules: Counter[str] = Counter()
    for facts in graphs:
        rules += facts.normalized.hits + facts.fused.hits
        for quantized in facts.quantized:
            sites.setdefault(quantized.site.name, _row(quantized, facts))
        for refusal in facts.matches.refusals:
            refused.setdefault(refusal.linear, RefusedLinear(refusal.linear, refusal.reason, refusal.source))
    return Report(describe(recipe), len(graphs), tuple(sites.values()), tuple(refused.values()), dict(rules))


def _row(quantized: Quantized, facts: Facts) -> SiteRow:
    site = quantized.site
    smoothing = facts.smoothing.reasons.get(site.name, "")
    if site.name in facts.smoothing.vectors:
        smoothing = "multiply" if smoothing else "folded"
    shapes = [reader.shape for reader in site.readers]
    kind = "linear_w8a16" if quantized.scheme.activations == "none" else "linear_w8a8"
    chosen = facts.implementations_of(kind)
    return SiteRow(
        site.name,
        site.producer,
        tuple(reader.path for reader in site.readers),
        (sum(n for n, _ in shapes), site.width),
        describe_scheme(quantized.scheme),
        quantized.columns,
        smoothing,
        chosen,
    )


def describe_scheme(scheme: Scheme) -> str:
    """One or two words per choice: `w8a8 affine, largest columns`."""
    if scheme.activations == "none":
        return "w8a16"
    columns = {"none": "", "largest": ", largest columns", "static": ", static columns"}
    outliers = columns.get(scheme.outliers, f", columns > {scheme.threshold:g}")
    ranges = {"per_tensor": ", per tensor", "static": ", static range"}.get(scheme.activations, "")
    weights = {"group": f", groups of {scheme.group_size}", "per_tensor": ", one weight scale"}.get(scheme.weights, "")
    return f"w8a8 {'symmetric' if scheme.symmetric else 'affine'}{ranges}{weights}{outliers}"


def describe(recipe: Recipe) -> str:
    """The recipe in one line: its preset if it is one, and the fields."""
    name = next((name for name, scheme in PRESETS.items() if scheme == recipe.scheme), "custom")
    extra = f", {len(recipe.sites)} sites with settings of their own" if recipe.sites else ""
    head = ", head quantized" if recipe.quantize_head else ""
    return f"{name} ({describe_scheme(recipe.scheme)}{head}{extra})"


__all__ = ["describe", "describe_scheme", "inspect", "run"]
