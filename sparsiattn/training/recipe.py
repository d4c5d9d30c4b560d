"""How a patched model is trained: stages and their numbers, as data that can be kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from sparsiattn.errors import InvalidOption, unknown

TRAINABLE = ("planners", "backbone", "both")
PRECISIONS = ("no", "bf16", "fp16")
PENALTIES = ("attention_log", "attention_entropy")
LOSSES = ("reconstruction", "ce", "kl", "token_mse", "keep_ratio", *PENALTIES)
FOLDER = Path(__file__).resolve().parent / "recipes"


@dataclass(frozen=True)
class Stage:
    """One stage of training, with a cosine schedule of its own.

    trainable: ``"planners"``, ``"backbone"`` or ``"both"``. epochs, steps: its length, in passes
    over the data or in updates; one of the two. optimizer: a name of `timm.optim`. lr, min_lr,
    warmup_lr: at the end of the warm-up, at the end, at the start. backbone_lr_scale: with
    trainable ``"both"``, the backbone's rate as a share of the planners', at all times.
    warmup_epochs, warmup_steps: how long it warms up, one of the two. clip: largest norm of the
    gradient. ema_decay: of the moving average of the weights, with which the stage is evaluated and
    ends. grad_checkpointing: recompute instead of keeping activations. keep_epochs: ``(start,
    end)``: token strategies and hybrids keep everything before epoch ``start`` and what was asked
    for from ``end`` on, on a cosine between (EViT, arXiv 2202.07800, section 4). For that the model
    is patched anew between epochs, planners keep their weights; ask `sparsiattn.patch_of` for its
    `Patch` afterwards.

    prune: share of the model's weights, the smallest ones, that is zero from the first update of
    the stage to its last (`sparsiattn.training.pruning`: zeros save no time). prune_norms: gains of
    normalisation layers among them.

    Weights of the losses: reconstruction (planners against the model's own dense attention), ce
    (labels, with label_smoothing), kl (logits against the dense model, at a temperature), token_mse
    (patch tokens of the last layer against the dense model's), keep_ratio (DynamicViT's),
    attention_log and attention_entropy (`sparsiattn.training.penalties`, on the model's dense
    attention, in attention_layers: ``"all"`` or ``"last"``; they need all of its weights in memory,
    and where the strategy is not ``dense`` a forward pass more).

    >>> Stage(name="predictor", trainable="planners", epochs=5, lr=3e-4, reconstruction=1.0).losses
    {'reconstruction': 1.0}
    """

    name: str = "train"
    trainable: str = "backbone"
    epochs: int | None = None
    steps: int | None = None
    optimizer: str = "adamw"
    lr: float = 1e-4
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    backbone_lr_scale: float = 1.0
    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.05
    clip: float | None = None
    reconstruction: float = 0.0
    ce: float = 0.0
    label_smoothing: float = 0.0
    kl: float = 0.0
    temperature: float = 1.0
    token_mse: float = 0.0
    keep_ratio: float = 0.0
    attention_log: float = 0.0
    attention_entropy: float = 0.0
    attention_layers: str = "all"
    prune: float = 0.0
    prune_norms: bool = True
    ema_decay: float | None = None
    grad_checkpointing: bool = False
    keep_epochs: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        _check_fields(self, where, _STAGE)
        for one, other in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise InvalidOption(f"{where} takes {one} or {other}, got both")
        if self.epochs is None and self.steps is None:
            raise InvalidOption(f"{where} needs epochs or steps: how long it lasts")
        if self.min_lr > self.lr:
            raise InvalidOption(f"{where}: min_lr={self.min_lr} is above lr={self.lr}")
        if self.backbone_lr_scale != 1.0 and self.trainable != "both":
            raise InvalidOption(
                f"{where}: backbone_lr_scale={self.backbone_lr_scale} sets backbone and planners "
                f"apart, which needs trainable: both, got {self.trainable!r}: set lr instead"
            )
        if self.grad_checkpointing and self.penalties:
            raise InvalidOption(
                f"{where}: {' and '.join(self.penalties)} read attention weights that "
                "grad_checkpointing would not keep: leave one of the two out"
            )
        if not self.losses:
            raise InvalidOption(
                f"{where} has nothing to minimise: give one of {', '.join(LOSSES)} a weight above 0"
            )

    @property
    def losses(self) -> dict[str, float]:
        """Name to weight of every loss that counts."""
        return {name: getattr(self, name) for name in LOSSES if getattr(self, name) > 0}

    @property
    def distils(self) -> bool:
        """Whether a teacher is asked."""
        return bool({"kl", "token_mse"} & set(self.losses))

    @property
    def penalties(self) -> list[str]:
        """Those on attention weights that count."""
        return [name for name in self.losses if name in PENALTIES]

    @property
    def runs_student(self) -> bool:
        """Whether the sparse model itself runs, not only its dense attention."""
        return set(self.losses) != {"reconstruction"}


@dataclass(frozen=True)
class Recipe:
    """How to train: a strategy, stages, and what all of them share.

    strategy, options: what `sparsiattn.patch` takes; None for whatever the model is patched with.
    batch_size: images in one forward pass, over all processes; an update sees ``batch_size *
    accumulation`` images, on however many. mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
    augment: options of the loader's training images by timm's names. image_size: in pixels. seed:
    of order, augmentation and dropout. workers: processes that read images. checkpoint_steps:
    updates between checkpoints; None for one an epoch. tensorboard: write event files beside the
    JSON-lines log. summary: a line about it. model: the timm model it was written for; published:
    what its authors report, for comparison.

    >>> recipe = Recipe("connectivity", {"k": 0.1}, stages=[Stage(epochs=1, ce=1.0)])
    >>> Recipe.from_dict(recipe.to_dict()) == recipe
    True
    >>> recipe.changed({"train.lr": 0.01, "options.k": 0.5, "seed": 3}).stages[0].lr
    0.01
    """

    strategy: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    batch_size: int = 64
    accumulation: int = 1
    mixed_precision: str = "no"
    augment: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    seed: int = 0
    workers: int = 0
    checkpoint_steps: int | None = None
    tensorboard: bool = False
    summary: str = ""
    model: str | None = None
    published: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_fields(self, "recipe", _RECIPE)
        object.__setattr__(self, "stages", tuple(_stage(one) for one in self.stages))
        if not self.stages:
            raise InvalidOption("a recipe needs at least one stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise InvalidOption(f"stages need names that differ, got {names}")
        if self.strategy is None and self.options:
            raise InvalidOption(f"options {sorted(self.options)} need a strategy to go to")

    @property
    def update_size(self) -> int:
        """Images that one update sees."""
        return self.batch_size * self.accumulation

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and YAML; fields that say nothing are left out of stages."""
        found = asdict(self)
        found["stages"] = [_said(stage) for stage in self.stages]
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain

    @classmethod
    def from_dict(cls, content: Any, where: str = "recipe") -> Recipe:
        """A recipe from plain data. Raises `InvalidOption` for unknown or wrong fields."""
        return cls(**_known(content, _RECIPE, where))

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

        Names are ``field``, ``options.field``, ``augment.field`` or ``stage.field`` (the stage by
        name or number); a stage's field alone counts for every stage.
        """
        recipe = self
        for name, value in changes.items():
            recipe = _changed(recipe, name, value)
        return recipe


def recipes() -> dict[str, str]:
    """Name to summary of the recipes that come along.

    >>> "sparsifiner_deit_small" in recipes()
    True
    """
    return {path.stem: str(_read(path)["summary"]) for path in sorted(FOLDER.glob("*.yaml"))}


def _changed(recipe: Recipe, name: str, value: Any) -> Recipe:
    head, dot, rest = name.partition(".")
    if not dot and name in _RECIPE:
        return replace(recipe, **{name: value})
    if not dot and name in _STAGE:
        stages = [replace(stage, **_length({name: value})) for stage in recipe.stages]
        return replace(recipe, stages=tuple(stages))
    if head in ("options", "augment") and rest:
        change: dict[str, Any] = {head: {**getattr(recipe, head), rest: value}}
        return replace(recipe, **change)
    places = {key for i, stage in enumerate(recipe.stages) for key in (str(i), stage.name)}
    if not dot or head not in places:
        known = [*_RECIPE, *_STAGE, *(f"{place}.FIELD" for place in (*places, "options"))]
        raise _wrong("recipe", name, known)
    if rest not in _STAGE:
        raise _wrong(f"stage {head!r}", rest, _STAGE)
    stages = [
        replace(stage, **_length({rest: value})) if head in (str(i), stage.name) else stage
        for i, stage in enumerate(recipe.stages)
    ]
    return replace(recipe, stages=tuple(stages))


def _length(change: dict[str, Any]) -> dict[str, Any]:
    """A change of one of two ways to say a length withdraws the other."""
    for pair in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        for name, other in (pair, pair[::-1]):
            if change.get(name) is not None:
                return {**change, other: None}
    return change


def _path(name: str) -> Path:
    """Of a recipe that comes along, or of the user's own file."""
    own = FOLDER / f"{name}.yaml"
    if "/" not in name and own.is_file():
        return own
    if not Path(name).is_file():
        raise unknown("recipe (and there is no such file)", name, recipes())
    return Path(name)


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML, too
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidOption(f"{path} cannot be read as a recipe: {error}") from error


def _stage(one: Any) -> Stage:
    if isinstance(one, Stage):
        return one
    name = one.get("name", "train") if isinstance(one, Mapping) else "?"
    return Stage(**_known(one, _STAGE, f"stage {name!r}"))


def _said(stage: Stage) -> dict[str, Any]:
    """Fields of a stage that differ from their defaults."""
    return {f.name: getattr(stage, f.name) for f in fields(stage) if _differs(stage, f)}


def _differs(stage: Stage, one: Any) -> bool:
    return bool(one.name == "name" or getattr(stage, one.name) != one.default)


def _known(content: Any, known: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise InvalidOption(f"{where} must be a mapping with {', '.join(known)}, got {content!r}")
    for name in content:
        if name not in known:
            raise _wrong(where, name, known)
    return dict(content)


def _wrong(where: str, name: object, known: Iterable[str]) -> InvalidOption:
    return InvalidOption(str(unknown(f"field of {where}:", name, known)))


Check = tuple[Callable[[Any], bool], str]


def _number(low: float, high: float = float("inf"), *, open_low: bool = False) -> Check:
    def fits(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        return (low < value if open_low else low <= value) and value <= high

    bound = "" if high == float("inf") else f" and <= {high:g}"
    return fits, f"a number {'>' if open_low else '>='} {low:g}{bound}"


def _count(low: int) -> Check:
    return lambda value: type(value) is int and value >= low, f"an int >= {low}"


def _one_of(*known: str) -> Check:
    return lambda value: value in known, f"one of {', '.join(known)}"


def _kind(kind: Any, words: str) -> Check:
    return lambda value: isinstance(value, kind), words


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check[0](value), f"{check[1]}, or None"


def _is_span(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(type(epoch) is int for epoch in value)
        and 0 <= value[0] < value[1]
    )


_TEXT, _MAP = _kind(str, "a text"), _kind(Mapping, "a mapping")
_WEIGHT, _YES = _number(0), _kind(bool, "true or false")
_SHARE = _number(0, 0.9999999)

_STAGE: dict[str, Check] = {
    "name": (lambda name: isinstance(name, str) and name.isidentifier(), "a name without dots"),
    "trainable": _one_of(*TRAINABLE), "epochs": _or_none(_count(1)), "steps": _or_none(_count(1)),
    "optimizer": _TEXT, "lr": _number(0, open_low=True), "min_lr": _WEIGHT, "warmup_lr": _WEIGHT,
    "backbone_lr_scale": _number(0, open_low=True),
    "warmup_epochs": _or_none(_WEIGHT), "warmup_steps": _or_none(_count(0)),
    "weight_decay": _WEIGHT, "clip": _or_none(_number(0, open_low=True)),
    **dict.fromkeys(LOSSES, _WEIGHT), "label_smoothing": _SHARE,
    "temperature": _number(0, open_low=True), "ema_decay": _or_none(_SHARE),
    "grad_checkpointing": _YES,
    "attention_layers": _one_of("all", "last"), "prune": _SHARE, "prune_norms": _YES,
    "keep_epochs": _or_none((_is_span, "(start, end), epochs with 0 <= start < end")),
}  # fmt: skip
_RECIPE: dict[str, Check] = {
    "strategy": _or_none(_TEXT), "options": _MAP, "stages": _kind((list, tuple), "a list"),
    "batch_size": _count(1), "accumulation": _count(1), "mixed_precision": _one_of(*PRECISIONS),
    "augment": _MAP, "image_size": _or_none(_count(1)), "seed": _count(0), "workers": _count(0),
    "checkpoint_steps": _or_none(_count(1)), "tensorboard": _YES, "summary": _TEXT,
    "model": _or_none(_TEXT), "published": _MAP,
}  # fmt: skip


def _check_fields(one: Any, where: str, checks: Mapping[str, Check]) -> None:
    """Raise `InvalidOption` for a wrong value; numbers that YAML takes for text (3e-4) and lists
    are put right."""
    for name, (fits, words) in checks.items():
        value = _plain(getattr(one, name), words)
        if not fits(value):
            raise InvalidOption(f"{where}: {name} must be {words}, got {value!r}")
        object.__setattr__(one, name, value)


def _plain(value: Any, words: str) -> Any:
    if isinstance(value, str) and words.startswith("a number"):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if isinstance(value, list) else value
