"""Inspection: facts of a compilation → a report → text. Shows what happened to every linear, and why."""

from int8pass.inspect.collect import inspect
from int8pass.inspect.report import RefusedLinear, Report, SiteRow

__all__ = ["RefusedLinear", "Report", "SiteRow", "inspect"]
