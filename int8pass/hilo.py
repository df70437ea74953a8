"""On GPUs, columns found in every call become blocks of outliers, row by row: what runs there of LLM.int8().

Requires: fused ops. Ensures: every `…_dynamic` op whose result is read by int8 linears alone is a `…_hilo` one
(`lowering.ops.hilo`), its linears with it. Columns take a search over the whole input and a gather of weights, which on
one H100 added up to a half to the time of a step, and as much as the step itself where the largest were wanted, however
small; a block needs neither, never finds its place taken, and is chosen for its own row.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from int8pass.capture import Program
from int8pass.graph.pattern import op_name
from int8pass.graph.rewrite import Edit
from lowering.ops import hilo

aten = torch.ops.aten

DEVICES = frozenset({"cuda"})
"""Where it is done. On a CPU a second plane is a second product, and columns are cheap to find."""

THRESHOLD = 6.0
"""Beyond it a block has outliers where the columns were the largest of a call, whatever their size: as in LLM.int8()
(arXiv 2208.07339, section 3.2). Blocks that stand apart have some at any size."""

_QUANTIZE = {
    "split_quantize_dynamic": hilo.quantize_hilo,
    "norm_quantize_dynamic": hilo.norm_quantize_hilo,
    "add_norm_quantize_dynamic": hilo.add_norm_quantize_hilo,
    "act_mul_quantize_dynamic": hilo.act_mul_quantize_hilo,
}
_GATED = "gated_linear_quantize_dynamic"
_LINEARS = {"linear_w8a8", _GATED}
# Of a linear: codes, scale, zero point, weight, its scale and sum, bias, outliers, their weight, columns, dtype.
_OPERANDS, _FLOAT_COLUMNS, _LINEAR_ARGUMENTS = (0, 1, 2, 7, 9), 8, 11


def columns_to_blocks(program: Program, devices: Collection[str]) -> int:
    """Rewrite what can be, of inputs on `devices`; returns how many.

    `…_quantize_dynamic(x, R, t) ; linear_w8a8(codes, …, outliers, columns)` ⇒
    `…_quantize_hilo(x, t) ; linear_w8a8_hilo(codes, high, blocks, …)`
    """
    sources = _convertible(program, devices)
    edit = Edit(program)
    for source in sources:
        _convert(source, edit)
    if sources:
        program.graph.eliminate_dead_code()
        program.gm.recompile()
    return len(sources)


def _convertible(program: Program, devices: Collection[str]) -> list[fx.Node]:
    """The ops to rewrite, in graph order. A gated linear is one and reads one: it goes with its source or stays."""
    found = [n for n in program.graph.nodes if op_name(n) in {*_QUANTIZE, _GATED} and _takes(n, devices)]
    while True:
        rest = [n for n in found if all(_follows(reader, n, found) for reader in _readers(n)) and _led(n, found)]
        if len(rest) == len(found):
            return found
        found = rest


def _takes(node: fx.Node, devices: Collection[str]) -> bool:
    """On a device where it pays, of rows that fit."""
    element = _elements(node).get(0)
    codes = None if element is None else element.meta["val"]
    if not isinstance(codes, Tensor) or codes.device.type not in devices:
        return False
    width = codes.shape[-1]
    return isinstance(width, int) and width <= hilo.MAX_K


def _shift(node: fx.Node) -> int:
    """Results of an op before its codes: the sum with the residual, or none."""
    return 1 if op_name(node) == "add_norm_quantize_dynamic" else 0


def _elements(node: fx.Node) -> dict[int, fx.Node]:
    """`getitem` nodes by what they stand for: 0 codes, 1 scale, 2 zero point, 3 outliers, 4 columns, 5 overflow; -1
    the sum with the residual."""
    shift = _shift(node)
    return {int(u.args[1]) - shift: u for u in node.users if u.target is operator.getitem}  # type: ignore[arg-type]


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for index, element in _elements(node).items():
        if 0 <= index <= 4:
            yield from element.users


def _follows(reader: fx.Node, source: fx.Node, found: list[fx.Node]) -> bool:
    """Whether a reader is a linear of this source's codes and columns, and of nothing else of it."""
    name, elements = op_name(reader), _elements(source)
    if name not in _LINEARS or (name == _GATED and reader not in found):
        return False
    given = [reader.args[i] for i in _OPERANDS]
    asked = [elements.get(i) for i in (0, 1, 2, 3, 4)]
    if given[2] is None:  # symmetric: there is a zero point, and nobody reads it
        asked[2] = None
    own = set(elements.values())
    others = [a for i, a in enumerate(reader.args) if i not in _OPERANDS]
    return given == asked and reader.args[_FLOAT_COLUMNS] is None and not own & {a for a in others if _is_node(a)}


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)


def _led(node: fx.Node, found: list[fx.Node]) -> bool:
    """Whether the source of a gated linear's codes is rewritten too."""
    if op_name(node) != _GATED:
        return True
    codes = node.args[0]
    return isinstance(codes, fx.Node) and codes.target is operator.getitem and codes.args[0] in found


def _convert(source: fx.Node, edit: Edit) -> None:
    """One op, and the linears that read it, except for gated ones: they are sources of their own."""
    *rest, _, threshold, symmetric = source.args
    threshold = threshold or THRESHOLD
    if op_name(source) == _GATED:
        target, arguments = hilo.gated_linear_quantize_hilo.overload, _linear_arguments(source)
        arguments = (*arguments, rest[_LINEAR_ARGUMENTS])
    else:
        target, arguments = _QUANTIZE[op_name(source)].overload, tuple(rest)
    new = edit.call(target, *arguments, threshold, symmetric, before=source)
    shift = _shift(source)
    elements = _elements(source)
    readers = [r for r in dict.fromkeys(_readers(source)) if op_name(r) == "linear_w8a8"]
    for index, element in elements.items():
        # High halves are where the outliers were, blocks where their columns were.
        if index < 5:
            element.replace_all_uses_with(edit.element(new, index + shift))
        else:
            _forget(element)
    for reader in readers:
        linear = edit.call(hilo.linear_w8a8_hilo.overload, *_linear_arguments(reader), before=reader)
        reader.replace_all_uses_with(linear)
        edit.program.graph.erase_node(reader)


def _linear_arguments(node: fx.Node) -> tuple[Any, ...]:
    """Arguments of a hilo linear from those of a linear whose operands are replaced already."""
    codes, scale, zero, weight, weight_scale, weight_sum, bias, high, _, blocks, dtype = node.args[:_LINEAR_ARGUMENTS]
    return codes, scale, zero, high, blocks, weight, weight_scale, weight_sum, bias, dtype


def _forget(overflow: fx.Node) -> None:
    """No value overflows: take its count out of the sum that the graph returns."""
    for user in list(overflow.users):
        if user.target is aten.add.Tensor:
            left, right = user.args
            user.replace_all_uses_with(right if left is overflow else left)  # type: ignore[arg-type]
            user.graph.erase_node(user)
        elif user.op == "output":
            values = user.args[0]
            assert isinstance(values, (tuple, list))
            user.args = (tuple(v for v in values if v is not overflow),)
