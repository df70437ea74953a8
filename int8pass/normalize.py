"""Normalize: many spellings of one idea → one canonical op.

Requires: a captured program.
Ensures: no-op casts and views are gone; every product with a constant 2-D weight is `aten.linear` with the weight as
`[N, K]`; every RMS normalization over the last axis is `int8pass.rms_norm`; nothing else changed, and the function
computed is the same bit for bit in the order of its casts.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from int8pass.capture import Program, mutated_values
from int8pass.graph.pattern import Bind, Bindings, Cast, Pattern, add, call, mul, one_of, op_name, rsqrt, square
from int8pass.graph.rewrite import Edit, RewriteLog, Rule, apply_rules, same_layout
from lowering.ops.norm import rms_norm

aten = torch.ops.aten


def normalize(program: Program) -> RewriteLog:
    """Run all normalization rules; see the module docstring for what holds afterwards."""
    frozen = mutated_values(program.graph)

    def drop(node: fx.Node, edit: Edit) -> fx.Node | None:
        # Removing an alias of a value that is written in place would be right, but needs an order analysis to prove.
        return None if node in frozen or (node.args and node.args[0] in frozen) else drop_noop(node, edit)

    drop.__name__ = drop_noop.__name__
    norms: tuple[Rule, ...] = (raise_rms_norm, aten_rms_norm, fold_shift)
    rules: tuple[Rule, ...] = (drop, addmm_to_linear, matmul_to_linear, add_bias, *norms)
    return apply_rules(program, rules)


_NOOPS = {
    "to", "_to_copy", "type_as", "alias", "detach", "view", "reshape", "_unsafe_view", "expand", "contiguous", "slice",
    "squeeze", "flatten",
}  # fmt: skip


def drop_noop(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`to(x, dtype of x)`, `view(x, shape of x)`, `dropout(x, train=False)`, … ⇒ `x`"""
    name = op_name(node)
    if name == "dropout" and node.args[2] is False:
        return _node(node.args[0])
    if name not in _NOOPS or node.kwargs.get("copy") or (name == "to" and True in node.args[2:]):
        return None
    source = _node(node.args[0])
    if source is None or not isinstance(source.meta.get("val"), Tensor):
        return None
    return source if same_layout(source.meta["val"], node.meta["val"]) else None


def _node(value: object) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def transpose_weight(weight: Tensor) -> Tensor:
    """`[K, N]` → `[N, K]`, contiguous."""
    return weight.t().contiguous()


def _weight_as_nk(node: object, edit: Edit, before: fx.Node) -> fx.Node | None:
    """The constant second operand of a product, as the `[N, K]` weight of a linear; None when it is no constant."""
    if op_name(node) in {"t", "transpose", "permute", "numpy_T"} and isinstance(node, fx.Node):
        inner = node.args[0]
        if edit.constant(inner) is not None and isinstance(inner, fx.Node) and inner.meta["val"].dim() == 2:
            return inner
        return None
    constant = edit.constant(node)
    if constant is None or not isinstance(node, fx.Node) or node.meta["val"].dim() != 2:
        return None
    return edit.derive(f"{constant.label}.T", transpose_weight, [constant], before=before)[0]


