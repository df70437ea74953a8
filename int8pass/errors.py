"""What can go wrong, as one tree.

    Int8PassError
    ├── OptionError          an option, preset, device or recipe field that does not exist or has a wrong value
    ├── RecipeError          a recipe file that cannot be read, or does not fit the model
    ├── CaptureError         the model could not be traced into the graph this pass works on
    ├── WeightError          a weight that cannot be quantized (NaN, Inf, meta device, already released)
    ├── GradientError        gradients were requested; the pass is for inference
    ├── CalibrationError     calibration data that is empty, non-finite or does not fit the model
    ├── UnsupportedError     a device or op without an implementation
    ├── ExportError          an ONNX model that could not be written, read or verified
    └── StageError           a stage broke its contract: a bug in int8pass

Every message says what was found, where (site, node, source line of the model where known) and what to do next.
"""

from __future__ import annotations


class Int8PassError(Exception):
    """Base of every error int8pass raises on purpose."""


class OptionError(Int8PassError, ValueError):
    """An option, preset, device or recipe field is unknown or has a wrong value."""


class RecipeError(Int8PassError):
    """A recipe cannot be read, or does not fit the model."""


class CaptureError(Int8PassError):
    """The model could not be traced into pre-dispatch ATen. `partial` may hold the report of what could be seen."""

    partial: object = None


class WeightError(Int8PassError):
    """A weight cannot be quantized."""


class GradientError(Int8PassError):
    """The pass was asked to compile a training step."""


class CalibrationError(Int8PassError):
    """Calibration data is empty, non-finite or does not fit the model."""


class UnsupportedError(Int8PassError):
    """A device or op without an implementation."""


class ExportError(Int8PassError):
    """An ONNX model could not be written, could not be read, or does not run in int8."""


class StageError(Int8PassError):
    """A stage broke its contract; please report it with the printed graph."""


class CalibrationWarning(UserWarning):
    """Calibration went on, and part of the model did not get what it asked for."""
