"""The report: plain dataclasses, filled by `collect`, rendered by `text`. Printing a report gives the text."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SiteRow:
    """One site of one graph."""

    name: str
    producer: str
    linears: tuple[str, ...]
    shape: tuple[int, int]
    """(N of all linears together, K)"""
    scheme: str
    columns: int
    smoothing: str
    """"folded", "multiply", "" when the scheme asks for none, or the reason why it could not be folded."""
    implementations: tuple[str, ...]


@dataclass(frozen=True)
class RefusedLinear:
    """One linear that was not taken."""

    linear: str
    reason: str
    source: str
    """`file:line: code` in the user's model; "" when unknown."""


@dataclass(frozen=True)
class Report:
    """What the pass does to a model on given inputs, over all graphs that Dynamo makes of it."""

    recipe: str
    """The settings in force, one line."""
    graphs: int
    sites: tuple[SiteRow, ...]
    refused: tuple[RefusedLinear, ...]
    rules: dict[str, int] = field(default_factory=dict)
    """Rule name → how often it applied."""

    @property
    def counts(self) -> dict[str, int]:
        """Totals: graphs, sites, linears taken and linears refused."""
        taken = sum(len(site.linears) for site in self.sites)
        return {"graphs": self.graphs, "sites": len(self.sites), "taken": taken, "refused": len(self.refused)}

    def __str__(self) -> str:
        from int8pass.inspect.text import render

        return render(self)
