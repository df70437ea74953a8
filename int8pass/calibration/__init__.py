"""Calibration: a few batches through the captured graph → outlier columns per site, in a recipe."""

from int8pass.calibration.calibrate import calibrate

__all__ = ["calibrate"]
