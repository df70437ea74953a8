"""Quantize: write the portable form.

Requires: sites, their schemes and smoothing vectors. Ensures: every linear of a site reads `dequantize(quantize(x))`
and `dequantize_weight(int8 weight)`, outlier columns go through `outlier_split` and a float linear of their own; all of
it plain PyTorch semantics that runs on any device and exports. Knows no device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from int8pass.capture import Program
from int8pass.errors import RecipeError
from int8pass.graph.constants import Constant
from int8pass.graph.rewrite import Edit
from int8pass.match import Matches, Reader, Site
from int8pass.recipe import Recipe, Scheme
from lowering import numerics
from lowering.ops import quantize as ops

aten = torch.ops.aten


def pack_weight(weight: Tensor, *smoothing_and_columns: object) -> tuple[Tensor, Tensor]:
    """`weight[N, K]` → int8 codes `[N, K]`, fp32 scales `[N]`.

    After it come: the smoothing vector s [K] (optional; the weight is multiplied by it), then the outlier columns as a
    tuple of indices: those are 0 in the codes and do not count in the scales.
    """
    *vectors, columns = smoothing_and_columns
    scaled = weight.detach().float()
    for s in vectors:
        assert isinstance(s, Tensor)
        scaled = scaled * s
    if columns:
        scaled = scaled.index_fill(1, torch.tensor(columns, device=weight.device), 0.0)
    return numerics.quantize_weight(scaled)


def outlier_weight(weight: Tensor, *smoothing_and_columns: object) -> Tensor:
    """The columns `[N, R]` of the weight (times s), in its own dtype: what multiplies the outliers."""
    *vectors, columns = smoothing_and_columns
    scaled = weight.detach()
    for s in vectors:
        assert isinstance(s, Tensor)
        scaled = (scaled.float() * s).to(weight.dtype)
    index = torch.tensor(columns, device=weight.device)
    return scaled.index_select(1, index).contiguous()


def index_tensor(columns: tuple[int, ...], device: str) -> Tensor:
    """Outlier columns as an int64 tensor."""
    return torch.tensor(columns, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Quantized:
    """What happened to one site, for the report: the scheme in force (after the one-row rule) and its columns."""

    site: Site
    scheme: Scheme
    columns: int


def quantize(
    program: Program, matches: Matches, recipe: Recipe, smoothing: Mapping[str, Constant]
) -> tuple[list[Quantized], list[fx.Node]]:
    """Rewrite every site; returns what was done and the nodes that count overflowing outlier columns."""
    _check_fit(matches, recipe)
    done: list[Quantized] = []
    overflows: list[fx.Node] = []
    for site in matches.sites:
        scheme = scheme_for(site, recipe)
        vector = smoothing.get(site.name)
        columns = recipe.at(site.name).columns if scheme.outliers == "static" else ()
        if columns and max(columns) >= site.width:
            raise RecipeError(f"site {site.name}: outlier column {max(columns)}, but the input has {site.width}")
        if scheme.activations == "none":
            for reader in site.readers:
                _weight_only(program, reader, vector, columns)
            done.append(Quantized(site, scheme, 0))
            continue
        count, overflow = _site(program, site, scheme, vector, columns)
        done.append(Quantized(site, scheme, count))
        overflows += overflow
    # The counters have no reader yet: who wants them adds one before the next stage.
    counters = set(overflows)
    program.graph.eliminate_dead_code(lambda node: node in counters or node.is_impure())
    program.gm.recompile()
    return done, overflows


def _check_fit(matches: Matches, recipe: Recipe) -> None:
    """A recipe whose calibrated sites are none of this graph's would be ignored without a word."""
    calibrated = [name for name, settings in recipe.sites.items() if settings.columns or settings.exponents]
    names = [site.name for site in matches.sites]
    if calibrated and names and not set(calibrated) & set(names):
        raise RecipeError(
            f"the recipe is for {calibrated[0]} and {len(calibrated) - 1} more sites, none of them in this graph "
            f"({names[0]}, …): it was made for another model, or this is a part of it, under other names"
        )


# Rows up to which reading the weights is what a linear does: int8 activations save nothing there, and the search for
# outlier columns costs. On an H100 16 rows with float activations take the time of 1.
_ROWS_BOUND_BY_WEIGHTS = {"cuda": 16}


def scheme_for(site: Site, recipe: Recipe) -> Scheme:
    """The scheme of a site in this graph: a single token (on GPUs a few) may keep float activations."""
    scheme = recipe.at(site.name).scheme
    assert scheme is not None
    value = site.source.meta["val"]
    rows = numerics.rows(value)
    few = rows is not None and 1 <= rows <= _ROWS_BOUND_BY_WEIGHTS.get(value.device.type, 1)
    if scheme.one_row == "weight_only" and few:
        return dataclasses.replace(scheme, activations="none")
    return scheme


