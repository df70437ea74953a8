"""Fuse: the portable form → few fused ops.

Requires: a program in portable form. Ensures: the same function with every `dequantize` and `dequantize_weight` of a
site gone into `linear_w8a8` / `linear_w8a16`; split and quantize in one op, with the norm, residual add or gate product
before them where one pass over the row can do all; linears that share an input merged. Chooses no kernels.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from int8pass.attention import fuse_attention
from int8pass.capture import Program, written_between
from int8pass.graph.pattern import Bind, Call, add, call, mul, one_of, op_name
from int8pass.graph.rewrite import Edit, RewriteLog, apply_rules
from lowering.ops import act as act_ops
from lowering.ops import linear as linear_ops
from lowering.ops import norm as norm_ops
from lowering.ops import quantize as quantize_ops

aten = torch.ops.aten


def fuse(program: Program) -> RewriteLog:
    """Run all fusion rules."""
    log = apply_rules(
        program,
        (
            fuse_outlier_linear, fuse_linear, fuse_outlier_group_linear, fuse_group_linear, fuse_weight_only,
            fuse_split_quantize, fuse_split_quantize_dynamic, fuse_norm, fuse_add_norm, fuse_gate_product,
            fuse_attention,
        ),
    )  # fmt: skip
    log.hits["merge_linears"] += merge_linears(program)
    log.hits += apply_rules(program, (fuse_gated_linear,)).hits
    return log


def fuse_linears(program: Program) -> RewriteLog:
    """Only what makes int8 linears one op each: for a target whose compiler fuses the rest by itself."""
    return apply_rules(program, (fuse_outlier_linear, fuse_linear, fuse_weight_only))


def column_sums(codes: Tensor) -> Tensor:
    """`Σ_k codes[n, k]` as int32 [N]: what corrects a zero point."""
    return codes.sum(1, dtype=torch.int32)


_WEIGHT = call("dequantize_weight", Bind("weight"), Bind("weight_scale"))
_INLIERS = call("dequantize", Bind("codes"), Bind("scale"), Bind("zero_point"), Bind("dtype"))
_PRODUCT = Call("linear", (_INLIERS, _WEIGHT))
_GROUP_WEIGHT = call(
    "dequantize_weight_groups", Bind("weight"), Bind("weight_scale"), Bind("group"), Bind("weight_dtype")
)
_GROUP_PRODUCT = Call("linear", (_INLIERS, _GROUP_WEIGHT), bind="linear")
_GROUP_WITH_OUTLIERS = add(_GROUP_PRODUCT, call("linear", Bind("outliers"), Bind("outlier_weight")))
_OUTLIERS = one_of(
    call("linear", Bind("outliers"), call("index_select", _WEIGHT, 1, Bind("columns"))),
    call("linear", Bind("outliers"), Bind("outlier_weight")),
)
_WITH_OUTLIERS = add(Call("linear", (_INLIERS, _WEIGHT), bind="linear"), _OUTLIERS)
_WEIGHT_ONLY = Call("linear", (Bind("x"), _WEIGHT))


def _bias(linear: fx.Node) -> object:
    return linear.args[2] if len(linear.args) > 2 else None


def _linear(node: fx.Node, edit: Edit, found: dict[str, fx.Node], bias: object, *outlier: object) -> fx.Node:
    """A `linear_w8a8` call in place of `node`."""
    sums = None
    if found["zero_point"] is not None:
        codes = edit.constant(found["weight"])
        assert codes is not None
        (sums,) = edit.derive(f"{codes.label}.sums", column_sums, [codes], before=node)
    arguments = [found[k] for k in ("codes", "scale", "zero_point", "weight", "weight_scale")]
    outliers = outlier or (None, None, None)
    dtype = node.meta["val"].dtype
    return edit.call(linear_ops.linear_w8a8.overload, *arguments, sums, bias, *outliers, dtype, before=node)


def _of_outliers(found: dict[str, fx.Node]) -> bool:
    """Whether what is added is the product of outlier columns, and of nothing else that a model adds."""
    if len(found["linear"].users) != 1:
        return False
    (product,) = (term for term in found["sum"].args[:2] if term is not found["linear"])
    splits = ("outlier_split", "outlier_split_dynamic")
    split = any(_element(found["outliers"], 1, name) is not None for name in splits)
    return split and len(product.args) == 2  # type: ignore[union-attr]


def fuse_outlier_linear(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`linear(dequantize(q), Ŵ, b) + linear(outliers, W_o)` ⇒ `linear_w8a8(q, …, outliers, W_o)`"""
    found = _WITH_OUTLIERS.match(node)
    if found is None or not _of_outliers(found | {"sum": node}):
        return None
    part = (found.get("outlier_weight"), found.get("columns"))
    return _linear(node, edit, found, _bias(found["linear"]), found["outliers"], *part)


