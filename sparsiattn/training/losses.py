"""What training minimises: reconstruction, labels, and distance to the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.errors import DataError, InvalidOption
from sparsiattn.patching.model_call import eval_mode, logits_of
from sparsiattn.runtime.handle import Patch, patch_of
from sparsiattn.training.keep import keep_ratio_loss
from sparsiattn.training.penalties import Listener, is_dense
from sparsiattn.training.recipe import Stage
from sparsiattn.training.reconstruction import site_losses
from sparsiattn.training.samples import check_label

_FINAL_NORMS = ("norm", "layernorm", "ln", "layer_norm", "post_layernorm", "ln_post")


class Objective(nn.Module):
    """A model and its losses in one forward, so that DDP and autocast see all that is computed.

    `timm.task` has such modules for distillation, but its teachers are other models with a forward
    of their own: none lets a patch be disabled, compares tokens or looks at attention.

    teacher: a dense model; None where the model itself, its patch disabled, is the teacher.
    """

    def __init__(self, model: nn.Module, stage: Stage, teacher: nn.Module | None) -> None:
        super().__init__()
        self.model, self.stage = model, stage
        self._teacher = (teacher,)  # in a tuple: its weights are none of this module's

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Unweighted losses by name, scalars; images ``[B, C, H, W]``, labels ``[B]`` or ``[B,
        classes]``."""
        live = patch_of(self.model)
        assert live is not None
        wanted, parts = self.stage.losses, {}
        if "reconstruction" in wanted:
            parts["reconstruction"] = torch.stack(site_losses(live, images)).mean()
        if self.stage.runs_student:
            parts |= self._student(live, images, labels)
        return {name: parts[name] for name in wanted}

    def _student(self, live: Patch, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        wanted = self.stage.losses
        watched = final_norm(self.model) if "token_mse" in wanted else None
        parts: dict[str, Tensor] = {}
        if self.stage.penalties and not is_dense(live):
            parts |= self._penalties(live, images)[1]
        with captured(watched) as tokens:
            if self.stage.penalties and is_dense(live):
                logits, parts = self._penalties(live, images)
            else:
                logits = logits_of(self.model(images), self.model)
        if "ce" in wanted:
            parts["ce"] = label_loss(logits, labels, self.stage.label_smoothing)
        if "keep_ratio" in wanted:
            parts["keep_ratio"] = keep_ratio_loss(self.model)
        if self.stage.distils:
            taught, targets = self._teach(live, images)
            if taught.shape != logits.shape:
                raise InvalidOption(
                    f"the teacher gives logits {tuple(taught.shape)}, the model "
                    f"{tuple(logits.shape)}: they must tell the same classes apart"
                )
            parts["kl"] = kl_loss(logits, taught, self.stage.temperature)
            if watched is not None:
                parts["token_mse"] = token_loss(live, tokens[0], targets[0])
        return parts

    def _penalties(self, live: Patch, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of the model with dense attention, and the penalties on its weights."""
        listener = Listener(self.stage.penalties)
        with live.observing(listener):
            logits = logits_of(self.model(images), self.model)
        return logits, listener.parts(self.stage.attention_layers)

    @torch.no_grad()
    def _teach(self, live: Patch, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and last tokens of the dense model."""
        own = self._teacher[0]
        teacher = self.model if own is None else own
        watched = final_norm(teacher) if "token_mse" in self.stage.losses else None
        carried = live.carried  # the student's, which token_loss asks for
        with captured(watched) as tokens:
            if own is not None:
                return logits_of(own(images), own), tokens
            with live.disabled(), eval_mode(teacher):
                logits = logits_of(teacher(images), teacher)
            live.carried = carried
            return logits, tokens


def label_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with class indices ``[B]``, smoothed, or with shares ``[B, classes]`` (mixup).

    Raises `DataError` for labels that the head does not have.
    """
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    logits = logits.float()
    if labels.is_floating_point() and labels.shape == logits.shape:
        return SoftTargetCrossEntropy()(logits, labels)  # type: ignore[no-any-return]
    if labels.is_floating_point() or labels.shape != logits.shape[:1]:
        raise DataError(
            f"labels must be class indices [{len(logits)}] or shares {list(logits.shape)}, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    if labels.device.type == "cpu":  # elsewhere it would wait for the device; there torch asserts
        check_label(int(labels.min()), int(labels.max()), logits.shape[1], "a batch")
    return LabelSmoothingCrossEntropy(smoothing)(logits, labels)  # type: ignore[no-any-return]


def kl_loss(logits: Tensor, taught: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student from the teacher, mean over images; times T^2, as Hinton's
    (arXiv 1503.02531)."""
    student, teacher = ((x.float() / temperature).log_softmax(-1) for x in (logits, taught))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def token_loss(live: Patch, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of the last layer's patch tokens, over those that are still there.

    tokens: ``[B, M, C]`` of the last forward of the patched model, or ``[B, h, w, C]``. targets:
    ``[B, N, C]``, the dense model's. A merged token is compared with all that went into it; a token
    that a policy dropped (DynamicViT in training) counts as little as one that is gone.
    """
    prefix = live.found[-1].prefix_tokens if live.found else 0
    tokens, targets = _sequence(tokens).float(), _sequence(targets).float()
    there = torch.ones(targets.shape[:2], dtype=torch.bool, device=targets.device)
    if tokens.shape[1] != targets.shape[1]:
        places = live.source().to(tokens.device)
        there = places >= 0
        at = places.clamp_min(0)[..., None].expand(-1, -1, tokens.shape[-1])
        tokens = tokens.gather(1, at)
    policy = getattr(live.carried[0], "policy", None) if live.carried is not None else None
    there = there[:, prefix:]
    if policy is not None:
        there = there & (policy.detach() > 0.5)
    errors = (tokens[:, prefix:] - targets[:, prefix:]).square().mean(-1)
    return (errors * there).sum() / there.sum().clamp_min(1)


def _sequence(tokens: Tensor) -> Tensor:
    return tokens.flatten(1, -2)


def final_norm(model: nn.Module) -> nn.Module:
    """The module whose output is the last layer's tokens: timm's ``norm``, transformers'
    ``vit.layernorm``, torchvision's ``encoder.ln``."""
    base = getattr(model, "base_model_prefix", "")
    for holder in ("", base, "encoder", f"{base}.encoder"):
        for name in _FINAL_NORMS:
            found = _member(model, f"{holder}.{name}".strip("."))
            if found is not None:
                return found
    raise InvalidOption(
        f"token_mse compares the output of the last norm, and {type(model).__name__} has no module "
        f"named {', '.join(_FINAL_NORMS)} where one would look for it: set token_mse=0"
    )


def _member(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


@contextmanager
def captured(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """What a module returns inside the block."""
    seen: list[Tensor] = []
    if module is None:
        yield seen
        return

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        seen.append(output)

    hook = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
