"""How a patched model is trained: stages and their numbers, as data that can be kept in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from sparsiattn.errors import InvalidOption, unknown
from sparsiattn.training import field_kinds as kinds

PENALTIES = ("attention_log", "attention_entropy")
LOSSES = ("reconstruction", "ce", "kl", "token_mse", "keep_ratio", *PENALTIES)
FOLDER = Path(__file__).resolve().parent / "recipes"
_EXCLUSIVE = (("epochs", "steps"), ("warmup_epochs", "warmup_steps"))
"""Two ways to say one length; a stage has one of them."""


@dataclass(frozen=True)
class Stage:
    """One stage of training, with a cosine schedule of its own.

    Attributes:
        name: Names the stage in the log and in `Recipe.changed`.
        trainable: ``"planners"``, ``"backbone"`` or ``"both"``.
        epochs: Length in passes over the data; either this or ``steps``.
        steps: Length in updates.
        optimizer: A name of `timm.optim`.
        lr: Learning rate at the end of the warm-up.
        min_lr: Learning rate at the end of the stage.
        warmup_lr: Learning rate at the start of the warm-up.
        backbone_lr_scale: With trainable ``"both"``, the backbone's rate as a share of the
            planners', at all times.
        warmup_epochs: Length of the warm-up in epochs; either this or ``warmup_steps``.
        warmup_steps: Length of the warm-up in updates.
        weight_decay: Of all weights but biases and norms.
        clip: Largest norm of the gradient.
        reconstruction: Weight of the planners' loss against the model's own dense attention.
        ce: Weight of the cross-entropy with the labels.
        label_smoothing: Of the labels.
        kl: Weight of the KL divergence of the logits from the dense model's.
        temperature: Of both logits in ``kl``.
        token_mse: Weight of the squared error of the last layer's patch tokens, against the dense
            model's.
        keep_ratio: Weight of DynamicViT's loss, `sparsiattn.training.keep_ratio_loss`.
        attention_log: Weight of `sparsiattn.training.penalties.log_penalty` on the model's dense
            attention. Penalties need all attention weights in memory and, where the strategy is not
            ``dense``, one more forward pass.
        attention_entropy: Weight of `sparsiattn.training.penalties.entropy`, likewise.
        attention_layers: Layers that the penalties look at, ``"all"`` or ``"last"``.
        prune: Share of the model's weights, the smallest ones, that is zero from the first update
            of the stage to its last (`sparsiattn.training.pruning`: zeros save no time).
        prune_norms: Whether gains of normalisation layers are pruned as well.
        ema_decay: Of the moving average of the weights, with which the stage is evaluated and ends.
        grad_checkpointing: Recompute activations instead of keeping them.
        keep_epochs: ``(start, end)``: token strategies and hybrids keep everything before epoch
            ``start`` and their own share from ``end`` on, on a cosine between (EViT, arXiv
            2202.07800, section 4). The model is patched anew between epochs, planners keep their
            weights; ask `sparsiattn.patch_of` for its `Patch` afterwards.

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
        problem = self._contradiction()
        if problem is not None:
            raise InvalidOption(f"stage {self.name!r}{problem}")

    def _contradiction(self) -> str | None:
        """What is wrong with fields that are right each by itself."""
        for pair in _EXCLUSIVE:
            if all(getattr(self, name) is not None for name in pair):
                return f" takes {' or '.join(pair)}, got both"
        if self.epochs is None and self.steps is None:
            return " needs epochs or steps: how long it lasts"
        if self.min_lr > self.lr:
            return f": min_lr={self.min_lr} is above lr={self.lr}"
        if self.backbone_lr_scale != 1.0 and self.trainable != "both":
            return (
                f": backbone_lr_scale={self.backbone_lr_scale} sets backbone and planners apart, "
                f"which needs trainable: both, got {self.trainable!r}: set lr instead"
            )
        if self.grad_checkpointing and self.penalties:
            return (
                f": {' and '.join(self.penalties)} read attention weights that grad_checkpointing "
                "would not keep: leave one of the two out"
            )
        if not self.losses:
            return f" has nothing to minimise: give one of {', '.join(LOSSES)} a weight above 0"
        return None

    @property
    def losses(self) -> dict[str, float]:
        """Name to weight of every loss that counts."""
        return {name: getattr(self, name) for name in LOSSES if getattr(self, name) > 0}

    @property
    def distils(self) -> bool:
        """Whether a teacher is needed."""
        return self.kl > 0 or self.token_mse > 0

    @property
    def penalties(self) -> list[str]:
        """Those on attention weights that count."""
        return [name for name in PENALTIES if getattr(self, name) > 0]

    @property
    def runs_student(self) -> bool:
        """Whether the sparse model itself runs, not only its dense attention."""
        return set(self.losses) != {"reconstruction"}