def fuse_linear(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`linear(dequantize(q, s, z), dequantize_weight(W, w_s), b)` ⇒ `linear_w8a8(q, s, z, W, w_s, ΣW, b)`"""
    found = _PRODUCT.match(node)
    return _linear(node, edit, found, _bias(node)) if found else None


def _group_linear(node: fx.Node, edit: Edit, found: dict[str, fx.Node]) -> fx.Node:
    """A `linear_w8a8_groups` call in place of `node`."""
    arguments = [found[k] for k in ("codes", "scale", "zero_point", "weight", "weight_scale", "group")]
    outliers = (found.get("outliers"), found.get("outlier_weight"))
    target = linear_ops.linear_w8a8_groups.overload
    return edit.call(target, *arguments, _bias(found["linear"]), *outliers, node.meta["val"].dtype, before=node)


def fuse_outlier_group_linear(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`linear(dequantize(q), Ŵ of groups, b) + linear(outliers, W_o)` ⇒ `linear_w8a8_groups(q, …, outliers, W_o)`"""
    found = _GROUP_WITH_OUTLIERS.match(node)
    return None if found is None or not _of_outliers(found | {"sum": node}) else _group_linear(node, edit, found)


def fuse_group_linear(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`linear(dequantize(q), dequantize_weight_groups(W, w_s, g), b)` ⇒ `linear_w8a8_groups(q, W, w_s, g, b)`"""
    found = _GROUP_PRODUCT.match(node)
    return None if found is None else _group_linear(node, edit, found)


def fuse_weight_only(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`linear(x, dequantize_weight(W, w_s), b)` ⇒ `linear_w8a16(x, W, w_s, b)`"""
    found = _WEIGHT_ONLY.match(node)
    if found is None:
        return None
    arguments = (found["x"], found["weight"], found["weight_scale"], _bias(node))
    return edit.call(linear_ops.linear_w8a16.overload, *arguments, before=node)


def _element(node: object, index: int, name: str) -> fx.Node | None:
    """The call of `name` when `node` is its element `index`."""
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == index:
        source = node.args[0]
        return source if isinstance(source, fx.Node) and op_name(source) == name else None
    return None


def _index(element: fx.Node) -> int:
    """The index of a `getitem` node."""
    index = element.args[1]
    assert isinstance(index, int)
    return index


def _replace_elements(old: fx.Node, new: fx.Node, shift: int, edit: Edit) -> None:
    """Let every `old[i]` be `new[i + shift]`."""
    for user in list(old.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(edit.element(new, _index(user) + shift))


def _fuse_split(node: fx.Node, edit: Edit, split_name: str, fused: object) -> fx.Node | None:
    """`quantize_per_token(split(x, …)[0])` ⇒ one op: the elements of quantize, then those of split but the inliers."""
    if op_name(node) != "quantize_per_token":
        return None
    split = _element(node.args[0], 0, split_name)
    if split is None or len(node.args[0].users) != 1:  # type: ignore[union-attr]
        return None
    new = edit.call(fused, *split.args, node.args[1], before=split)
    _replace_elements(node, new, 0, edit)
    for user in list(split.users):
        if user.target is operator.getitem and _index(user) != 0:
            user.replace_all_uses_with(edit.element(new, _index(user) + 2))
    return new


def fuse_split_quantize(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`quantize_per_token(outlier_split(x, c)[0])` ⇒ `split_quantize(x, c)`"""
    return _fuse_split(node, edit, "outlier_split", quantize_ops.split_quantize.overload)


def fuse_split_quantize_dynamic(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`quantize_per_token(outlier_split_dynamic(x, R, t)[0])` ⇒ `split_quantize_dynamic(x, R, t)`"""
    return _fuse_split(node, edit, "outlier_split_dynamic", quantize_ops.split_quantize_dynamic.overload)


_QUANTIZES = {"quantize_per_token", "split_quantize", "split_quantize_dynamic"}


def _quantize_arguments(node: fx.Node) -> tuple[bool, tuple[object, ...]]:
    """Of a quantize: whether it finds its columns itself, and its arguments after the input (columns first)."""
    if op_name(node) == "quantize_per_token":
        return False, (None, node.args[1])
    return op_name(node) == "split_quantize_dynamic", node.args[1:]


def fuse_norm(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`quantize(norm(x))`, the norm read by nothing else ⇒ `norm_quantize(x)` or `norm_quantize_dynamic(x)`"""
    if op_name(node) not in _QUANTIZES:
        return None
    norm = node.args[0]
    if op_name(norm) not in {"rms_norm", "layer_norm"} or len(norm.users) != 1:  # type: ignore[union-attr]
        return None
    assert isinstance(norm, fx.Node)
    if written_between(norm, node):
        return None
    if op_name(norm) == "rms_norm":
        x, gamma, eps, offset, round_first = norm.args
        arguments: tuple[object, ...] = (x, gamma, None, eps, offset, "rms_round_first" if round_first else "rms")
    else:
        defaults = (None, None, None, None, 1e-5)  # of aten.layer_norm
        x, shape, gamma, beta, eps = (*norm.args, *defaults[len(norm.args) :])[:5]
        if len(shape) != 1:  # type: ignore[arg-type]
            return None
        arguments = (x, gamma, beta, eps, 0.0, "layer")
    dynamic, rest = _quantize_arguments(node)
    fused = norm_ops.norm_quantize_dynamic if dynamic else norm_ops.norm_quantize
    new = edit.call(fused.overload, *arguments, *rest, before=node)
    _replace_elements(node, new, 0, edit)
    return new


_WITH_ADD = {"norm_quantize": norm_ops.add_norm_quantize, "norm_quantize_dynamic": norm_ops.add_norm_quantize_dynamic}


def fuse_add_norm(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`norm_quantize(x + residual)` ⇒ `add_norm_quantize(x, residual)`, the sum being its first element"""
    fused = _WITH_ADD.get(op_name(node))
    if fused is None or op_name(node.args[0]) != "add":
        return None
    total = node.args[0]
    assert isinstance(total, fx.Node)
    a, b = total.args
    if total.kwargs or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    values = [n.meta["val"] for n in (a, b, total)]
    if any(not isinstance(v, Tensor) or v.shape != values[2].shape or v.dtype != values[2].dtype for v in values):
        return None
    new = edit.call(fused.overload, a, b, *node.args[1:], before=total, like=node)
    _replace_elements(node, new, 1, edit)
    total.replace_all_uses_with(edit.element(new, 0))
    return new


GATE_ACTIVATIONS = ("silu", "gelu", "relu", "sigmoid")
"""Of the gates that are fused with the product they are a factor of."""
_ACT = one_of(*(Call(name, (Bind("gate"),), bind="act") for name in GATE_ACTIVATIONS))
_GATE_PRODUCT = mul(_ACT, Bind("up"))


def fuse_gate_product(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`quantize(act(gate) * up)`, the product read by nothing else ⇒ `act_mul_quantize(gate, up)`, or `…_dynamic`"""
    if op_name(node) not in _QUANTIZES:
        return None
    found = _GATE_PRODUCT.match(node.args[0])
    if found is None or len(node.args[0].users) != 1 or len(found["act"].users) != 1:  # type: ignore[union-attr]
        return None
    gate, up, activation = found["gate"], found["up"], found["act"]
    if (
        written_between(activation, node)
        or not isinstance(up, fx.Node)
        or gate.meta["val"].shape != up.meta["val"].shape
    ):
        return None
    name = op_name(activation)
    if name == "gelu" and activation.kwargs.get("approximate", (*activation.args, "none")[1]) == "tanh":
        name = "gelu_tanh"
    dynamic, rest = _quantize_arguments(node)
    fused = act_ops.act_mul_quantize_dynamic if dynamic else act_ops.act_mul_quantize
    new = edit.call(fused.overload, gate, up, name, *rest, before=node)
    _replace_elements(node, new, 0, edit)
    return new


_GATED = {
    "act_mul_quantize": act_ops.gated_linear_quantize,
    "act_mul_quantize_dynamic": act_ops.gated_linear_quantize_dynamic,
}


def fuse_gated_linear(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`act_mul_quantize` of the halves of one merged `linear_w8a8`, read by nothing else ⇒ `gated_linear_quantize`"""
    fused = _GATED.get(op_name(node))
    if fused is None:
        return None
    gate, up = node.args[:2]
    linear = gate.args[0] if op_name(gate) == "slice" else None  # type: ignore[union-attr]
    if op_name(linear) != "linear_w8a8" or op_name(up) != "slice" or up.args[0] is not linear:  # type: ignore[union-attr]
        return None
    assert isinstance(gate, fx.Node)
    assert isinstance(up, fx.Node)
    assert isinstance(linear, fx.Node)
    value = linear.meta["val"]
    half = value.shape[-1] // 2
    halves = (gate.args[1:], up.args[1:]) == ((-1, 0, half), (-1, half, 2 * half))
    if not halves or value.shape[-1] != 2 * half:
        return None
    if len(linear.users) != 2 or len(gate.users) != 1 or len(up.users) != 1:
        return None
    new = edit.call(fused.overload, *linear.args, *node.args[2:], before=node, like=linear)
    _replace_elements(node, new, 0, edit)
    return new


def concatenate(*tensors: Tensor) -> Tensor:
    """Rows of several weights (or scales, sums, biases) one after the other."""
    return torch.cat(tensors)


def merge_linears(program: Program) -> int:
    """Linears with one input, all constants and no two alike otherwise ⇒ one linear and views of its result."""
    edit, merged = Edit(program), 0
    groups: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in program.graph.nodes:
        key = _merge_key(node, edit)
        if key is not None:
            groups.setdefault(key, []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            _merge(edit, nodes)
            merged += 1
    program.graph.eliminate_dead_code()
    program.gm.recompile()
    return merged


# Argument positions that differ between merged linears: weight, scale, sums, bias (and float outlier weight).
_CODES = 3
_PARTS = {"linear_w8a8": (3, 4, 5, 6, 8), "linear_w8a8_groups": (3, 4, 6, 8), "linear_w8a16": (1, 2, 3)}


def _merge_key(node: fx.Node, edit: Edit) -> tuple[object, ...] | None:
    parts = _PARTS.get(op_name(node))
    if parts is None:
        return None
    shape: list[object] = [op_name(node)]
    for index, argument in enumerate(node.args):
        if index not in parts:
            shape.append(argument)
        elif argument is None or edit.constant(argument) is not None:
            shape.append(argument is None)
        else:
            return None
    return tuple(shape)


def _merge(edit: Edit, nodes: list[fx.Node]) -> None:
    first = nodes[0]
    parts = _PARTS[op_name(first)]
    arguments = list(first.args)
    for index in parts:
        column = [node.args[index] for node in nodes]
        if column[0] is None:
            continue
        constants = [c for c in map(edit.constant, column) if c]
        if constants[0].compute is column_sums:
            # Of the merged codes, which are kept, and not of the originals, which may have been released.
            constants = [c for c in (edit.constant(arguments[_CODES]),) if c]
            (arguments[index],) = edit.derive(f"{constants[0].label}.sums", column_sums, constants, before=first)
            continue
        label = "+".join(c.label for c in constants)
        (arguments[index],) = edit.derive(label, concatenate, constants, before=first)
    result = edit.call(first.target, *arguments, before=first)
    start = 0
    for node in nodes:
        width = int(node.meta["val"].shape[-1])
        view = edit.call(aten.slice.Tensor, result, -1, start, start + width, before=first, like=node)
        _views_to_reshapes(node)
        node.replace_all_uses_with(view)
        start += width


def _views_to_reshapes(node: fx.Node) -> None:
    """A slice of a merged result is not contiguous: a `view` of it becomes a `reshape` (a view where it can)."""
    for user in node.users:
        if user.target in (aten.view.default, aten._unsafe_view.default):
            user.target = aten.reshape.default
        if op_name(user) in {"view", "reshape", "transpose", "permute", "split", "chunk", "getitem", "slice"}:
            _views_to_reshapes(user)
