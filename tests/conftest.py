"""Shared fixtures; tests that need the authors' fixtures skip where the folder is absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

# what someone tuned on this machine must not decide which kernels are tested
os.environ["SPARSIATTN_CACHE"] = str(Path(__file__).with_name("no-tuning-here"))

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
    assert callable(F.scaled_dot_product_attention)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    folder = SHARED / "fixtures"
    if not folder.is_dir():
        pytest.skip("the authors' fixtures are not here")
    return folder
