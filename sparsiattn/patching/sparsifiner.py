"""Checkpoints of the authors' published Sparsifiner code, moved over in one line."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsiattn.errors import MismatchedPatch
from sparsiattn.patching.apply import patch
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
    """Patch a timm ``VisionTransformer`` with weights of the authors' published code.

    state_dict: backbone weights plus ``blocks.<i>.attn.mask_predictor.*``. keep: attention keep
    rate. The patch is paper-exact: ``tile=1``, no background, CLS column not forced. The
    backbone's weights are loaded into ``model`` and stay there after ``unpatch()``.

    Raises `MismatchedPatch` if a weight is missing, unexpected or of another shape; the model is
    then untouched. basis_threshold, basis_coef_topk: of `Connectivity`, at the authors' values.

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
    handle = patch(model, strategy, sites=list(predictors))
    try:
        for runtime in handle.runtimes:
            planner = runtime.planner
            assert isinstance(planner, nn.Module)
            _check(planner.state_dict(), predictors[runtime.site.name])
            planner.load_state_dict(predictors[runtime.site.name])
        model.load_state_dict(dict(host), strict=True)
    except BaseException:
        handle.unpatch()
        raise
    return handle


def _predictors(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Site name to planner weights, under this library's names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        site, separator, rest = name.partition(_PREDICTOR)
        if separator:
            if rest not in _NAMES:
                raise MismatchedPatch(f"unknown predictor weight {name!r}; known: {sorted(_NAMES)}")
            found.setdefault(site, {})[_NAMES[rest]] = tensor
    complete = [site for site, weights in found.items() if set(weights) == set(_NAMES.values())]
    if not found or len(complete) != len(found):
        raise MismatchedPatch(
            "the state dict needs blocks.<i>.attn.mask_predictor.{proj_n, proj_back_n, proj_c_q, "
            f"proj_c_k}}; complete sites: {complete}, of {sorted(found)}"
        )
    return found


def _check(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    wrong = [n for n in set(own) & set(given) if own[n].shape != torch.as_tensor(given[n]).shape]
    if missing or extra or wrong:
        raise MismatchedPatch(
            f"weights do not fit: missing {missing[:5]}, unexpected {extra[:5]}, "
            f"of another shape {sorted(wrong)[:5]}"
        )
