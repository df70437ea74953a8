"""A picture of a stage: modules as boxes in layers, coloured by the error of their sites. No Graphviz is needed.

Layers are the generations of the module graph (networkx, which comes with torch). Calls between modules that run both
ways (an attention reads its projections and feeds another) are drawn once, downwards.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field

import networkx

from int8pass.inspect.dot import COLOURS, edges, level, shown_nodes, stages
from int8pass.inspect.facts import Facts, SiteRow, Stage
from int8pass.inspect.text_parts import decibels
from int8pass.inspect.worst import UNKNOWN, loss

_LETTER, _LINE, _GAP, _LAYER = 6.7, 15, 24, 34


@dataclass
class _Box:
    """A run of nodes of one module."""

    module: str
    ops: list[str] = field(default_factory=list)
    sites: dict[str, SiteRow] = field(default_factory=dict)
    x: float = 0.0
    y: float = 0.0

    @property
    def lines(self) -> list[str]:
        worst = min((loss(s) for s in self.sites.values()), default=UNKNOWN)
        counted = [f"{self.ops.count(op)}× {op}" if self.ops.count(op) > 1 else op for op in dict.fromkeys(self.ops)]
        shown = counted if len(counted) <= 6 else [*counted[:5], f"… {len(counted) - 5} more"]
        return [self.module or "(model)", *shown, *([f"{decibels(worst)} dB"] if worst < UNKNOWN else [])]

    @property
    def width(self) -> float:
        return max(len(line) for line in self.lines) * _LETTER + 16

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + 10


def render(report: Facts, stage: str | None = None) -> str:
    """SVG text of a stage (default: the last), every graph below the one before."""
    sites = {site.name: site for site in report.sites}
    parts, top, widest = list[str](), 10.0, 100.0
    for shown in stages(report, stage):
        drawn, width, height = _draw(shown, sites, top)
        parts += drawn
        top, widest = top + height + 40, max(widest, width)
    style = "text{font:11px monospace;fill:#1b1f24}path{fill:none;stroke:#8b949e}rect{fill:#f6f8fa}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{widest + 20:.0f}" height="{top:.0f}"'
        f' viewBox="0 0 {widest + 20:.0f} {top:.0f}"><style>{style}</style>'
        f'<rect width="100%" height="100%" style="fill:#fff"/>{"".join(parts)}</svg>\n'
    )


def _draw(stage: Stage, sites: Mapping[str, SiteRow], top: float) -> tuple[list[str], float, float]:
    """Elements of one graph, its width and its height."""
    boxes, home = _boxes(stage, sites)
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(boxes)))
    graph.add_edges_from((home[a], home[b]) for a, b in edges(stage) if home[a] < home[b])
    y, widest = top, 0.0
    for layer in networkx.topological_generations(graph):
        x = 10.0
        for i in sorted(layer):
            boxes[i].x, boxes[i].y = x, y
            x += boxes[i].width + _GAP
        widest = max(widest, x)
        y += max(boxes[i].height for i in layer) + _LAYER
    drawn = [_edge(boxes[a], boxes[b]) for a, b in graph.edges]
    return [*drawn, *map(_box, boxes)], widest, y - top


def _boxes(stage: Stage, sites: Mapping[str, SiteRow]) -> tuple[list[_Box], dict[str, int]]:
    """Consecutive nodes of one module together; a node's name → its box. Numbered in graph order: edges go up."""
    boxes, home = list[_Box](), dict[str, int]()
    for node in shown_nodes(stage):
        if not boxes or boxes[-1].module != node.module:
            boxes.append(_Box(node.module))
        home[node.name] = len(boxes) - 1
        boxes[-1].ops.append(node.op)
        if node.site in sites:
            boxes[-1].sites[node.site] = sites[node.site]
    return boxes, home


def _box(box: _Box) -> str:
    worst = min((loss(s) for s in box.sites.values()), default=UNKNOWN)
    colour = COLOURS[level(worst if worst < UNKNOWN else None)]
    lines = "".join(
        f'<text x="{box.x + 8:.1f}" y="{box.y + 16 + i * _LINE:.1f}">{html.escape(line)}</text>'
        for i, line in enumerate(box.lines)
    )
    rect = f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="4"'
    return f'{rect} stroke="{colour}" stroke-width="{2 if box.sites else 1}"/>{lines}'


def _edge(above: _Box, below: _Box) -> str:
    x1, y1 = above.x + above.width / 2, above.y + above.height
    x2, y2 = below.x + below.width / 2, below.y
    middle = (y1 + y2) / 2
    return f'<path d="M{x1:.1f},{y1:.1f} C{x1:.1f},{middle:.1f} {x2:.1f},{middle:.1f} {x2:.1f},{y2:.1f}"/>'


__all__ = ["render"]
