"""Quantize: write the portable form.

Requires: sites and their schemes in a smoothed graph. Ensures: every linear of a site reads `dequantize(quantize(x))`
and `dequantize_weight(int8 weight)`, outlier columns go through `outlier_split` and a float linear of their own; all of
it plain PyTorch semantics that runs on any device and exports. Knows no device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from int8pass.capture import Program
from int8pass.errors import RecipeError
from int8pass.graph.constants import Fixed, fixed_value, tensor_on
from int8pass.graph.rewrite import Edit
from int8pass.match import Matches, Reader, Site
from int8pass.recipe import Recipe, Scheme
from lowering import numerics
from lowering.ops import quantize as ops

aten = torch.ops.aten


def pack_weight(weight: Tensor, columns: tuple[int, ...], group: int | None) -> tuple[Tensor, Tensor]:
    """`weight[N, K]` → int8 codes `[N, K]`, fp32 scales: `[N]`, or `[N, ceil(K / group)]` of groups of columns.

    The outlier columns are 0 in the codes and do not count in the scales. `group` None: one scale per output channel;
    0: one in all, repeated.
    """
    weight = weight.detach().float()
    if columns:
        weight = weight.index_fill(1, tensor_on(columns, torch.int64, weight.device), 0.0)
    if group is None:
        return numerics.quantize_weight(weight)
    return numerics.quantize_weight_groups(weight, group) if group else numerics.quantize_weight_per_tensor(weight)


def pack_rounded(weight: Tensor, columns: tuple[int, ...], group: int | None, codes: Fixed) -> tuple[Tensor, Tensor]:
    """`pack_weight` with codes `[N, K]` that calibration rounded (GPTQ), to the same scales."""
    own, scale = pack_weight(weight, columns, group)
    if isinstance(own, FakeTensor):  # only shapes are asked for
        return own, scale
    given = fixed_value(codes)
    if given.shape != own.shape:
        raise RecipeError(f"rounded codes of shape {tuple(given.shape)} for a weight of shape {tuple(own.shape)}")
    return given.to(own.device).contiguous(), scale


def outlier_weight(weight: Tensor, columns: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The columns `[N, R]` of the weight, in `dtype`: what multiplies the outliers."""
    index = tensor_on(columns, torch.int64, weight.device)
    return weight.detach().index_select(1, index).to(dtype).contiguous()


def index_tensor(columns: tuple[int, ...], device: str) -> Tensor:
    """Outlier columns as an int64 tensor."""
    return tensor_on(columns, torch.int64, device)


@dataclass(frozen=True)
class Quantized:
    """What happened to one site, for the report: the scheme in force (after the one-row rule) and its columns."""

    site: Site
    scheme: Scheme
    columns: int


def limits_tensor(limits: tuple[float, float], device: str) -> Tensor:
    """A calibrated range (low, high) as fp32 [2]."""
    return tensor_on(limits, torch.float32, device)


def quantize(program: Program, matches: Matches, recipe: Recipe) -> tuple[list[Quantized], list[fx.Node]]:
    """Rewrite every site; returns what was done and the nodes that count overflowing outlier columns."""
    check_fit(matches.sites, recipe)
    done: list[Quantized] = []
    overflows: list[fx.Node] = []
    for site in matches.sites:
        plan = _Plan(program, site, recipe)
        if plan.scheme.activations == "none":
            for reader in site.readers:
                _weight_only(plan, reader)
            done.append(Quantized(site, plan.scheme, 0))
            continue
        count, overflow = _site(plan)
        done.append(Quantized(site, plan.scheme, count))
        overflows += overflow
    # The counters have no reader yet: who wants them adds one before the next stage.
    counters = set(overflows)
    program.graph.eliminate_dead_code(lambda node: node in counters or node.is_impure())
    program.gm.recompile()
    return done, overflows