@dataclass(frozen=True)
class Recipe:
    """How to train: a strategy, stages, and what all of them share.

    Attributes:
        strategy: As `sparsiattn.patch` takes it; None for whatever the model is patched with.
        options: Of the strategy, as `sparsiattn.patch` takes them.
        stages: One after the other.
        batch_size: Images in one forward pass, over all processes. An update sees ``batch_size *
            accumulation`` images, on however many processes.
        accumulation: Forward passes in one update.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        augment: Options of the loader's training images by timm's names.
        image_size: In pixels.
        seed: Of order, augmentation and dropout.
        workers: Processes that read images.
        checkpoint_steps: Updates between checkpoints; None for one an epoch.
        tensorboard: Whether to write event files beside the JSON-lines log.
        summary: A line about the recipe.
        model: The timm model that it was written for.
        published: What its authors report, for comparison.

    >>> recipe = Recipe("connectivity", {"k": 0.1}, stages=[Stage(epochs=1, ce=1.0)])
    >>> Recipe.from_dict(recipe.to_dict()) == recipe
    True
    >>> recipe.changed({"train.lr": 0.01, "options.k": 0.5, "seed": 3}).stages[0].lr
    0.01
    """

    strategy: kinds.Text | None = None
    options: kinds.Options = field(default_factory=dict)
    stages: kinds.Stages = ()
    batch_size: kinds.AtLeast1 = 64
    accumulation: kinds.AtLeast1 = 1
    mixed_precision: kinds.Precision = "no"
    augment: kinds.Options = field(default_factory=dict)
    image_size: kinds.AtLeast1 | None = None
    seed: kinds.AtLeast0 = 0
    workers: kinds.AtLeast0 = 0
    checkpoint_steps: kinds.AtLeast1 | None = None
    tensorboard: kinds.Flag = False
    summary: kinds.Text = ""
    model: kinds.Text | None = None
    published: kinds.Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds.check_fields(self, "recipe")
        object.__setattr__(self, "stages", tuple(map(_stage, self.stages)))
        if not self.stages:
            raise InvalidOption("a recipe needs at least one stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise InvalidOption(f"stages need names that differ, got {names}")
        if self.strategy is None and self.options:
            raise InvalidOption(f"options {sorted(self.options)} need a strategy to go to")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and YAML; stages without the fields that have their defaults."""
        content = {**asdict(self), "stages": [_changed_fields(stage) for stage in self.stages]}
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return plain

    @classmethod
    def from_dict(cls, content: Any, where: str = "recipe") -> Recipe:
        """A recipe from plain data.

        Args:
            content: What `to_dict` gives.
            where: Names the recipe in errors.

        Raises:
            InvalidOption: For unknown or wrong fields.
        """
        return cls(**_known_fields(content, cls, where))

    @classmethod
    def load(cls, source: str | PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
        """A recipe by name (see `recipes`), from a ``.yaml`` or ``.json`` file, or from a dict."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        path = _path(str(source))
        return cls.from_dict(_read(path), str(path))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write it as JSON where the name ends so, else as YAML."""
        import yaml

        path, content = Path(path), self.to_dict()
        text = json.dumps(content, indent=2) if path.suffix == ".json" else yaml.safe_dump(content)
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
        return path

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """This recipe with other values.

        Args:
            changes: Values by name: ``field``, ``options.field``, ``augment.field`` or
                ``stage.field`` (the stage by name or number). A stage's field alone changes it in
                every stage.

        Raises:
            InvalidOption: For unknown names or wrong values.
        """
        recipe = self
        for name, value in changes.items():
            recipe = _with_change(recipe, name, value)
        return recipe


def recipes() -> dict[str, str]:
    """Name to summary of the recipes that come along.

    >>> "sparsifiner_deit_small" in recipes()
    True
    """
    return {path.stem: str(_read(path)["summary"]) for path in sorted(FOLDER.glob("*.yaml"))}


def _names(kind: type) -> list[str]:
    return [option.name for option in fields(kind)]


def _with_change(recipe: Recipe, name: str, value: Any) -> Recipe:
    head, dot, rest = name.partition(".")
    if not dot and name in _names(Recipe):
        return replace(recipe, **{name: value})
    if head in ("options", "augment") and rest:
        change: dict[str, Any] = {head: {**getattr(recipe, head), rest: value}}
        return replace(recipe, **change)
    option = rest if dot else name
    chosen = [not dot or head in (str(i), stage.name) for i, stage in enumerate(recipe.stages)]
    if dot and any(chosen) and option not in _names(Stage):
        raise _unknown_field(f"stage {head!r}", option, _names(Stage))
    if not any(chosen) or option not in _names(Stage):
        places = [f"{place}.FIELD" for place in ("options", *(s.name for s in recipe.stages))]
        raise _unknown_field("recipe", name, [*_names(Recipe), *_names(Stage), *places])
    withdrawn = next((pair for pair in _EXCLUSIVE if option in pair and value is not None), ())
    changes = {**dict.fromkeys(withdrawn), option: value}
    stages = [
        replace(stage, **changes) if choose else stage
        for stage, choose in zip(recipe.stages, chosen, strict=True)
    ]
    return replace(recipe, stages=tuple(stages))


def _path(name: str) -> Path:
    """Of a recipe that comes along, or of the user's own file."""
    included = FOLDER / f"{name}.yaml"
    if "/" not in name and included.is_file():
        return included
    if not Path(name).is_file():
        raise unknown("recipe (and there is no such file)", name, recipes())
    return Path(name)


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML, too
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidOption(f"{path} cannot be read as a recipe: {error}") from error


def _stage(content: Any) -> Stage:
    if isinstance(content, Stage):
        return content
    name = content.get("name", "train") if isinstance(content, Mapping) else "?"
    return Stage(**_known_fields(content, Stage, f"stage {name!r}"))


def _changed_fields(stage: Stage) -> dict[str, Any]:
    """The name, and fields that differ from their defaults."""
    return {
        option.name: getattr(stage, option.name)
        for option in fields(stage)
        if option.name == "name" or getattr(stage, option.name) != option.default
    }


def _known_fields(content: Any, kind: type, where: str) -> dict[str, Any]:
    known = _names(kind)
    if not isinstance(content, Mapping):
        raise InvalidOption(f"{where} must be a mapping with {', '.join(known)}, got {content!r}")
    for name in content:
        if name not in known:
            raise _unknown_field(where, name, known)
    return dict(content)


def _unknown_field(where: str, name: object, known: Iterable[str]) -> InvalidOption:
    return InvalidOption(str(unknown(f"field of {where}:", name, known)))
