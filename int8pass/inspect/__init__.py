"""Inspection: facts of a compilation → a report → terminal, HTML, JSON, DOT, SVG: what became of every linear."""

from int8pass.inspect.collect import inspect
from int8pass.inspect.facts import RefusedLinear, SiteRow
from int8pass.inspect.report import Report

__all__ = ["RefusedLinear", "Report", "SiteRow", "inspect"]
