"""Calibration of planners, training and evaluation of patched models, and loading of images.

It may import `sparsiattn.patching` and the packages below it; analysis, testing and the command
line build on it.
"""

from sparsiattn.training.calibration import calibrate
from sparsiattn.training.data import Batches, loader
from sparsiattn.training.evaluation import Evaluation, evaluate
from sparsiattn.training.loop import train
from sparsiattn.training.losses import Objective, keep_ratio_loss
from sparsiattn.training.preprocess import data_config, image_transform
from sparsiattn.training.progress import Progress, bar
from sparsiattn.training.recipe import Recipe, recipes
from sparsiattn.training.result import TrainResult
from sparsiattn.training.stage import Stage

__all__ = [
    "Batches",
    "Evaluation",
    "Objective",
    "Progress",
    "Recipe",
    "Stage",
    "TrainResult",
    "bar",
    "calibrate",
    "data_config",
    "evaluate",
    "image_transform",
    "keep_ratio_loss",
    "loader",
    "recipes",
    "train",
]
