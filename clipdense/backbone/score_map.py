"""Score maps of models on a language backbone: their class names, and their values for images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone.language import LanguageTrunk
from clipdense.backbone.trunk import SCORE
from clipdense.clip.roi_align import roi_align

__all__ = [
    "RecordedScore",
    "WholeImageModel",
    "find_language_trunk",
    "has_score_map",
    "joint_features",
    "record_scores",
    "score_classes",
    "score_maps",
]


@dataclass(frozen=True)
class RecordedScore:
    """The score map of one call of a backbone.

    Attributes:
        score: s, (B, K, h, w), logits.
        padded_size: (H, W) of the images that the backbone received, in pixels.
    """

    score: Tensor
    padded_size: tuple[int, int]


@runtime_checkable
class WholeImageModel(Protocol):
    """Meta-architecture that can give the input of its backbone for a whole image.

    A model that runs its backbone on windows must be one, so that its score map covers the image.

    Attributes:
        backbone: the backbone.
    """

    backbone: Any

    def backbone_input(self, sample: dict[str, Any]) -> Tensor:
        """Normalise and pad the image of one of Detectron2's inputs: (1, 3, H, W)."""


@contextmanager
def record_scores(backbone: nn.Module) -> Iterator[list[RecordedScore]]:
    """Record the score map of every call of a backbone while the context is open.

    For meta-architectures whose forward is not ours and returns losses or detections only. A forward that is
    ours reads the score map from the backbone's outputs instead.

    Args:
        backbone: a backbone with a score map; called with the padded images (B, 3, H, W).

    Yields:
        A list that receives one entry per call.
    """
    recorded: list[RecordedScore] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], outputs: dict[str, Tensor]) -> None:
        recorded.append(RecordedScore(outputs[SCORE], (args[0].shape[-2], args[0].shape[-1])))

    handle = backbone.register_forward_hook(record)
    try:
        yield recorded
    finally:
        handle.remove()


def find_language_trunk(model: nn.Module) -> LanguageTrunk | None:
    """Return the language trunk of a model's backbone; None if it has none."""
    backbone: Any = getattr(model, "backbone", None)
    modules = backbone.modules() if isinstance(backbone, nn.Module) else ()
    return next((module for module in modules if isinstance(module, LanguageTrunk)), None)


def has_score_map(model: nn.Module) -> bool:
    """Return whether the model's backbone has a score map."""
    return find_language_trunk(model) is not None


def score_classes(model: nn.Module) -> tuple[str, ...]:
    """Return the K class names of a model's score map.

    Raises:
        ValueError: If its backbone has no score map.
    """
    trunk = find_language_trunk(model)
    if trunk is None:
        raise ValueError(
            f"{type(model).__name__} has no score map: its backbone contains no LanguageTrunk "
            "(set MODEL.TRUNK.NAME LanguageTrunk)"
        )
    return tuple(trunk.text.classes)


@torch.no_grad()
def score_maps(model: Any, samples: Sequence[dict[str, Any]]) -> list[npt.NDArray[np.float32]]:
    """Compute the score map of each image. Images run one by one; padding is cut off.

    Args:
        model: a model in evaluation mode.
        samples: Detectron2's inputs.

    Returns:
        One array (K, h, w) per image, which covers the whole image.

    Raises:
        ValueError: If the model's backbone has no score map.
    """
    score_classes(model)
    maps = []
    for sample in samples:
        with record_scores(model.backbone) as recorded:
            if isinstance(model, WholeImageModel):
                model.backbone(model.backbone_input(sample))
            else:
                model([sample])
        (record,) = recorded
        size = sample["image"].shape[-2:]
        maps.append(without_padding(record.score.float(), record.padded_size, size)[0].cpu().numpy())
    return maps


@torch.no_grad()
def joint_features(model: Any, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Compute the two sides of the score map of one image, whose cosines it shows.

    Args:
        model: a model in evaluation mode.
        sample: one of Detectron2's inputs.

    Returns:
        Pixel features (D, h, w) over the image without its padding, and class embeddings (K, D), both
        L2-normalised.

    Raises:
        ValueError: If the model's backbone has no score map.
    """
    score_classes(model)
    trunk = find_language_trunk(model)
    assert trunk is not None
    inputs: list[Tensor] = []
    handle = trunk.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        if isinstance(model, WholeImageModel):
            model.backbone(model.backbone_input(sample))
        else:
            model([sample])
    finally:
        handle.remove()
    images = inputs[0]
    z, t = trunk.joint_features(images)
    z = without_padding(z, images.shape[-2:], sample["image"].shape[-2:])
    return F.normalize(z, dim=1)[0], t[0]


def without_padding(score: Tensor, padded: Sequence[int], size: Sequence[int]) -> Tensor:
    """Resample the part of a score map that covers the image, with as many cells as it had there.

    Args:
        score: (B, K, h, w) over the padded images.
        padded: (H, W) of the padded images, in pixels.
        size: (H, W) of the images without their padding, which lies at the right and at the bottom.

    Returns:
        (B, K, h', w'), sampled bilinearly at the centres of the cells. If the image ends at the border of a
        cell, these are exactly the original values.
    """
    height, width = (n * s / p for n, s, p in zip(score.shape[-2:], size, padded, strict=True))
    box = score.new_tensor([[0.0, 0.0, width, height]])
    cells = (max(1, round(height)), max(1, round(width)))
    return roi_align(score, [box] * len(score), cells, sampling_ratio=1)
