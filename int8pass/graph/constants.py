"""Tensors that depend on parameters only: what they are, and the store that computes each of them once.

A graph reads constants through `get_attr` nodes. A constant is either a parameter of the user's model or derived from
others by a pure function (an int8 weight, its scale, a transposed Conv1D weight). Stages derive constants on fake
tensors only; `Store` computes the real values at the end, once per parameter (identity and version), and shares them
between all graphs of a model (prefill and decode, recompiles).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from int8pass.errors import WeightError

Compute = Callable[..., Any]


@dataclass(frozen=True)
class Constant:
    """A tensor a graph reads that is no input of the call.

    `label` is for people (the parameter's path). A parameter has a `position` among the inputs of its graph; a derived
    constant has `compute(*sources, *options)`, of whose result it is the element `output` (None: the whole).
    """

    label: str
    position: int | None = None
    compute: Compute | None = None
    sources: tuple[Constant, ...] = ()
    options: tuple[Any, ...] = ()
    output: int | None = None

    def parameters(self) -> tuple[Constant, ...]:
        """The parameters this constant is made from, in order, each once."""
        if self.compute is None:
            return (self,)
        found = dict.fromkeys(p for source in self.sources for p in source.parameters())
        return tuple(found)

    def recipe(self) -> tuple[Any, ...]:
        """How the value follows from the parameters, without naming them: equal recipes and parameters, equal value."""
        if self.compute is None:
            return ("parameter",)
        sources = tuple((source.recipe(), source.output) for source in self.sources)
        return (self.compute.__module__, self.compute.__qualname__, self.options, sources)


class Fixed:
    """A tensor that is no parameter (the model wrote it into its code, or a recipe holds it), hashable by identity to
    be an option."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fixed) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def fixed_value(fixed: Fixed) -> Tensor:
    """The tensor of a `Fixed` option."""
    return fixed.value


class Constants:
    """The constants of one graph: attribute name → constant, with fake values for the stages to look at."""

    def __init__(self, gm: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
        self._gm = gm
        self._fake_mode = fake_mode
        self._names: dict[str, Constant] = {}
        self._by_constant: dict[Constant, str] = {}

    def copy(self, gm: fx.GraphModule) -> Constants:
        """The same constants under the same names, for another graph that reads them."""
        copied = Constants(gm, self._fake_mode)
        for name, constant in self._names.items():
            copied._names[name], copied._by_constant[constant] = constant, name
            object.__setattr__(gm, name, getattr(self._gm, name))
        return copied

    def __getitem__(self, name: str) -> Constant:
        return self._names[name]

    def get(self, node: object) -> Constant | None:
        """The constant behind a `get_attr` node; None for any other node or value."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self._names.get(str(node.target))
        return None

    def used(self) -> dict[str, Constant]:
        """Attribute name → constant for every constant the graph still reads."""
        names = {str(n.target) for n in self._gm.graph.nodes if n.op == "get_attr"}
        return {name: constant for name, constant in self._names.items() if name in names}

    def add(self, constant: Constant, fake: Tensor) -> str:
        """Register under a fresh attribute name; adding an equal constant again returns the name it has."""
        if constant in self._by_constant:
            return self._by_constant[constant]
        stem = "".join(c if f"_{c}".isidentifier() else "_" for c in constant.label) or "constant"
        if not stem.isidentifier():  # parts of an nn.Sequential have numbers for names
            stem = f"constant_{stem}"
        name = f"{stem}_{len(self._names)}"
        self._names[name], self._by_constant[constant] = constant, name
        # A plain attribute while stages run: `graph.lint` wants it, nothing reads its data.
        object.__setattr__(self._gm, name, fake)
        return name

    def fake(self, constant: Constant) -> Tensor:
        """The fake value of a registered constant."""
        value = getattr(self._gm, self._by_constant[constant])
        assert isinstance(value, Tensor)
        return value

    def derive(
        self, label: str, compute: Compute, sources: Sequence[Constant], options: tuple[Any, ...] = ()
    ) -> list[Constant]:
        """Constants for every element of `compute(*sources, *options)` (one, when it returns a tensor)."""
        with torch.no_grad(), self._fake_mode, enable_python_dispatcher():
            result = compute(*(self.fake(source) for source in sources), *options)
        elements = result if isinstance(result, tuple) else (result,)
        derived = []
        for index, fake in enumerate(elements):
            output = index if isinstance(result, tuple) else None
            constant = Constant(f"{label}_{index}" if index else label, None, compute, tuple(sources), options, output)
            self.add(constant, fake)
            derived.append(constant)
        return derived

    def node(self, constant: Constant, before: fx.Node) -> fx.Node:
        """A `get_attr` node for a registered constant, inserted at the head of the graph once and reused."""
        name = self._by_constant[constant]
        for node in self._gm.graph.find_nodes(op="get_attr", target=name):
            return node
        first = next(n for n in self._gm.graph.nodes if n.op != "placeholder")
        with self._gm.graph.inserting_before(first):
            node = self._gm.graph.create_node("get_attr", name)
        node.meta["val"] = self.fake(constant)
        return node


def tensor_on(values: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A 1-D tensor made of options of a derived constant: fake in fake mode, as `torch.tensor` is not on meta."""
    return torch.tensor(values, dtype=dtype).to(device)


@dataclass
class _Packed:
    """Computed values of one recipe on one set of parameters."""

    versions: tuple[int, ...]
    others: tuple[weakref.ref[Tensor], ...]
    value: Any


def version(tensor: Tensor) -> int:
    """The in-place version of a tensor; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


def _is_finite(tensor: Tensor) -> bool:
    """True without NaN and Inf: both show in the extremes, which one pass finds without a tensor of its own."""
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in map(float, tensor.detach().aminmax()))


class Store:
    """Real values of derived constants, computed once per parameter and shared by every graph that needs them.

    Values live as long as the first parameter they are made from. A parameter written in place (another version) gives
    a new value and drops the old one.
    """

    def __init__(self) -> None:
        self._values: torch.utils.weak.WeakTensorKeyDictionary = torch.utils.weak.WeakTensorKeyDictionary()
        self._released: torch.utils.weak.WeakTensorKeyDictionary = torch.utils.weak.WeakTensorKeyDictionary()

    def value(self, constant: Constant, parameters: Callable[[Constant], Tensor]) -> Tensor:
        """The real tensor of `constant`; `parameters` gives the tensor of a parameter.

        Raises:
            WeightError: a source holds NaN or Inf, is on the meta device, or was released and is needed again.
        """
        if constant.compute is None:
            return parameters(constant)
        result = self._group(constant, parameters, keep=True)
        return self._element(constant, result)

    @staticmethod
    def _element(constant: Constant, result: Any) -> Tensor:
        value = result if constant.output is None else result[constant.output]
        assert isinstance(value, Tensor)
        return value

    def _group(self, constant: Constant, parameters: Callable[[Constant], Tensor], keep: bool) -> Any:
        """The whole result of `constant.compute`; sources of what is kept are computed on the way and let go."""
        if constant.compute is None:
            tensor = parameters(constant)
            self._check(constant, tensor)  # here and not above: a source that is kept needs no parameter
            return tensor
        tensors = tuple(parameters(p) for p in constant.parameters())
        versions = tuple(version(t) for t in tensors)
        kept = self._values.setdefault(tensors[0], {}) if tensors else {}
        found = kept.get(constant.recipe())
        if found and found.versions == versions and all(r() is t for r, t in zip(found.others, tensors[1:])):
            return found.value
        sources = [self._element(s, self._group(s, parameters, keep=False)) for s in constant.sources]
        with torch.no_grad():
            result = constant.compute(*sources, *constant.options)
        if keep:
            kept[constant.recipe()] = _Packed(versions, tuple(weakref.ref(t) for t in tensors[1:]), result)
        return result

    def _check(self, parameter: Constant, tensor: Tensor) -> None:
        if self.is_released(tensor):
            raise WeightError(
                f"{parameter.label}: its original weight was released (free_weights) and is needed again, by a graph "
                "that packs it differently. Compile without free_weights, or reload the weight."
            )
        if tensor.device.type == "meta":
            raise WeightError(f"{parameter.label} is on the meta device and has no data; load its weights first.")
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise WeightError(f"{parameter.label} holds NaN or Inf; repair the weight or leave its site out.")

    def packed_bytes(self, parameters: Sequence[Tensor]) -> int:
        """Bytes of all values held for these parameters."""
        seen: dict[int, int] = {}
        for parameter in parameters:
            for packed in self._values.get(parameter, {}).values():
                for value in packed.value if isinstance(packed.value, tuple) else (packed.value,):
                    seen[value.data_ptr()] = value.numel() * value.element_size()
        return sum(seen.values())

    def mark_released(self, tensor: Tensor) -> None:
        """Remember that the data of `tensor` is gone; writing into it in place makes it usable again."""
        self._released[tensor] = version(tensor)

    def is_released(self, tensor: Tensor) -> bool:
        """True when the data was released and nothing was written into the tensor since."""
        return self._released.get(tensor) == version(tensor)
