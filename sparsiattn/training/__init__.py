"""Fitting planners."""

from sparsiattn.training.calibrate import calibrate

__all__ = ["calibrate"]
