"""What a compilation did, as an artifact of torch's structured trace: `TORCH_TRACE=folder`, then tlparse shows it."""

from __future__ import annotations

import json

from torch._logging._internal import trace_structured

from int8pass.inspect.describe import describe, describe_scheme
from int8pass.pipeline import Facts
from int8pass.recipe import Recipe

NAME = "int8pass"


def emit(facts: Facts, recipe: Recipe) -> None:
    """Add the sites, refusals, rules and implementations of one graph to the trace, if there is one."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": NAME, "encoding": "json"},
        payload_fn=lambda: payload(facts, recipe),
    )


def payload(facts: Facts, recipe: Recipe) -> str:
    """The artifact, as readable JSON."""
    sites = [
        {
            "site": done.site.name,
            "pattern": done.site.producer,
            "linears": {reader.path: list(reader.shape) for reader in done.site.readers},
            "scheme": describe_scheme(done.scheme),
            "columns": done.columns,
            "smoothed": done.site.name in facts.smoothing.vectors,
            "smoothing not folded": facts.smoothing.reasons.get(done.site.name, ""),
        }
        for done in facts.quantized
    ]
    refused = [{"linear": r.linear, "reason": r.reason, "source": r.source} for r in facts.matches.refusals]
    content = {
        "recipe": describe(recipe),
        "sites": sites,
        "refused": refused,
        "rules": dict(facts.normalized.hits + facts.fused.hits),
        "implementations": {f"{op} {name}": count for (op, name), count in facts.implementations.items()},
    }
    return json.dumps(content, indent=1)


__all__ = ["NAME", "emit", "payload"]
