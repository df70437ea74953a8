"""Graphviz DOT: one graph of the last recorded stage, modules as clusters, quantized sites coloured by their error."""

from __future__ import annotations

from collections.abc import Iterator

from int8pass.inspect.facts import Facts, Node, Stage
from int8pass.inspect.text import FAIR, GOOD
from int8pass.inspect.text_parts import decibels
from int8pass.inspect.worst import UNKNOWN, loss

COLOURS = {"good": "#1a7f37", "fair": "#9a6700", "bad": "#cf222e", "": "#57606a"}
SKIPPED = {"constant", "getitem"}


def render(report: Facts, stage: str | None = None) -> str:
    """DOT text of a stage (default: the last) of every graph."""
    lines = ["digraph int8pass {", '  node [shape=box, fontname="monospace", fontsize=10];', "  compound=true;"]
    for shown in stages(report, stage):
        lines += _graph(report, shown)
    return "\n".join([*lines, "}", ""])


def stages(report: Facts, name: str | None) -> list[Stage]:
    """The stage of that name of every graph; without a name, each graph's last."""
    found: dict[int, Stage] = {}
    for stage in report.stages:
        if name is None or stage.name == name:
            found[stage.graph] = stage
    return list(found.values())


def level(value: float | None) -> str:
    """Good, fair or bad, as the terminal colours it; "" when not measured."""
    if value is None:
        return ""
    return "good" if value >= GOOD else "fair" if value >= FAIR else "bad"


def edges(stage: Stage) -> Iterator[tuple[str, str]]:
    """Between nodes that are shown, through those that are not; constants have none."""
    nodes = {node.name: node for node in stage.nodes}

    def origins(name: str) -> Iterator[str]:
        node = nodes[name]
        if node.op == "getitem":
            for inner in node.inputs:
                yield from origins(inner)
        elif node.op != "constant":
            yield name

    for node in stage.nodes:
        if node.op not in SKIPPED:
            for name in dict.fromkeys(origin for i in node.inputs for origin in origins(i)):
                yield name, node.name


def shown_nodes(stage: Stage) -> list[Node]:
    """The nodes that are drawn."""
    return [node for node in stage.nodes if node.op not in SKIPPED]


def _graph(report: Facts, stage: Stage) -> Iterator[str]:
    sites = {site.name: site for site in report.sites}
    by_module: dict[str, list[Node]] = {}
    for node in shown_nodes(stage):
        by_module.setdefault(node.module, []).append(node)
    for i, (module, nodes) in enumerate(by_module.items()):
        indent = "  "
        if module:
            yield f'  subgraph "cluster_{stage.graph}_{i}" {{ label={_quoted(module)}; fontsize=9; color="#d0d7de";'
            indent = "    "
        for node in nodes:
            site = sites.get(node.site)
            lines = [node.op, node.shape] + ([f"{decibels(loss(site))} dB"] if site and loss(site) < UNKNOWN else [])
            colour = COLOURS[level(loss(site))] if site and loss(site) < UNKNOWN else COLOURS[""]
            label = _quoted("\n".join(filter(None, lines)))
            yield f'{indent}"{stage.graph}_{node.name}" [label={label}, color="{colour}"];'
        if module:
            yield "  }"
    for source, target in edges(stage):
        yield f'  "{stage.graph}_{source}" -> "{stage.graph}_{target}";'


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


__all__ = ["COLOURS", "edges", "level", "render", "shown_nodes", "stages"]