def addmm_to_linear(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`addmm(b, x, W[K, N])` ⇒ `linear(x, Wᵀ, b)`"""
    if op_name(node) != "addmm" or any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return None
    bias, x, weight = node.args
    as_nk = _weight_as_nk(weight, edit, node)
    if as_nk is None or not isinstance(bias, fx.Node) or bias.meta["val"].dim() != 1:
        return None
    return edit.call(aten.linear.default, x, as_nk, bias, before=node)


def matmul_to_linear(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`x @ W[K, N]` or `x @ W[N, K]ᵀ` with constant W ⇒ `linear(x, W)`"""
    if op_name(node) not in {"mm", "matmul"}:
        return None
    x, weight = node.args
    as_nk = _weight_as_nk(weight, edit, node)
    if as_nk is None or not isinstance(x, fx.Node):
        return None
    return edit.call(aten.linear.default, x, as_nk, before=node)


def add_bias(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`linear(x, W) + b` with constant b[N], the linear read once ⇒ `linear(x, W, b)`"""
    found = add(Bind("linear"), Bind("bias")).match(node)
    if found is None:
        return None
    linear, bias = found["linear"], found["bias"]
    if op_name(linear) != "linear":
        linear, bias = bias, linear
    if op_name(linear) != "linear" or len(linear.args) > 2 or len(linear.users) != 1 or edit.constant(bias) is None:
        return None
    out = linear.meta["val"]
    if bias.meta["val"].shape != (out.shape[-1],) or bias.meta["val"].dtype != out.dtype:
        return None
    return edit.call(aten.linear.default, *linear.args, bias, before=node, like=linear)


def _rms_patterns() -> list[Pattern]:
    x, eps, gamma = Cast(Bind("x")), Bind("eps"), Bind("gamma")
    mean_square = call("mean", square(x), [-1], True)
    inverse = rsqrt(add(mean_square, eps))
    bare = one_of(mul(x, inverse), call("div", x, call("sqrt", add(mean_square, eps))))
    cast = Cast(bare, "norm_cast")
    weighted = mul(cast, Cast(gamma))
    shifted = mul(cast, one_of(add(Cast(gamma), 1), add(Cast(gamma), 1.0)))
    return [Cast(shifted, "cast"), Cast(weighted, "cast"), Cast(bare, "cast")]


_SHIFTED, _WEIGHTED, _BARE = _rms_patterns()


def raise_rms_norm(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`cast(cast(x · rsqrt(mean(x²) + ε)) · γ)` in every order of casts, γ or 1 + γ ⇒ `rms_norm(x, γ, ε, …)`"""
    if op_name(node) not in {"mul", "div", "to", "_to_copy", "type_as"} or not _is_last(node):
        return None
    for pattern, offset in ((_SHIFTED, 1.0), (_WEIGHTED, 0.0), (_BARE, 0.0)):
        found = pattern.match(node)
        if found is not None:
            arguments = _rms_arguments(node, found, offset, edit)
            if arguments is not None:
                return edit.call(rms_norm.overload, *arguments, before=node)
    return None


def _is_last(node: fx.Node) -> bool:
    """False when a longer match starts at the only user: γ or the closing cast must not be left outside."""
    if len(node.users) != 1:
        return True
    (user,) = node.users
    return not any(p.match(user) is not None for p in (_SHIFTED, _WEIGHTED, _BARE))


def _rms_arguments(node: fx.Node, found: Bindings, offset: float, edit: Edit) -> tuple[object, ...] | None:
    """Arguments of `rms_norm` when the cast order of the match is one that it can say; else None."""
    x, gamma, eps = found["x"], found.get("gamma"), found["eps"]
    if not isinstance(x, fx.Node) or not isinstance(eps, (int, float)):
        return None
    dtype = x.meta["val"].dtype
    if node.meta["val"].dtype != dtype or not dtype.is_floating_point or dtype == torch.float64:
        return None
    if dtype != torch.float32 and not _computes_in_fp32(node):
        return None
    if gamma is None:
        return (x, None, float(eps), 0.0, False)
    if edit.constant(gamma) is None or gamma.meta["val"].shape != x.meta["val"].shape[-1:]:
        return None
    round_first = found["norm_cast"] == dtype and dtype != torch.float32
    if round_first and gamma.meta["val"].dtype != dtype:
        return None  # the product would be fp32 there and is not in the op
    return (x, gamma, float(eps), offset, round_first)


def _computes_in_fp32(node: fx.Node) -> bool:
    """True when the mean of squares under a matched norm is fp32; a norm in bf16 throughout stays as it is."""
    seen, todo = set(), [node]
    while todo:
        current = todo.pop()
        if op_name(current) == "mean":
            return bool(current.meta["val"].dtype == torch.float32)
        if current not in seen:
            seen.add(current)
            todo.extend(current.all_input_nodes)
    return False


def aten_rms_norm(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`aten.rms_norm(x, [K], γ, ε)` ⇒ `rms_norm(x, γ, ε, 0, round_first=False)`"""
    if op_name(node) != "rms_norm" or node.target is not aten.rms_norm.default:
        return None
    x, shape, gamma, eps = (*node.args, None, None)[:4]
    assert isinstance(x, fx.Node)
    assert isinstance(shape, (list, tuple))
    value = x.meta["val"]
    if len(shape) != 1 or value.dtype == torch.float64 or node.meta["val"].dtype != value.dtype:
        return None
    # ATen's default is that of the dtype it computes in.
    epsilon = torch.finfo(torch.float32).eps if eps is None else eps
    return edit.call(rms_norm.overload, x, gamma, epsilon, 0.0, False, before=node)


def plus(vector: Tensor, number: float) -> Tensor:
    """`vector + number`."""
    return vector + number


def fold_shift(node: fx.Node, edit: Edit) -> fx.Node | None:
    """`w + 1` of a constant vector ⇒ a constant: the gamma of LayerNorms that store w = γ - 1"""
    if op_name(node) != "add" or node.kwargs or len(node.args) != 2:
        return None
    vector, number = node.args
    constant = edit.constant(vector)
    if constant is None or not isinstance(number, (int, float)) or node.meta["val"].dim() != 1:
        return None
    return edit.derive(f"{constant.label}+{number}", plus, [constant], float(number), before=node)[0]