def check_fit(sites: Sequence[Site], recipe: Recipe) -> None:
    """A recipe whose calibrated sites are none of this graph's would be ignored without a word, and a site whose scheme
    needs what calibration finds, and that it never saw, would lose quality without one.

    Raises:
        RecipeError: naming the sites.
    """
    calibrated = [name for name, settings in recipe.sites.items() if settings.calibrated]
    names = [site.name for site in sites]
    if calibrated and names and not set(calibrated) & set(names):
        raise RecipeError(
            f"the recipe is for {some(calibrated)}, none of them in this graph ({some(names)}): it was made for "
            "another model, or this is a part of it, under other names"
        )
    lacking = {site.name: recipe.at(site.name).lacks() for site in sites}
    missing = [f"{name} ({what})" for name, what in lacking.items() if what]
    if missing:
        raise RecipeError(
            f"the recipe's scheme needs calibration, which it does not have for {some(missing)}: "
            "recipe = int8pass.calibrate(model, batches, recipe)"
        )
    for site in sites:
        columns = recipe.at(site.name).columns
        if columns and max(columns) >= site.width:
            raise RecipeError(
                f"site {site.name}: outlier column {max(columns)}, but the input has {site.width} channels: the recipe "
                "was made for another model"
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


class _Plan:
    """What is known of a site before its graph is written."""

    def __init__(self, program: Program, site: Site, recipe: Recipe) -> None:
        self.edit = Edit(program)
        self.site = site
        self.settings = recipe.at(site.name)
        self.scheme = scheme_for(site, recipe)
        self.columns = self.settings.columns if self.scheme.outliers == "static" else ()
        self.group = {"per_channel": None, "per_tensor": 0, "group": self.scheme.group_size}[self.scheme.weights]
        self._rounded = recipe.tensors if self.scheme.rounding == "gptq" else {}

    def weight(self, reader: Reader) -> fx.Node:
        """`dequantize_weight` of a reader's int8 weight."""
        before, dtype = reader.node, reader.node.meta["val"].dtype
        constant = self.edit.constant(before.args[1])  # not reader.weight: smoothing may have scaled it
        assert constant is not None
        label, options = f"{reader.path}.int8", (self.columns, self.group)
        if reader.path in self._rounded:
            codes, scale = self.edit.derive(
                label, pack_rounded, [constant], *options, Fixed(self._rounded[reader.path]), before=before
            )
        else:
            codes, scale = self.edit.derive(label, pack_weight, [constant], *options, before=before)
        if self.group:
            return self.edit.call(ops.dequantize_weight_groups.overload, codes, scale, self.group, dtype, before=before)
        return self.edit.call(ops.dequantize_weight.overload, codes, scale, dtype, before=before)

    def outlier_weight(self, reader: Reader) -> fx.Node:
        """The float columns of a reader's weight."""
        constant = self.edit.constant(reader.node.args[1])
        assert constant is not None
        dtype = reader.node.meta["val"].dtype
        label = f"{reader.path}.outliers"
        return self.edit.derive(label, outlier_weight, [constant], self.columns, dtype, before=reader.node)[0]

    def column_index(self, before: fx.Node) -> fx.Node:
        """The outlier columns as a constant."""
        device = str(before.meta["val"].device)
        return self.edit.derive("columns", index_tensor, [], self.columns, device, before=before)[0]


def _weight_only(plan: _Plan, reader: Reader) -> None:
    """`linear(x, W, b)` ⇒ `linear(x, dequantize_weight(W₈), b)`, plus the float columns if the weight has some"""
    edit, node = plan.edit, reader.node
    bias = [reader.bias] if reader.bias is not None else []
    result = edit.call(aten.linear.default, node.args[0], plan.weight(reader), *bias, before=node)
    if plan.columns:
        split = edit.call(ops.outlier_split.overload, node.args[0], plan.column_index(node), before=node)
        extra = edit.call(aten.linear.default, edit.element(split, 1), plan.outlier_weight(reader), before=node)
        result = edit.call(aten.add.Tensor, result, extra, before=node)
    node.replace_all_uses_with(result)
    edit.program.graph.erase_node(node)


def _site(plan: _Plan) -> tuple[int, list[fx.Node]]:
    """Quantize the source once; every reader reads the same codes. Returns the float columns and overflow counters."""
    edit, scheme, site = plan.edit, plan.scheme, plan.site
    first = min(reader.node for reader in site.readers)
    x = first.args[0]  # not site.source: when that was a linear of an earlier site, it has been replaced by now
    assert isinstance(x, fx.Node)
    inliers, outliers, chosen, overflow, count = x, None, None, [], 0
    if plan.columns:
        split = edit.call(ops.outlier_split.overload, x, plan.column_index(first), before=first)
        inliers, outliers, count = edit.element(split, 0), edit.element(split, 1), len(plan.columns)
    elif scheme.outliers in {"largest", "threshold"}:
        threshold = scheme.threshold if scheme.outliers == "threshold" else 0.0
        count = scheme.columns_for(site.width)
        split = edit.call(ops.outlier_split_dynamic.overload, x, count, threshold, before=first)
        inliers, outliers, chosen = (edit.element(split, i) for i in range(3))
        if threshold:
            overflow = [edit.element(split, 3)]
    codes, scale, zero = _codes(plan, inliers, first)
    back = edit.call(
        ops.dequantize.overload, codes, scale, None if scheme.symmetric else zero, x.meta["val"].dtype, before=first
    )
    for reader in site.readers:
        _reader(plan, reader, back, outliers, chosen)
    return count, overflow


def _codes(plan: _Plan, x: fx.Node, before: fx.Node) -> tuple[fx.Node, ...]:
    """Codes, scale and zero point of a site's inliers."""
    edit, symmetric = plan.edit, plan.scheme.symmetric
    if plan.scheme.activations == "per_token":
        quantized = edit.call(ops.quantize_per_token.overload, x, symmetric, before=before)
    else:
        limits = None
        if plan.scheme.activations == "per_tensor" and plan.scheme.ranged and plan.settings.limits is not None:
            # The range of a call within the calibrated one is the range of what is clamped to that.
            x = edit.call(aten.clamp.default, x, *plan.settings.limits, before=before)
        if plan.scheme.activations == "static":
            device = str(before.meta["val"].device)
            (limits,) = edit.derive("limits", limits_tensor, [], plan.settings.limits, device, before=before)
        quantized = edit.call(ops.quantize_per_tensor.overload, x, limits, symmetric, before=before)
    return tuple(edit.element(quantized, i) for i in range(3))


def _reader(plan: _Plan, reader: Reader, inliers: fx.Node, outliers: fx.Node | None, chosen: fx.Node | None) -> None:
    """`linear(x, W, b)` ⇒ `linear(x̂, Ŵ, b) + linear(outliers, W_outliers)`"""
    edit, node = plan.edit, reader.node
    weight = plan.weight(reader)
    bias = [reader.bias] if reader.bias is not None else []
    result = edit.call(aten.linear.default, inliers, weight, *bias, before=node)
    if outliers is not None:
        if chosen is None:
            part = plan.outlier_weight(reader)
        else:
            part = edit.call(aten.index_select.default, weight, 1, chosen, before=node)
        extra = edit.call(aten.linear.default, outliers, part, before=node)
        result = edit.call(aten.add.Tensor, result, extra, before=node)
    node.replace_all_uses_with(result)
    edit.program.graph.erase_node(node)


def some(names: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
