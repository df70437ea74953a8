"""Node data for model-explorer: colours and values that it lays over the nodes of a graph it opened itself.

The form is model-explorer's node data JSON: by graph id ("main" for an ExportedProgram) the results by node id, and
thresholds for colours. Node ids are the names of the captured graph's nodes.
"""

from __future__ import annotations

import json

from int8pass.inspect.facts import Facts
from int8pass.inspect.text import FAIR, GOOD
from int8pass.inspect.worst import UNKNOWN, loss


def render(report: Facts) -> str:
    """JSON: SQNR in dB of every quantized linear, by the node's name in the captured graph."""
    measured = {site.name: loss(site) for site in report.sites if loss(site) < UNKNOWN}
    graphs = {}
    for stage in report.stages:
        if stage.name != "normalized":  # the first stage whose linears are known by site
            continue
        results = {
            node.name: {"value": measured[node.site]} for node in stage.nodes if node.site in measured
        }  # fmt: skip
        graphs["main" if report.graphs == 1 else f"graph_{stage.graph}"] = {
            "results": results,
            "thresholds": [
                {"value": FAIR, "bgColor": "#f8b4b4"},
                {"value": GOOD, "bgColor": "#f5dfa0"},
                {"value": 1000.0, "bgColor": "#b7e1c0"},
            ],
        }
    return json.dumps(graphs, indent=1) + "\n"


__all__ = ["render"]
