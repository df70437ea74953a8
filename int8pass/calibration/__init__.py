"""Calibration: a few batches through the captured graph → ranges, smoothing, outlier columns, rounding, in a recipe."""

from int8pass.calibration.calibrate import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
