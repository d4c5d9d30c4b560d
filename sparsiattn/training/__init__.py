"""Fitting planners to attention, training and evaluating patched models, and reading their images.

May import `sparsiattn.patching` and what stands below it; analysis, testing and the command line
build on it.
"""

from sparsiattn.training.calibration import calibrate
from sparsiattn.training.loop import train
from sparsiattn.training.losses import keep_ratio_loss
from sparsiattn.training.recipe import Recipe, recipes
from sparsiattn.training.result import TrainResult
from sparsiattn.training.stage import Stage

__all__ = ["Recipe", "Stage", "TrainResult", "calibrate", "keep_ratio_loss", "recipes", "train"]
