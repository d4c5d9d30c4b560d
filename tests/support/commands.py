"""Commands as tests run them, on a small timm model."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from sparsiattn.cli import app

NAME = "vit_tiny_patch16_224"


def small(patch_size: int = 4) -> dict[str, Any]:
    """Options that make `NAME` a small model, of 64 or, with patches of 8 pixels, 16 patches."""
    sizes = {"img_size": 32, "patch_size": patch_size, "num_classes": 5}
    return {**sizes, "depth": 2, "embed_dim": 48, "num_heads": 3}


def model_options(options: dict[str, Any]) -> list[str]:
    """The same on the command line."""
    return [
        word for name, value in options.items() for word in ("--model-option", f"{name}={value}")
    ]


def run(*arguments: object, code: int = 0) -> Any:
    """The command's result, which must end with that exit code and without a traceback."""
    result = CliRunner().invoke(app, [str(text) for text in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result
