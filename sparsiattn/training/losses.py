"""Training losses: reconstruction, labels, and distance to the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.attention.budget import count_of
from sparsiattn.errors import DataError, InvalidOption
from sparsiattn.patching.handle import Patch, patch_of
from sparsiattn.patching.model_call import eval_mode, logits_of
from sparsiattn.strategies.keep_predictor import KeepPredictor
from sparsiattn.training.penalties import PenaltyObserver
from sparsiattn.training.reconstruction import site_losses
from sparsiattn.training.samples import check_labels
from sparsiattn.training.stage import Stage

_FINAL_NORMS = ("norm", "layernorm", "ln", "layer_norm", "post_layernorm", "ln_post")


class Objective(nn.Module):
    """A model and its losses in one module, so that DDP and autocast cover all computation.

    `timm.task` has similar modules for distillation, but their teachers are separate models. They
    cannot disable a patch, compare tokens or read attention.

    Args:
        model: The patched model.
        stage: The training stage, which sets the losses.
        teacher: A dense model; None to use the model itself with its patch disabled.
    """

    def __init__(self, model: nn.Module, stage: Stage, teacher: nn.Module | None) -> None:
        super().__init__()
        self.model, self.stage = model, stage
        self._teacher = (teacher,)  # in a tuple, so that its weights are not registered here

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            images: ``[B, C, H, W]``.
            labels: ``[B]`` or ``[B, classes]``.

        Returns:
            Unweighted scalar losses by name, in the order of the stage's losses.
        """
        patch = patch_of(self.model)
        assert patch is not None
        losses = {}
        if "reconstruction" in self.stage.losses:
            losses["reconstruction"] = torch.stack(site_losses(patch, images)).mean()
        if self.stage.runs_student:
            losses |= self._student_losses(patch, images, labels)
        return {name: losses[name] for name in self.stage.losses}

    def _student_losses(self, patch: Patch, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        stage, dense = self.stage, patch.strategy.name == "dense"
        observer = PenaltyObserver(stage.penalties)
        if stage.penalties and not dense:
            with patch.observing(observer):
                self.model(images)
        # a dense model is not changed by observing, so one forward pass is enough
        observing = patch.observing(observer) if stage.penalties and dense else nullcontext()
        norm = final_norm(self.model) if stage.token_mse else None
        with captured(norm) as tokens, observing:
            logits = logits_of(self.model(images), self.model)
        losses = observer.penalties(stage.attention_layers) if stage.penalties else {}
        if stage.ce:
            losses["ce"] = label_loss(logits, labels, stage.label_smoothing)
        if stage.keep_ratio:
            losses["keep_ratio"] = keep_ratio_loss(self.model)
        if stage.distils:
            teacher_logits, targets = self._teach(patch, images)
            losses["kl"] = kl_loss(logits, teacher_logits, stage.temperature)
            if norm is not None:
                losses["token_mse"] = token_loss(patch, tokens[0], targets[0])
        return losses

    @torch.no_grad()
    def _teach(self, patch: Patch, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and the last layer's tokens of the dense model."""
        (user_teacher,) = self._teacher
        teacher = self.model if user_teacher is None else user_teacher
        norm = final_norm(teacher) if self.stage.token_mse else None
        student_pass = patch.last_pass  # token_loss needs it
        with captured(norm) as tokens, patch.disabled(), eval_mode(teacher):
            logits = logits_of(teacher(images), teacher)
        patch.last_pass = student_pass
        return logits, tokens


def label_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy.

    Args:
        logits: ``[B, classes]``.
        labels: Class indices ``[B]``, or probabilities ``[B, classes]`` (mixup).
        smoothing: Label smoothing for class indices, from 0 to 1.

    Returns:
        A scalar, the mean over images.

    Raises:
        DataError: Labels do not fit the head.
    """
    logits = logits.float()
    if labels.is_floating_point() and labels.shape == logits.shape:
        return F.cross_entropy(logits, labels.float())
    if labels.is_floating_point() or labels.shape != logits.shape[:1]:
        raise DataError(
            f"labels must be class indices [{len(logits)}] or probabilities {list(logits.shape)}, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if labels.device.type == "cpu":
        check_labels(labels, logits.shape[1])
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def kl_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student from the teacher, times T^2 (Hinton et al., arXiv 1503.02531).

    Args:
        logits: ``[B, classes]`` of the student.
        teacher_logits: ``[B, classes]`` of the teacher.
        temperature: Both logits are divided by it.

    Returns:
        A scalar, the mean over images.

    Raises:
        InvalidOption: The two have different numbers of classes.
    """
    if teacher_logits.shape != logits.shape:
        raise InvalidOption(
            f"the teacher gives logits {tuple(teacher_logits.shape)}, the model "
            f"{tuple(logits.shape)}: both must have the same classes"
        )
    student, teacher = ((x.float() / temperature).log_softmax(-1) for x in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def token_loss(patch: Patch, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of the last layer's patch tokens, over the tokens that are left.

    A merged token is compared with every token that it was merged from. A token that a policy
    dropped (DynamicViT in training) does not count.

    Args:
        patch: The model's patch, after the forward pass.
        tokens: Tokens of the patched model, ``[B, M, C]`` or ``[B, h, w, C]``.
        targets: Tokens of the dense model, ``[B, N, C]`` or ``[B, h, w, C]``.
    """
    prefix = patch.model_sites[-1].prefix_tokens if patch.model_sites else 0
    tokens, targets = (x.flatten(1, -2).float() for x in (tokens, targets))
    present = torch.ones(targets.shape[:2], dtype=torch.bool, device=targets.device)
    if tokens.shape[1] != targets.shape[1]:
        places = patch.source().to(tokens.device)
        present = places >= 0
        index = places.clamp_min(0)[..., None].expand(-1, -1, tokens.shape[-1])
        tokens = tokens.gather(1, index)
    policy = getattr(patch.last_pass[0], "policy", None) if patch.last_pass is not None else None
    present = present[:, prefix:]
    if policy is not None:
        present = present & (policy.detach() > 0.5)
    errors = (tokens[:, prefix:] - targets[:, prefix:]).square().mean(-1)
    return (errors * present).sum() / present.sum().clamp_min(1)


def keep_ratio_loss(model: nn.Module) -> Tensor:
    """The keep ratio loss of DynamicViT for the last forward pass in training mode, a scalar.

    It is the mean over layers and images of (kept share of all patch tokens - target share)^2
    (arXiv 2106.02034, eq. 12); the authors multiply it by 2. Add it to the task's loss while
    training a model patched with ``token_drop(score="learned")``.

    Args:
        model: The patched model, after a forward pass in training mode.

    Raises:
        InvalidOption: The model has no learned token scores, or has not run in training mode yet.

    >>> import timm, torch, sparsiattn
    >>> model = timm.create_model("test_vit").train()
    >>> patch = sparsiattn.patch(model, "token_drop", score="learned", keep=0.7)
    >>> _ = model(torch.randn(2, 3, 160, 160))
    >>> 0 <= keep_ratio_loss(model).item() < 1
    True
    """
    patch = patch_of(model)
    blocks = [] if patch is None else patch.blocks
    scored = [(b.site, b.planner) for b in blocks if isinstance(b.planner, KeepPredictor)]
    if not scored:
        raise InvalidOption(
            "keep_ratio_loss() needs learned token scores, and this model has none: patch it with "
            "patch(model, 'token_drop', score='learned')"
        )
    rows, columns = scored[0][0].grid
    count, losses = rows * columns, []
    for _, planner in scored:
        if planner.share is None or isinstance(planner.keep, str):
            raise InvalidOption(
                "keep_ratio_loss() needs a forward pass in training mode first, and a fixed keep"
            )
        count = count_of(planner.keep, count)
        losses.append((planner.share - count / (rows * columns)).square().mean())
    return torch.stack(losses).mean()


def final_norm(model: nn.Module) -> nn.Module:
    """The module that outputs the last layer's tokens.

    It is ``norm`` in timm, ``vit.layernorm`` in transformers and ``encoder.ln`` in torchvision.
    """
    base = getattr(model, "base_model_prefix", "")
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    parents = ("", base, "encoder", f"{base}.encoder")
    for parent, name in product(parents, _FINAL_NORMS):
        path = f"{parent}.{name}".strip(".")
        if path in modules:
            return modules[path]
    raise InvalidOption(
        f"token_mse compares the output of the last norm, but {type(model).__name__} has no module "
        f"named {', '.join(_FINAL_NORMS)} in the usual places: set token_mse=0"
    )


@contextmanager
def captured(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect the outputs of a module inside the block."""
    outputs: list[Tensor] = []
    if module is None:
        yield outputs
        return
    with module.register_forward_hook(lambda module, args, output: outputs.append(output)):
        yield outputs
