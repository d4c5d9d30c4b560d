"""`load_sparsifiner`: loads checkpoints of the authors' published Sparsifiner code."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsiattn.errors import MismatchedPatch
from sparsiattn.patching.apply import patch_quietly
from sparsiattn.patching.handle import Patch
from sparsiattn.strategies.base import Budgets
from sparsiattn.strategies.connectivity import Connectivity

_NAMES = {
    "proj_n": "down",
    "proj_back_n": "up",
    "proj_c_q.weight": "project_q.weight",
    "proj_c_q.bias": "project_q.bias",
    "proj_c_k.weight": "project_k.weight",
    "proj_c_k.bias": "project_k.bias",
}
_PREDICTOR = ".mask_predictor."


def load_sparsifiner(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    keep: Budgets,
    basis_threshold: float = 0.02,
    basis_coef_topk: int | None = 8,
) -> Patch:
    """Patch a timm ``VisionTransformer`` with weights of the authors' published Sparsifiner code.

    The patch computes exactly what the paper describes (arXiv 2303.13755): ``tile=1``, no
    background, and the CLS key is kept only if it is chosen.

    Args:
        model: The model. The backbone's weights are loaded into it and stay after ``unpatch()``.
        state_dict: Backbone weights plus ``blocks.<i>.attn.mask_predictor.*``.
        keep: Share or count of keys per query, the paper's attention keep rate.
        basis_threshold: As in `Connectivity`; the default is the authors' value.
        basis_coef_topk: As in `Connectivity`; the default is the authors' value.

    Returns:
        The active patch.

    Raises:
        MismatchedPatch: A weight is missing, unexpected or of another shape; the model is then
            unchanged.

    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> model = tiny_vit()
    >>> load_sparsifiner(model, model.state_dict(), keep=0.25)
    Traceback (most recent call last):
    sparsiattn.errors.MismatchedPatch: ...
    """
    host = {name: t for name, t in state_dict.items() if _PREDICTOR not in name}
    predictors = _predictors(state_dict)
    _check(model.state_dict(), host)
    first = next(iter(predictors.values()))
    strategy = Connectivity(
        k=keep,
        scores="predictor",
        basis=first["down"].shape[1],
        channels=first["project_q.weight"].shape[0],
        basis_threshold=basis_threshold,
        basis_coef_topk=basis_coef_topk,
        head_scale=True,
        mean_query_boost=False,
        self_weight=None,
        tile=1,
        background=None,
        prefix_keys=False,
    )
    patched = patch_quietly(model, strategy, sites=list(predictors))
    try:
        for runtime in patched.runtimes:
            planner = runtime.planner
            assert isinstance(planner, nn.Module)
            _check(planner.state_dict(), predictors[runtime.site.name])
            planner.load_state_dict(predictors[runtime.site.name])
        # last, so that an error above leaves the model's own weights unchanged
        model.load_state_dict(dict(host), strict=True)
    except BaseException:
        patched.unpatch()
        raise
    return patched


def _predictors(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Site name to planner weights, under this library's names."""
    predictors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        site, separator, rest = name.partition(_PREDICTOR)
        if separator:
            if rest not in _NAMES:
                raise MismatchedPatch(f"unknown predictor weight {name!r}; known: {sorted(_NAMES)}")
            predictors.setdefault(site, {})[_NAMES[rest]] = tensor
    names = set(_NAMES.values())
    complete = [site for site, weights in predictors.items() if set(weights) == names]
    if not predictors or len(complete) != len(predictors):
        raise MismatchedPatch(
            "the state dict needs blocks.<i>.attn.mask_predictor.{proj_n, proj_back_n, proj_c_q, "
            f"proj_c_k}} at every site; complete sites are {complete} of {sorted(predictors)}"
        )
    return predictors


def _check(present: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(present.keys() - loaded), sorted(loaded.keys() - present)
    shared = sorted(present.keys() & loaded)
    reshaped = [n for n in shared if present[n].shape != torch.as_tensor(loaded[n]).shape]
    if missing or extra or reshaped:
        raise MismatchedPatch(
            f"weights do not fit: missing {missing[:5]}, unexpected {extra[:5]}, "
            f"of another shape {reshaped[:5]}"
        )
