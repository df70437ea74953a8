"""int8pass: a graph-compiler pass that runs transformer models in 8-bit integers.

    model = torch.compile(model, backend="int8")          # no import needed

Importing this package needs torch alone.
"""

from int8pass import errors
from int8pass.backend import outlier_overflow, packed_bytes
from int8pass.calibration import calibrate
from int8pass.export import Export, export_onnx
from int8pass.inspect import Report, inspect
from int8pass.recipe import Recipe, Scheme, SiteSettings, presets

__version__ = "0.1.0"

__all__ = [
    "Export", "Recipe", "Report", "Scheme", "SiteSettings", "calibrate", "errors", "export_onnx", "inspect",
    "outlier_overflow", "packed_bytes", "presets",
]  # fmt: skip
