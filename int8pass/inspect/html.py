"""The HTML form of a report: one file with everything in it, that opens without a network.

The page is a jinja2 template; charts are drawn by Vega-Lite (BSD-3-Clause, bundled by the package vl-convert-python),
the graph is laid out by dagre (MIT, inside the package netron). The facts travel as compressed JSON.
"""

from __future__ import annotations

import base64
import functools
import gzip
import importlib.util
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from int8pass.inspect.facts import Facts, Node, to_plain
from int8pass.inspect.report import ReportError, needs
from int8pass.inspect.text import FAIR, GOOD
from int8pass.inspect.text_parts import shorten
from int8pass.inspect.worst import loss, override

_NODE_FIELDS = ("name", "op", "inputs", "shape", "module", "source", "code", "site", "implementation")


def render(report: Facts, stage: str | None = None) -> str:
    """The page. `stage` is shown first (default: the last one).

    Raises:
        ReportError: the extra `inspect` is not installed.
    """
    jinja2 = needs("jinja2", "an HTML report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_asset("report.html.j2"))
    page: str = template.render(
        title=f"int8pass: {report.settings.get('model', 'report')}",
        style=_asset("report.css"),
        scripts=[_asset("tables.js"), _asset("charts.js"), _asset("graph.js"), _asset("report.js")],
        dagre=_dagre(),
        vega=base64.b64encode(gzip.compress(_vega().encode(), mtime=0)).decode(),
        facts=base64.b64encode(gzip.compress(_payload(report, stage), mtime=0)).decode(),
    )
    return page


def _asset(name: str) -> str:
    return resources.files("int8pass.inspect").joinpath("assets", name).read_text(encoding="utf-8")


def _payload(report: Facts, stage: str | None) -> bytes:
    """The facts, nodes as rows, and what the page would otherwise work out a second time."""
    plain = to_plain(report)
    for shown, facts in zip(plain["stages"], report.stages):
        shown["nodes"] = [[_field(node, name) for name in _NODE_FIELDS] for node in facts.nodes]
    plain["sources"] = [shorten(source) for source in plain["sources"]]
    for row in (*plain["sites"], *plain["refused"]):
        row["source"] = shorten(row["source"])
    plain["node_fields"] = _NODE_FIELDS
    plain["override"] = override(report)
    plain["loss"] = [loss(site) for site in report.sites]
    plain["levels"] = [GOOD, FAIR]
    plain["first_stage"] = stage or ""
    return json.dumps(plain, separators=(",", ":")).encode()


def _field(node: Node, name: str) -> Any:
    value = getattr(node, name)
    return list(value) if isinstance(value, tuple) else value


@functools.cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script that sets `window.vegaEmbed`."""
    convert = needs("vl_convert", "an HTML report")
    # A script of its own could end the element it stands in; as data it cannot, see `render`.
    return str(convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


@functools.cache
def _dagre() -> str:
    """dagre as one script that sets `dagre`."""
    found = importlib.util.find_spec("netron")
    if found is None or not found.submodule_search_locations:
        raise ReportError("an HTML report needs netron: pip install 'int8pass[inspect]'")
    path = Path(found.submodule_search_locations[0]) / "dagre.js"
    if not path.is_file():
        raise ReportError(f"the installed netron has no dagre.js ({path}): pip install 'int8pass[inspect]'")
    module = path.read_text(encoding="utf-8")
    return f"const dagre = (() => {{{re.sub(r'^export .*$', 'return dagre;', module, flags=re.M)}}})();"


__all__ = ["render"]
