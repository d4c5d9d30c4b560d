"""The one place where the command line turns a name into a model."""

from __future__ import annotations

from typing import Any


def with_noise(
    name: str, size: int | None, batch: int, device: str, dtype: Any, pretrained: bool
) -> tuple[Any, Any]:
    """The timm model and a batch of noise of the size it takes."""
    import torch

    model = create(name, size, pretrained).eval().to(device, dtype)
    torch.manual_seed(0)
    return model, torch.randn(batch, *image_shape(model, size)[1:]).to(device, dtype)


def create(name: str, size: int | None, pretrained: bool = False) -> Any:
    import timm

    from sparsiattn.errors import InvalidOption

    extra = {} if size is None else {"img_size": size}
    try:
        return timm.create_model(name, pretrained=pretrained, **extra)
    except (RuntimeError, TypeError) as error:
        raise InvalidOption(
            f"timm cannot make {name!r}{f' with {extra}' if extra else ''}: {error}"
        ) from error


def image_shape(model: Any, size: int | None) -> tuple[int, ...]:
    """Of one image: the pixels asked for, else those the model was trained on."""
    channels, rows, columns = model.pretrained_cfg["input_size"]
    return 1, channels, size or rows, size or columns
