"""What an inspection found, as plain frozen dataclasses: the collectors fill them, the renderers read them.

Report
├── settings                       what was in force
├── sites: SiteRow                 one per site
│   ├── errors: Errors             signal-to-noise ratios, dB
│   ├── channels: Channels         what every input channel looks like
│   └── histogram, curve           what the quantizer sees; error against α
├── refused: RefusedLinear         linears that stay as they are, and why
├── breaks                         where Dynamo left the graph
├── stages: Stage → Node           the graph after every stage
├── schemes: SchemePoint           error and latency of every scheme on this model
└── runtime: Ran                   what a runtime really executed

Units: bytes, seconds, decibels. SQNR is 10·log10(Σ y² / Σ (ŷ − y)²). `None` is "not measured".
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = 1
"""Of the JSON form; raised when a reader of this version could misread a file."""


@dataclass(frozen=True)
class Errors:
    """Signal-to-noise ratios of one site in dB; the larger the better."""

    weight: float | None = None
    """Of the (smoothed) weights, outlier columns that stay in float left out."""
    naive: float | None = None
    """Of the linears' results, int8 alone: no smoothing, no outlier columns, a static range replaced by the call's own;
    the input as in the original model."""
    smoothed: float | None = None
    """The same with the smoothing of the recipe."""
    final: float | None = None
    """The same with smoothing and outlier columns."""
    cumulative: float | None = None
    """Of the linears' results when everything before them is quantized too."""
    alone: float | None = None
    """Of the model's output when this site is the only one that is quantized."""


@dataclass(frozen=True)
class Channels:
    """Per input channel of a site. Wide sites pool neighbours: entry i is the largest of channels i·pool … +pool."""

    pool: int = 1
    x_before: tuple[float, ...] = ()
    """max over tokens of |X_j|; empty without data."""
    x_after: tuple[float, ...] = ()
    """The same after smoothing: what the quantizer reads."""
    w_before: tuple[float, ...] = ()
    """max over the site's linears of |W_j|."""
    w_after: tuple[float, ...] = ()
    above: tuple[tuple[int, float], ...] = ()
    """(channel, share of tokens with |x| ≥ 6.0) of every channel where that ever happens (LLM.int8(), section 4.1)."""


@dataclass(frozen=True)
class Histogram:
    """Values that enter the quantizer of a site, and the codes that leave it."""

    bound: float
    """Bins divide −bound … bound evenly."""
    counts: tuple[int, ...]
    codes: tuple[int, ...] = ()
    """How often each of the codes −128 … 127 occurs; empty for float activations."""
    clip: tuple[float, float] | None = None
    """What the lowest and highest codes stand for, averaged over tokens."""


@dataclass(frozen=True)
class SiteRow:
    """One site: a tensor and the linears that read it."""

    name: str
    producer: str
    linears: tuple[str, ...]
    shape: tuple[int, int]
    """(N of all linears together, K)"""
    scheme: str
    columns: int
    """Outlier columns that stay in float."""
    smoothing: str
    """"folded", "multiply", "" when the scheme asks for none or calibration found none better, or the reason why it
    could not be folded."""
    implementations: tuple[str, ...]
    source: str = ""
    """`file:line: code` of its first linear."""
    alpha: float | None = None
    """α of the smoothing, the site's own where calibration found one; None where smoothing has none."""
    smoothed_channels: int = 0
    """Channels whose smoothing factor is not 1."""
    outlier_columns: tuple[int, ...] = ()
    """Fixed columns; empty where they are chosen in every call."""
    absmax: tuple[float, float] | None = None
    """max |X| (before, after smoothing)"""
    spread: tuple[float, float] | None = None
    """Largest channel absmax over the median one (before, after smoothing)"""
    errors: Errors = Errors()
    bytes: tuple[int, int] = (0, 0)
    """Of the weights and what belongs to them (before, after)"""
    seconds: tuple[float, float] | None = None
    """Of the site's nodes, run one by one (before, after)"""
    tokens: int = 0
    """That the numbers were measured on."""
    channels: Channels | None = None
    histogram: Histogram | None = None
    curve: tuple[tuple[float, float], ...] = ()
    """(α, SQNR in dB) on a sample of tokens, int8 per token and per channel."""
    graph: int = 0
    """Which of Dynamo's graphs it was found in."""
    fixes: tuple[tuple[str, float, str], ...] = ()
    """(what could be changed, local SQNR it would give, the fields of `Scheme` that do it, as Python)"""


@dataclass(frozen=True)
class RefusedLinear:
    """One linear that was not taken."""

    linear: str
    reason: str
    source: str
    """`file:line: code` in the user's model; "" when unknown."""
    asked: bool = False
    """The settings ask for it: no fallback."""


@dataclass(frozen=True)
class Node:
    """One node of a graph."""

    name: str
    op: str
    """ATen's or our name of a call; "input", "constant", "output"."""
    inputs: tuple[str, ...]
    shape: str
    module: str
    """Dotted path of the module it comes from."""
    source: int
    """Index into `Report.sources`; −1 when unknown."""
    code: str
    site: str = ""
    implementation: str = ""


@dataclass(frozen=True)
class Stage:
    """A graph after one stage of the pipeline."""

    name: str
    graph: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class SchemePoint:
    """One scheme on the whole model."""

    name: str
    sqnr: float
    """Of the model's output, dB."""
    seconds: float
    """Of one run, node by node; `Report.settings["seconds, original"]` is the same for the original."""
    bytes: int
    """Of the quantized weights."""


@dataclass(frozen=True)
class Ran:
    """One row of what really ran."""

    name: str
    op: str
    implementation: str
    calls: int
    seconds: float
    bytes: int
    """Of its constants."""
    site: str = ""
    nodes: tuple[str, ...] = ()
    """Of the fused graph (`Node.name`) that it computes; empty when unknown."""


@dataclass(frozen=True)
class Facts:
    """Everything an inspection found; `Report` adds how to show it."""

    recipe: str
    """The settings in force, one line."""
    graphs: int
    sites: tuple[SiteRow, ...]
    refused: tuple[RefusedLinear, ...]
    rules: Mapping[str, int] = field(default_factory=dict)
    """Rule name → how often it applied."""
    settings: Mapping[str, str] = field(default_factory=dict)
    breaks: tuple[str, ...] = ()
    """Why Dynamo broke the graph, and where."""
    stages: tuple[Stage, ...] = ()
    sources: tuple[str, ...] = ()
    """Source lines that nodes refer to."""
    schemes: tuple[SchemePoint, ...] = ()
    runtime: tuple[Ran, ...] = ()
    runtime_note: str = ""
    """How `runtime` was measured."""
    output_sqnr: float | None = None
    """Of the quantized model's output, dB."""


def to_plain(value: Any) -> Any:
    """Dataclasses → dictionaries, tuples → lists, recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def from_plain(kind: Any, value: Any) -> Any:
    """The inverse of `to_plain` for a type made of dataclasses, tuples, mappings, optionals and plain values.

    Raises:
        TypeError, KeyError: `value` has another shape.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in arguments if a is not type(None))
        return None if value is None else from_plain(inner, value)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return tuple(from_plain(arguments[0], v) for v in value)
        return tuple(from_plain(a, v) for a, v in zip(arguments, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return {k: from_plain(arguments[1], v) for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        given = {name: from_plain(hints[name], v) for name, v in value.items()}  # KeyError names an unknown field
        return kind(**given)  # type: ignore[operator]
    if kind is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value
