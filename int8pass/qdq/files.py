"""Writing an ONNX model: all of it or nothing, weights beside it when it is large."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from int8pass.errors import ExportError

EXTERNAL_ABOVE = 1 << 30
"""Bytes of weights from which they go to a file of their own (protobuf ends at 2 GiB)."""


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into; gone afterwards, whatever happened."""
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the name of a file")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder)


def write(model: ir.Model, folder: Path, path: Path) -> Path:
    """Write the model that shall become `path` into `folder`; returns the file there.

    Raises:
        ExportError: the disk is full, or the folder cannot be written.
    """
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    data = _data_name(path) if size > EXTERNAL_ABOVE else None
    staged_path = folder / path.name
    try:
        ir.save(model, staged_path, external_data=data)
    except OSError as error:
        raise ExportError(f"{path} could not be written ({error}); nothing of it was left behind") from error
    return staged_path


def _data_name(path: Path) -> str:
    """`model.onnx.data`, or another name when a model that is still in use there reads that file."""
    names = itertools.chain([f"{path.name}.data"], (f"{path.name}.{i}.data" for i in itertools.count(1)))
    return next(name for name in names if not (path.parent / name).exists())


def publish(staged_path: Path, path: Path) -> None:
    """Move a written model to its place.

    Weights first, under a name that no model there uses yet, then the model in one step: a reader finds the old model
    or the new one. The weights of the old one go last.
    """
    replaced = external_files(path)
    for data in external_files(staged_path):
        os.replace(data, path.parent / data.name)
    os.replace(staged_path, path)
    for data in replaced - external_files(path):
        data.unlink(missing_ok=True)


def external_files(path: Path) -> set[Path]:
    """The files beside a model that hold its weights."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        return set()
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError:  # not a model; it is replaced like any other file
        return set()
    locations = {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    found = {path.parent / location for location in locations}
    return {file for file in found if file.parent == path.parent and file.is_file()}
