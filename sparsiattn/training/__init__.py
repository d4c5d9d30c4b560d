"""Fitting planners."""

from sparsiattn.training.calibrate import calibrate
from sparsiattn.training.keep import keep_ratio_loss

__all__ = ["calibrate", "keep_ratio_loss"]
