"""`create_model`: create a model of timm, transformers or torchvision, or of a folder, by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from sparsiattn.errors import InvalidOption, UnknownName, first_line
from sparsiattn.serialization.files import CONFIG, NEW
from sparsiattn.serialization.host import host_of
from sparsiattn.serialization.origin import mark

_MORE = "local-dir:", "hf-hub:", "hf_hub:"
"""Prefixes that timm itself understands."""


def create_model(
    name: str, *, image_size: int | None = None, pretrained: bool = False, **options: Any
) -> nn.Module:
    """Create a Vision Transformer by name, as every command does.

    Args:
        name: A timm model (``deit_small_patch16_224``); ``hf:ORG/NAME`` or ``hf:FOLDER`` with the
            configuration of a transformers model, created as an image classifier if possible;
            ``tv:NAME`` of torchvision; or a folder that `Patch.save` wrote, of which the unpatched
            model is created (`from_pretrained` applies the patch too).
        image_size: Side of its images in pixels; None for the model's default.
        pretrained: Whether to download weights. Otherwise they are random, unless a folder
            contains them.
        **options: Options of ``timm.create_model``, of the transformers configuration, or of the
            torchvision builder.

    Returns:
        The model, unpatched.

    Raises:
        UnknownName: No library has this name; the message lists close matches.
        InvalidOption: The model cannot be created.

    >>> model = create_model("test_vit", num_classes=5)
    >>> type(model).__name__, model.num_classes
    ('VisionTransformer', 5)
    """
    if is_saved(name):
        if options or image_size is not None:
            raise InvalidOption(
                f"{name} is a saved patch, which sets image size and options of its model itself: "
                "remove them, or pass the name of the model instead of the folder"
            )
        return host_of(name, pretrained=pretrained)
    space, _, bare_name = name.partition(":")
    makers: dict[str, Callable[..., nn.Module]] = {"hf": _transformers, "tv": _torchvision}
    if bare_name and space in makers:
        return makers[space](bare_name, image_size, pretrained, options)
    return _timm(name, image_size, pretrained, options)


def is_saved(name: str) -> bool:
    """Whether a name is a folder with a saved patch, complete or interrupted.

    >>> is_saved("vit_base_patch16_224")
    False
    """
    return any((Path(name) / f"{CONFIG}{end}").is_file() for end in ("", NEW))


def _timm(name: str, size: int | None, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    if not name.startswith(_MORE) and not timm.is_model(name):
        raise unknown_model(name)
    options = options if size is None else {"img_size": size, **options}
    return _make("timm", timm.create_model, name, options, pretrained=pretrained)


def _make(
    library: str, build: Callable[..., nn.Module], name: str, options: dict[str, Any], **extra: Any
) -> nn.Module:
    """Build a model and record how it was made.

    Args:
        library: Name of the library.
        build: The library's function.
        name: Name of the model.
        options: Its options.
        **extra: More arguments of the function, which are not recorded.
    """
    try:
        model = build(name, **extra, **options)
    except Exception as error:  # constructors, the network and the Hub have their own errors
        raise InvalidOption(
            f"{library} cannot create {name!r}{f' with {options}' if options else ''}: {error}"
        ) from error
    return mark(model, {"library": library, "name": name, "options": options})


def unknown_model(name: str) -> UnknownName:
    """The error for a name that no library has, with close matches from each library.

    >>> print(str(unknown_model("vit_b_17"))[:40])
    no model 'vit_b_17' in timm. Did you mea
    """
    where = "in timm"
    if Path(name).is_dir():
        where = "in timm, and the folder has no saved patch (use hf:FOLDER for transformers)"
    close = _close(name)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return UnknownName(
        f"no model {name!r} {where}.{hint} MODEL must be a timm name, hf:ORG/NAME, tv:NAME, or a "
        "folder that patch.save wrote"
    )


def _close(name: str) -> list[str]:
    """Up to three close names from each library, without network access."""
    import timm

    _, _, bare = name.rpartition(":")
    repository = bare if "/" in bare else f"/{bare}"
    close = get_close_matches(bare, timm.list_models(), n=3, cutoff=0.5)
    for prefix, word, names in (
        ("tv:", bare, _torchvision_names()),
        ("hf:", repository, cached_repositories()),
    ):
        close += [prefix + match for match in get_close_matches(word, names, n=3, cutoff=0.6)]
    return close


def _torchvision_names() -> list[str]:
    try:
        from torchvision.models import list_models
    except ImportError:  # not installed, or broken: its names are only hints
        return []
    return list(list_models())


def cached_repositories() -> list[str]:
    """Names ``ORG/NAME`` of the models in the local Hugging Face cache."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob("models--*")
    return sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in folders)


def _torchvision(
    name: str, size: int | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    _need("torchvision", "tv:", "train")
    from torchvision import models

    if name not in models.list_models():
        close = get_close_matches(name, models.list_models(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(f'tv:{match}' for match in close)}?" if close else ""
        raise UnknownName(f"torchvision has no model {name!r}.{hint}")
    builder = models.get_model_builder(name)
    # only its ViT is built for a fixed image size
    if size is not None and builder.__module__ == "torchvision.models.vision_transformer":
        options = {"image_size": size, **options}
    weights = "DEFAULT" if pretrained else None
    return _make("torchvision", models.get_model, name, options, weights=weights)


def _transformers(
    name: str, size: int | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    _need("transformers", "hf:", "hf")
    import transformers

    config = _config(name, options if size is None else {"image_size": size, **options})
    classifiers = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    classifies = type(config) in classifiers.keys()  # noqa: SIM118
    auto = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
    try:
        if pretrained:
            return auto.from_pretrained(name, config=config)  # type: ignore[no-any-return]
        return auto.from_config(config)  # type: ignore[no-any-return]
    except Exception as error:  # constructors, the network and the Hub have their own errors
        raise InvalidOption(f"transformers cannot create {name!r}: {first_line(error)}") from error


def _config(name: str, extra: dict[str, Any]) -> Any:
    """The model's configuration, from a folder, the cache or the network."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(name, **extra)
    except OSError as error:
        reason = first_line(error).rstrip(".")
        close = get_close_matches(name, cached_repositories(), n=3, cutoff=0.5)
        hint = f" In the cache: {', '.join(f'hf:{match}' for match in close)}." if close else ""
        raise UnknownName(
            f"no model configuration at {name!r}: {reason}.{hint} It must be a folder with "
            "config.json, a repository in the cache, or a repository on a reachable Hub"
        ) from error
    except Exception as error:  # unknown types, remote code, wrong options
        raise InvalidOption(f"transformers cannot read {name!r}: {first_line(error)}") from error


def _need(package: str, prefix: str, extra: str) -> None:
    if find_spec(package) is None:
        raise InvalidOption(
            f"{prefix} names need {package}, which is not installed: "
            f"pip install 'sparsiattn[{extra}]'"
        )
