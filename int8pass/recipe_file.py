"""Recipes as files: readable JSON, rounded codes beside it, and what differs between two of them."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch._guards import tracing

from int8pass.errors import RecipeError
from int8pass.recipe import Recipe, Scheme, SiteSettings

FORMAT = 2  # raised when a reader of this version could misread a file


def to_json(recipe: Recipe) -> str:
    """Head and sites, one field a line."""
    head = {
        "int8pass_recipe": FORMAT,
        "versions": dict(recipe.versions),
        "quantize_head": recipe.quantize_head,
        "scheme": dataclasses.asdict(recipe.scheme),
        "tensors": sorted(recipe.tensors),
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    sites = []
    for name, settings in recipe.sites.items():
        rows = [f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in dataclasses.asdict(settings).items()]
        sites.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n  }")
    lines.append(' "sites": {\n' + ",\n".join(sites) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}"


def save(recipe: Recipe, target: Path) -> None:
    """Write the file, and its codes first: a recipe never names codes that are not there."""
    if recipe.tensors:
        with written_whole(_beside(target)) as part:
            torch.save(dict(recipe.tensors), part)
    with written_whole(target) as part:
        part.write_text(to_json(recipe) + "\n")


def load(path: Path) -> Recipe:
    """Read what `save` wrote."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read recipe {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path} is not valid JSON (truncated?): {error}") from error
    try:
        recipe = from_dict(content)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not content.get("tensors"):
        return recipe
    beside = _beside(path)
    try:
        with tracing(None):  # while Dynamo traces, torch.load gives tensors without data
            tensors = torch.load(beside, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise RecipeError(f"cannot read {beside}, which holds the rounded codes of {path}: {error}") from error
    if sorted(tensors) != content["tensors"]:
        raise RecipeError(f"{beside} does not hold the codes of {path}: it belongs to another recipe")
    return dataclasses.replace(recipe, tensors=MappingProxyType(tensors))


def from_dict(content: Any) -> Recipe:
    """The recipe of parsed JSON."""
    if not isinstance(content, dict) or "int8pass_recipe" not in content:
        raise RecipeError("not an int8pass recipe (no 'int8pass_recipe' key)")
    if content["int8pass_recipe"] not in range(1, FORMAT + 1):
        raise RecipeError(f"format {content['int8pass_recipe']!r}; this version of int8pass reads {FORMAT}")
    try:
        return Recipe(
            Scheme(**content["scheme"]),
            bool(content["quantize_head"]),
            MappingProxyType({name: _site_from_dict(settings) for name, settings in content["sites"].items()}),
            MappingProxyType(dict(content["versions"])),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RecipeError(f"malformed recipe: {error}") from error


def _site_from_dict(content: Mapping[str, Any]) -> SiteSettings:
    scheme = Scheme(**content["scheme"]) if content["scheme"] is not None else None
    limits, alpha, error = (content.get(key) for key in ("limits", "alpha", "error"))  # not in format 1
    if limits is not None:
        low, high = limits
        limits = (float(low), float(high))
    return SiteSettings(
        scheme,
        bool(content["keep"]),
        tuple(int(c) for c in content["columns"]),
        tuple(float(e) for e in content["exponents"]),
        limits,
        None if alpha is None else float(alpha),
        None if error is None else float(error),
        int(content.get("tokens", 0)),
    )


def _differences(prefix: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return [f"{prefix}{key}: {first[key]} → {second[key]}" for key in first if first[key] != second[key]]


def _site_differences(name: str, first: SiteSettings, second: SiteSettings) -> list[str]:
    """Changes of one site; vectors in a few words."""
    a, b = dataclasses.asdict(first), dataclasses.asdict(second)
    mine, theirs = a.pop("scheme"), b.pop("scheme")
    if mine is None or theirs is None:
        lines = (
            [] if mine == theirs else [f"{name}: a scheme of its own in the {'second' if mine is None else 'first'}"]
        )
    else:
        lines = _differences(f"{name}: ", mine, theirs)
    gone, new = set(first.columns) - set(second.columns), set(second.columns) - set(first.columns)
    if gone or new:
        lines.append(f"{name}: columns: {len(gone)} removed, {len(new)} added, {len(second.columns)} now")
    if first.exponents != second.exponents:
        steps = [abs(x - y) for x, y in zip(first.exponents, second.exponents)]
        what = f"up to 2^{max(steps)} apart" if len(first.exponents) == len(second.exponents) else "of other length"
        lines.append(f"{name}: smoothing vectors: {what}")
    rest = [key for key in a if key not in {"columns", "exponents"}]
    return lines + _differences(f"{name}: ", {k: a[k] for k in rest}, {k: b[k] for k in rest})


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".pt")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path to write to that becomes `target` if all goes well, and goes if not."""
    file = tempfile.NamedTemporaryFile(dir=target.parent, delete=False, prefix=target.name, suffix=".part")  # noqa: SIM115
    file.close()
    part = Path(file.name)
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def differences(first: Recipe, second: Recipe) -> list[str]:
    """One line for everything that differs."""
    lines = _differences("", dataclasses.asdict(first.scheme), dataclasses.asdict(second.scheme))
    if first.quantize_head != second.quantize_head:
        lines.append(f"quantize_head: {first.quantize_head} → {second.quantize_head}")
    for name in sorted({*first.sites, *second.sites}):
        mine, theirs = first.sites.get(name), second.sites.get(name)
        if mine is None or theirs is None:
            lines.append(f"{name}: only in the {'second' if mine is None else 'first'}")
        elif mine != theirs:
            lines += _site_differences(name, mine, theirs)
    return lines
