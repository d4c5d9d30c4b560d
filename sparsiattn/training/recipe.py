"""`Recipe`: the stages and hyperparameters of training, as data that can be stored in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from sparsiattn.errors import InvalidOption, unknown
from sparsiattn.training import field_kinds as kinds
from sparsiattn.training.stage import EXCLUSIVE, Stage

FOLDER = Path(__file__).resolve().parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A recipe for training: a strategy, stages, and the settings that all stages share.

    Attributes:
        strategy: Name of the strategy, as in `sparsiattn.patch`; None to keep the model's patch.
        options: Options of the strategy, as in `sparsiattn.patch`.
        stages: The training stages, in order.
        batch_size: Number of images in one forward pass, over all processes together. One update
            uses ``batch_size * accumulation`` images.
        accumulation: Number of forward passes in one update.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        augment: Options of augmentation and preprocessing by timm's names.
        image_size: Image size in pixels; None for the size that the model was built for.
        seed: Seed of order, augmentation and dropout.
        workers: Number of processes that read images.
        checkpoint_steps: Number of updates between checkpoints; None for one per epoch.
        tensorboard: Whether to write TensorBoard event files in addition to the JSON-lines log.
        summary: One line about the recipe.
        model: The timm model that the recipe was written for.
        published: Results that the authors report, for comparison.

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
            raise InvalidOption(f"stages must have different names, got {names}")
        if self.strategy is None and self.options:
            raise InvalidOption(f"options {sorted(self.options)} need a strategy: set strategy")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML; fields of stages with default values are left out."""
        content = {**asdict(self), "stages": [_changed_fields(stage) for stage in self.stages]}
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return plain

    @classmethod
    def from_dict(cls, content: Any, where: str = "recipe") -> Recipe:
        """A recipe from plain data.

        Args:
            content: The result of `to_dict`.
            where: Name of the recipe in error messages.

        Raises:
            InvalidOption: A field is unknown or invalid.
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
        """Write the recipe to a file, as JSON if its name ends in ``.json``, else as YAML."""
        import yaml

        path, content = Path(path), self.to_dict()
        text = json.dumps(content, indent=2) if path.suffix == ".json" else yaml.safe_dump(content)
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
        return path

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy of the recipe with other values.

        Args:
            changes: Values by name: ``field``, ``options.field``, ``augment.field`` or
                ``stage.field`` (the stage by name or index). The name of a stage's field without a
                stage changes it in every stage.

        Raises:
            InvalidOption: A name is unknown or a value is invalid.
        """
        recipe = self
        for name, value in changes.items():
            recipe = _with_change(recipe, name, value)
        return recipe


def recipes() -> dict[str, str]:
    """The built-in recipes: their summaries by name.

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
    stages = {stage.name: stage for stage in recipe.stages}
    chosen = [s for i, s in enumerate(recipe.stages) if not dot or head in (str(i), s.name)]
    if option not in _names(Stage) and dot and chosen:
        raise _unknown_field(f"stage {head!r}", option, _names(Stage))
    if option not in _names(Stage) or not chosen:
        places = [f"{place}.FIELD" for place in ("options", *stages)]
        raise _unknown_field("recipe", name, [*_names(Recipe), *_names(Stage), *places])
    # a new length replaces one in the other unit
    withdrawn = next((pair for pair in EXCLUSIVE if option in pair and value is not None), ())
    changes = {**dict.fromkeys(withdrawn), option: value}
    stages |= {stage.name: replace(stage, **changes) for stage in chosen}
    return replace(recipe, stages=tuple(stages.values()))


def _path(name: str) -> Path:
    """Path of a built-in recipe, or of the user's own file."""
    included = FOLDER / f"{name}.yaml"
    if "/" not in name and included.is_file():
        return included
    if not Path(name).is_file():
        raise unknown("recipe (and there is no such file)", name, recipes())
    return Path(name)


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is valid YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidOption(f"{path} cannot be read as a recipe: {error}") from error


def _stage(content: Any) -> Stage:
    if isinstance(content, Stage):
        return content
    name = content.get("name", "train") if isinstance(content, Mapping) else "?"
    return Stage(**_known_fields(content, Stage, f"stage {name!r}"))


def _changed_fields(stage: Stage) -> dict[str, Any]:
    """The name of a stage, and its fields that differ from their defaults."""
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
