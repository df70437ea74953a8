"""What to say when a model cannot be captured: what failed, where in the model, and what to do."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import nn

from int8pass.inspect.running import call


def explain(model: nn.Module, failure: Exception, inner: Exception | None, args: Any, title: str, seen: str) -> str:
    """The message of a `CaptureError`."""
    return (
        f"{type(model).__name__} could not be captured ({title}): {inner or _first_lines(failure)}\n"
        f"  at      {_failing_line(failure)}\n  to do   {_advice(model, args)}\n  seen    {seen}"
    )


def _advice(model: nn.Module, args: Any) -> str:
    try:
        with torch.no_grad():
            call(model, args)
    except Exception as eager:  # noqa: BLE001  a model may raise anything
        return f"the model itself fails on these inputs ({type(eager).__name__}): give inputs it runs with"
    return (
        "the model runs eagerly, but torch.compile cannot trace this line: take it out of the graph with "
        "@torch._dynamo.disable on its function, or inspect the part of the model without it"
    )


def break_reason(reason: Any) -> str:
    """Why and where Dynamo broke a graph."""
    where = f"{reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}" if reason.user_stack else ""
    return f"{str(reason.reason).strip().splitlines()[0]} ({where})"


def _first_lines(failure: Exception) -> str:
    lines = [line for line in str(failure).strip().splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"


def _failing_line(failure: BaseException) -> str:
    """The innermost line of the user's code that an error came from."""
    stack = list(getattr(failure, "real_stack", None) or ()) or traceback.extract_tb(failure.__traceback__)
    own = [f for f in stack if "/torch/" not in f.filename and "/int8pass/" not in f.filename and "<" not in f.filename]
    if not own:
        return "a line that is not known"
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}"


__all__ = ["break_reason", "explain"]
