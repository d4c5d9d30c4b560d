"""Kernels on CUDA whose library may be missing.

A library is imported on first use, and without a word on the terminal.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.errors import first_line
from sparsiattn.kernels.base import Kernel
from sparsiattn.kernels.gather import needs_grad


class LibraryKernel(Kernel):
    """A kernel that calls a library of CUDA kernels."""

    def missing(self) -> str:
        """Why the library does not serve; empty if it does. Imports it on first use."""
        raise NotImplementedError

    def why_unavailable(self) -> list[str]:
        if not torch.cuda.is_available():
            return ["needs a CUDA device"]
        if torch.compiler.is_compiling():
            return ["cannot be traced by torch.compile"]
        reason = self.missing()
        return [reason] if reason else []

    def not_ready(self, inputs: AttentionInputs, pattern: Pattern) -> list[str]:
        if inputs.q.device.type == "meta":
            return ["a dry run does not know whether operands are in half precision on a GPU"]
        return []


def key_block_refusals(inputs: AttentionInputs) -> list[str]:
    """Reasons why a library without gradients, masks and dropout for key blocks cannot run."""
    device, types = inputs.q.device.type, {x.dtype for x in (inputs.q, inputs.k, inputs.v)}
    reasons = []
    if device not in ("cuda", "meta"):
        reasons.append(f"needs CUDA tensors, got {device}")
    if inputs.bias is not None:
        reasons.append("does not support the model's mask")
    if inputs.dropout:
        reasons.append("does not support dropout for key blocks")
    if needs_grad(inputs):
        reasons.append("has no backward pass for key blocks")
    if device != "meta" and not (len(types) == 1 and types <= {torch.float16, torch.bfloat16}):
        reasons.append(f"needs half precision, got {', '.join(sorted(map(str, types)))}")
    return reasons


def load(home: str) -> tuple[Any, str]:
    """Import a module of a library that may be missing.

    A wheel for another CUDA or torch version may raise any error on import.

    Args:
        home: The module, as in ``"xformers.ops.fmha"``.

    Returns:
        The module and an empty text; or None, and why it cannot be imported.
    """
    name = home.partition(".")[0]
    try:
        with silence(name):
            return importlib.import_module(home), ""
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, f"{name} is not installed"
        return None, f"{name} needs {error.name}, which is not installed"
    except Exception as error:
        return None, f"{name} cannot be imported ({first_line(error)})"


@contextmanager
def silence(name: str) -> Iterator[None]:
    """Suppress the warnings and the log of the library of this name."""
    loggers = [logging.getLogger(name), logging.getLogger(f"{name}_fmha")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was
