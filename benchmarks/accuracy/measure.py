"""One protocol for every row: top-1, agreement with the dense model, MACs; images per second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cifar
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn.runtime.timing import paired

BATCH, ROUNDS, TIMED = 250, 9, 64


@dataclass
class Protocol:
    """The test images, and what the dense model says of each."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    dense: Tensor

    @classmethod
    def of(cls, model: nn.Module, images: Tensor, labels: Tensor) -> Protocol:
        return cls(model, images, labels, predictions(model, images))

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """A row of ``model``, patched or not; agreement is with the dense model it started as."""
        found = predictions(model, self.images)
        row: dict[str, Any] = {
            "top1": _per_cent(found == self.labels),
            "agreement": _per_cent(found == self.dense),
        }
        live = sparsiattn.patch_of(model)
        if live is not None:
            report = live.report()
            row |= {key: getattr(report, key) for key in MACS}
        return row

    @torch.inference_mode()
    def speed(self, model: nn.Module) -> dict[str, Any]:
        """Images per second, in rounds that take turns with the same model without its patch."""
        live = sparsiattn.patch_of(model)
        assert live is not None
        batch = cifar.normalise(self.images[:TIMED])

        def dense() -> None:
            with live.disabled():
                model(batch)

        timed = paired(dense, lambda: model(batch), ROUNDS).to_dict()
        return {
            "images_per_second": round(1e3 * TIMED / timed["second_ms"], 1),
            "dense_images_per_second": round(1e3 * TIMED / timed["first_ms"], 1),
            "ratio": round(1 / timed["ratio"], 3),
        }


MACS = ("macs_dense", "macs", "mhsa_macs_dense", "mhsa_macs", "predictor_macs")


@torch.inference_mode()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """The class of the largest logit, ``[N]``."""
    model.eval()
    return torch.cat([model(cifar.normalise(x)).argmax(-1) for x in images.split(BATCH)])


def _per_cent(right: Tensor) -> float:
    return round(100 * right.double().mean().item(), 2)
