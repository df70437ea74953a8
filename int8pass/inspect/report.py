"""The report: the facts, and the ways to show and keep them. Printing a report gives the text."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8pass.errors import Int8PassError, OptionError
from int8pass.inspect import facts
from int8pass.inspect.facts import Facts
from int8pass.recipe_file import written_whole


class ReportError(Int8PassError):
    """A report that cannot be read or written."""


@dataclass(frozen=True)
class Report(Facts):
    """What the pass does to a model on given inputs, over all graphs that Dynamo makes of it."""

    @property
    def counts(self) -> dict[str, int]:
        """Totals: graphs, sites, linears taken and linears refused."""
        taken = sum(len(site.linears) for site in self.sites)
        return {"graphs": self.graphs, "sites": len(self.sites), "taken": taken, "refused": len(self.refused)}

    @property
    def bytes(self) -> tuple[int, int]:
        """Of the weights of all sites (before, after)."""
        return sum(s.bytes[0] for s in self.sites), sum(s.bytes[1] for s in self.sites)

    def __str__(self) -> str:
        """Plain text; on a terminal that rich is installed for, in colour and as wide as it is."""
        from int8pass.inspect import text

        if sys.stdout.isatty() and importlib.util.find_spec("rich"):
            return text.coloured(self)
        return text.render(self)

    def to_json(self) -> str:
        """JSON that `from_json` reads; the key `int8pass_report` is the version of its form."""
        return json.dumps({"int8pass_report": facts.FORMAT, **facts.to_plain(self)}, separators=(",", ":"))

    @staticmethod
    def from_json(content: str) -> Report:
        """The report that `to_json` wrote.

        Raises:
            ReportError: no report, truncated, or of a newer form.
        """
        try:
            plain = json.loads(content)
        except json.JSONDecodeError as error:
            raise ReportError(f"not valid JSON (truncated?): {error}") from error
        if not isinstance(plain, dict) or "int8pass_report" not in plain:
            raise ReportError("not an int8pass report (no 'int8pass_report' key)")
        if (version := plain.pop("int8pass_report")) != facts.FORMAT:
            raise ReportError(f"a report of form {version!r}; this version of int8pass reads {facts.FORMAT}")
        try:
            report = facts.from_plain(Report, plain)
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"malformed report: {error}") from error
        assert isinstance(report, Report)
        return report

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Report:
        """Read a report that was saved as `.json`.

        Raises:
            ReportError: the file is missing, truncated, no report, or of a newer form.
        """
        try:
            return Report.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ReportError(f"cannot read report {path}: {error}") from error
        except ReportError as error:
            raise ReportError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report in the form that the file's ending names: .html, .json, .dot, .svg or .txt.

        `.nodes.json` gives node data for model-explorer. Files are written whole or not at all.

        Raises:
            OptionError: another ending. ReportError: the file cannot be written, or an extra is not installed.
        """
        target = Path(path)
        content = renderer(target)(self)
        write(target, content)


def renderer(path: Path) -> Callable[[Report], str]:
    """What makes the text of a file, by the file's ending."""
    name = path.name
    endings = {".nodes.json": "overlay", ".html": "html", ".json": "", ".dot": "dot", ".svg": "svg", ".txt": "text"}
    ending = next((e for e in endings if name.endswith(e)), None)
    if ending is None:
        raise OptionError(f"a report can be written as {', '.join(endings)}, and {path} is none of them")
    if not endings[ending]:
        return Report.to_json
    function: Callable[[Report], str] = importlib.import_module(f"int8pass.inspect.{endings[ending]}").render
    return function


def write(target: Path, content: str) -> None:
    """Write a file whole or not at all."""
    try:
        with written_whole(target) as part:
            part.write_text(content, encoding="utf-8")
            part.chmod(0o644)
    except OSError as error:
        raise ReportError(f"the report {target} cannot be written: {error.strerror or error}") from error


def needs(module: str, purpose: str) -> Any:
    """Import a module that an extra brings.

    Raises:
        ReportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        raise ReportError(f"{purpose} needs {missing.name}: pip install 'int8pass[inspect]'") from missing


__all__ = ["Report", "ReportError", "needs", "renderer", "write"]
