"""`Stage`: one stage of training, with its weights, length, schedule and losses."""

from __future__ import annotations

from dataclasses import dataclass

from sparsiattn.errors import InvalidOption
from sparsiattn.training import field_kinds as kinds
from sparsiattn.training.penalties import PENALTIES

LOSSES = ("reconstruction", "ce", "kl", "token_mse", "keep_ratio", *PENALTIES)
EXCLUSIVE = (("epochs", "steps"), ("warmup_epochs", "warmup_steps"))
"""Pairs of fields for the same length in different units; a stage sets at most one of each pair."""


@dataclass(frozen=True)
class Stage:
    """One stage of training, with a cosine schedule of its own.

    Attributes:
        name: Name of the stage in the log and in `Recipe.changed`.
        trainable: The weights to train: ``"planners"``, ``"backbone"`` or ``"both"``.
        epochs: Length in epochs; either this or ``steps`` must be set.
        steps: Length in updates.
        optimizer: Name of an optimizer in `timm.optim`.
        lr: Learning rate at the end of the warm-up.
        min_lr: Learning rate at the end of the stage.
        warmup_lr: Learning rate at the start of the warm-up.
        backbone_lr_scale: With trainable ``"both"``, the learning rate of the backbone divided by
            that of the planners.
        warmup_epochs: Length of the warm-up in epochs; at most one of this and ``warmup_steps``.
        warmup_steps: Length of the warm-up in updates.
        weight_decay: Weight decay of all weights except biases and norms.
        clip: Largest norm of the gradient; None for no clipping.
        reconstruction: Weight of the planners' loss against the model's own dense attention.
        ce: Weight of the cross-entropy with the labels.
        label_smoothing: Label smoothing of ``ce``, from 0 to 1.
        kl: Weight of the KL divergence from the dense model's logits.
        temperature: Temperature of both logits in ``kl``.
        token_mse: Weight of the squared error of the last layer's patch tokens, against the dense
            model's.
        keep_ratio: Weight of DynamicViT's loss, `sparsiattn.training.keep_ratio_loss`.
        attention_log: Weight of `sparsiattn.training.penalties.log_penalty` on the model's dense
            attention. Penalties need all attention weights in memory and, unless the strategy is
            ``dense``, one more forward pass.
        attention_entropy: Weight of `sparsiattn.training.penalties.entropy`, likewise.
        attention_layers: Layers that the penalties apply to, ``"all"`` or ``"last"``.
        prune: Share of the model's weights that are set to zero during the stage, the smallest ones
            first (`sparsiattn.training.pruning`; zeros save no time).
        prune_norms: Whether the weights of normalisation layers are pruned as well.
        ema_decay: Decay of the moving average of the weights, which is used for evaluation and as
            the result of the stage; None for no average.
        grad_checkpointing: Whether to recompute activations instead of storing them.
        keep_epochs: ``(start, end)``: token strategies and hybrids keep all tokens before epoch
            ``start`` and their own share from ``end`` on, with a cosine in between (EViT, arXiv
            2202.07800, section 4). The model is patched again between epochs, and planners keep
            their weights; get the new `Patch` with `sparsiattn.patch_of`.

    >>> Stage(name="predictor", trainable="planners", epochs=5, lr=3e-4, reconstruction=1.0).losses
    {'reconstruction': 1.0}
    """

    name: kinds.Name = "train"
    trainable: kinds.Trainable = "backbone"
    epochs: kinds.AtLeast1 | None = None
    steps: kinds.AtLeast1 | None = None
    optimizer: kinds.Text = "adamw"
    lr: kinds.Positive = 1e-4
    min_lr: kinds.Weight = 0.0
    warmup_lr: kinds.Weight = 0.0
    backbone_lr_scale: kinds.Positive = 1.0
    warmup_epochs: kinds.Weight | None = None
    warmup_steps: kinds.AtLeast0 | None = None
    weight_decay: kinds.Weight = 0.05
    clip: kinds.Positive | None = None
    reconstruction: kinds.Weight = 0.0
    ce: kinds.Weight = 0.0
    label_smoothing: kinds.Share = 0.0
    kl: kinds.Weight = 0.0
    temperature: kinds.Positive = 1.0
    token_mse: kinds.Weight = 0.0
    keep_ratio: kinds.Weight = 0.0
    attention_log: kinds.Weight = 0.0
    attention_entropy: kinds.Weight = 0.0
    attention_layers: kinds.Layers = "all"
    prune: kinds.Share = 0.0
    prune_norms: kinds.Flag = True
    ema_decay: kinds.Share | None = None
    grad_checkpointing: kinds.Flag = False
    keep_epochs: kinds.Span | None = None

    def __post_init__(self) -> None:
        kinds.check_fields(self, f"stage {self.name!r}")
        if problem := self._contradiction():
            raise InvalidOption(f"stage {self.name!r}{problem}")

    def _contradiction(self) -> str | None:
        """A problem with a combination of fields that are valid individually; None without one."""
        for pair in EXCLUSIVE:
            if all(getattr(self, name) is not None for name in pair):
                return f" takes {' or '.join(pair)}, got both"
        if self.epochs is None and self.steps is None:
            return " needs a length: set epochs or steps"
        if self.min_lr > self.lr:
            return f": min_lr={self.min_lr} is above lr={self.lr}"
        if self.backbone_lr_scale != 1.0 and self.trainable != "both":
            return (
                f": backbone_lr_scale={self.backbone_lr_scale} needs trainable: both, got "
                f"{self.trainable!r}: set lr instead"
            )
        if self.grad_checkpointing and self.penalties:
            return (
                f": {' and '.join(self.penalties)} cannot be combined with grad_checkpointing, "
                "which does not store attention weights: remove one of the two"
            )
        if not self.losses:
            return f" has no loss: set one of {', '.join(LOSSES)} to a weight above 0"
        return None

    @property
    def losses(self) -> dict[str, float]:
        """Weights of the losses in use, by name."""
        return {name: getattr(self, name) for name in LOSSES if getattr(self, name) > 0}

    @property
    def distils(self) -> bool:
        """Whether a teacher is needed."""
        return self.kl > 0 or self.token_mse > 0

    @property
    def penalties(self) -> list[str]:
        """Names of the penalties on attention weights in use."""
        return [name for name in self.losses if name in PENALTIES]

    @property
    def runs_student(self) -> bool:
        """Whether the sparse model runs, not only its dense attention."""
        return set(self.losses) != {"reconstruction"}