def _pack(edit: Edit, reader: Reader, vector: Constant | None, columns: tuple[int, ...]) -> tuple[fx.Node, fx.Node]:
    """int8 codes and scales of a reader's weight."""
    sources = [reader.weight, *([vector] if vector else [])]
    codes, scale = edit.derive(f"{reader.path}.int8", pack_weight, sources, columns, before=reader.node)
    return codes, scale


def _outlier_weight(edit: Edit, reader: Reader, vector: Constant | None, columns: tuple[int, ...]) -> fx.Node:
    sources = [reader.weight, *([vector] if vector else [])]
    return edit.derive(f"{reader.path}.outliers", outlier_weight, sources, columns, before=reader.node)[0]


def _weight_only(program: Program, reader: Reader, vector: Constant | None, columns: tuple[int, ...]) -> None:
    """`linear(x, W, b)` ⇒ `linear(x, dequantize_weight(W₈), b)`, plus the float columns if the weight has some"""
    edit, node = Edit(program), reader.node
    dtype = node.meta["val"].dtype
    codes, scale = _pack(edit, reader, vector, columns)
    weight = edit.call(ops.dequantize_weight.overload, codes, scale, dtype, before=node)
    bias = [reader.bias] if reader.bias is not None else []
    result = edit.call(aten.linear.default, node.args[0], weight, *bias, before=node)
    if columns:
        split = edit.call(ops.outlier_split.overload, node.args[0], _columns(edit, columns, node), before=node)
        part = _outlier_weight(edit, reader, vector, columns)
        extra = edit.call(aten.linear.default, edit.element(split, 1), part, before=node)
        result = edit.call(aten.add.Tensor, result, extra, before=node)
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)


def _columns(edit: Edit, columns: tuple[int, ...], before: fx.Node) -> fx.Node:
    device = str(before.meta["val"].device)
    return edit.derive("columns", index_tensor, [], columns, device, before=before)[0]


def _site(
    program: Program, site: Site, scheme: Scheme, vector: Constant | None, columns: tuple[int, ...]
) -> tuple[int, list[fx.Node]]:
    """Quantize the source once; every reader reads the same codes. Returns the float columns and overflow counters."""
    edit = Edit(program)
    first = min(reader.node for reader in site.readers)
    x = first.args[0]  # not site.source: when that was a linear of an earlier site, it has been replaced by now
    assert isinstance(x, fx.Node)
    inliers, outliers, chosen, overflow, count = x, None, None, [], 0
    if scheme.outliers == "static" and columns:
        split = edit.call(ops.outlier_split.overload, x, _columns(edit, columns, first), before=first)
        inliers, outliers, count = edit.element(split, 0), edit.element(split, 1), len(columns)
    elif scheme.outliers in {"largest", "threshold"}:
        threshold = scheme.threshold if scheme.outliers == "threshold" else 0.0
        count = scheme.columns_for(site.width)
        split = edit.call(ops.outlier_split_dynamic.overload, x, count, threshold, before=first)
        inliers, outliers, chosen = (edit.element(split, i) for i in range(3))
        if threshold:
            overflow = [edit.element(split, 3)]
    quantized = edit.call(ops.quantize_per_token.overload, inliers, scheme.symmetric, before=first)
    codes, scale, zero = (edit.element(quantized, i) for i in range(3))
    back = edit.call(
        ops.dequantize.overload, codes, scale, None if scheme.symmetric else zero, x.meta["val"].dtype, before=first
    )
    for reader in site.readers:
        _reader(edit, reader, vector, columns, back, outliers, chosen)
    return count, overflow


def _reader(
    edit: Edit,
    reader: Reader,
    vector: Constant | None,
    columns: tuple[int, ...],
    inliers: fx.Node,
    outliers: fx.Node | None,
    chosen: fx.Node | None,
) -> None:
    """`linear(x, W, b)` ⇒ `linear(x̂, Ŵ, b) + linear(outliers, W_outliers)`"""
    node = reader.node
    dtype = node.meta["val"].dtype
    codes, scale = _pack(edit, reader, vector, columns)
    weight = edit.call(ops.dequantize_weight.overload, codes, scale, dtype, before=node)
    bias = [reader.bias] if reader.bias is not None else []
    result = edit.call(aten.linear.default, inliers, weight, *bias, before=node)
    if outliers is not None:
        if chosen is None:
            part = _outlier_weight(edit, reader, vector, columns)
        else:
            part = edit.call(aten.index_select.default, weight, 1, chosen, before=node)
        extra = edit.call(aten.linear.default, outliers, part, before=node)
        result = edit.call(aten.add.Tensor, result, extra, before=node)
    node.replace_all_uses_with(result)
    edit.program.graph.erase_node(node)
