"""Score maps of models on a language backbone: their classes, and their values for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from clipdense.backbone import SCORE, LanguageTrunk

__all__ = ["has_score_map", "score_classes", "score_maps"]


def has_score_map(model: nn.Module) -> bool:
    """Whether the model's backbone gives a score map."""
    return _language_trunk(model) is not None


def score_classes(model: nn.Module) -> tuple[str, ...]:
    """The K classes of a model's score map.

    Raises:
        ValueError: its backbone gives none.
    """
    trunk = _language_trunk(model)
    if trunk is None:
        raise ValueError(
            f"{type(model).__name__} has no score map: its backbone is built on no LanguageTrunk "
            "(MODEL.TRUNK.NAME)"
        )
    return tuple(trunk.text.classes)


@torch.no_grad()
def score_maps(model: Any, samples: Sequence[dict[str, Any]]) -> list[npt.NDArray[np.float32]]:
    """The score map of each image, run alone, without what its padding adds.

    Args:
        model: in evaluation mode.
        samples: Detectron2's inputs.

    Returns:
        (K, h, w) over the whole image each.

    Raises:
        ValueError: the model's backbone gives no score map.
    """
    score_classes(model)
    kept: list[tuple[Sequence[int], Tensor]] = []
    hook = model.backbone.register_forward_hook(
        lambda module, inputs, output: kept.append((inputs[0].shape[-2:], output[SCORE]))
    )
    try:
        for sample in samples:
            model([sample])
    finally:
        hook.remove()
    return [
        _without_padding(score.float(), padded, sample["image"].shape[-2:])[0].cpu().numpy()
        for (padded, score), sample in zip(kept, samples, strict=True)
    ]


def _language_trunk(model: nn.Module) -> LanguageTrunk | None:
    backbone: Any = getattr(model, "backbone", None)
    modules = backbone.modules() if isinstance(backbone, nn.Module) else ()
    return next((module for module in modules if isinstance(module, LanguageTrunk)), None)


def _without_padding(score: Tensor, padded: Sequence[int], size: Sequence[int]) -> Tensor:
    """Of a map (B, K, h, w) over padded images the part over the images, sampled at as many places.

    Args:
        padded, size: height and width of the images with and without their padding, which lies at the right
            and at the bottom.
    """
    height, width = (n * s / p for n, s, p in zip(score.shape[-2:], size, padded, strict=True))
    box = score.new_tensor([[0.0, 0.0, width, height]])
    # bilinear at the cells' centres: where the image ends with a cell, exactly these cells
    cells = (max(1, round(height)), max(1, round(width)))
    return roi_align(score, [box] * len(score), cells, sampling_ratio=1, aligned=True)
