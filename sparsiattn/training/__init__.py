"""Fitting planners and training patched models."""

from sparsiattn.training.calibration import calibrate
from sparsiattn.training.keep import keep_ratio_loss
from sparsiattn.training.loop import TrainResult, train
from sparsiattn.training.recipe import Recipe, Stage, recipes

__all__ = ["Recipe", "Stage", "TrainResult", "calibrate", "keep_ratio_loss", "recipes", "train"]
