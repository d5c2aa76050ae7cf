"""Connected areas of a label map, as instances of a model that only labels pixels."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

__all__ = ["connected_areas"]


def connected_areas(
    labels: Tensor, scores: Tensor | None = None, *, minimal_share: float = 0.001
) -> tuple[Tensor, Tensor, Tensor]:
    """Split each class of a label map into its connected areas (8 neighbours).

    Objects of one class that touch each other are one area: a label map does not tell them apart.

    Args:
        labels: (H, W) int64; negative values are no class.
        scores: (K, H, W) class scores; None: every area has score 1.
        minimal_share: areas of less than this share of the image, 0..1, are left out.

    Returns:
        Masks (N, H, W) bool, classes (N,) int64 and scores (N,) float32, the mean score of the class in the
        area; best score first.
    """
    values = labels.cpu().numpy()
    smallest = max(1.0, minimal_share * values.size)
    masks, classes, means = [], [], []
    for label in np.unique(values[values >= 0]).tolist():
        count, areas, statistics, _ = cv2.connectedComponentsWithStats((values == label).astype(np.uint8))
        for i in range(1, count):
            if statistics[i, cv2.CC_STAT_AREA] < smallest:
                continue
            mask = torch.from_numpy(areas == i)
            masks.append(mask)
            classes.append(label)
            means.append(1.0 if scores is None else float(scores[label].cpu()[mask].mean()))
    if not masks:
        return (
            labels.new_zeros((0, *labels.shape), dtype=torch.bool).cpu(),
            torch.zeros(0).long(),
            torch.zeros(0),
        )
    order = torch.tensor(means).argsort(descending=True, stable=True)
    return torch.stack(masks)[order], torch.tensor(classes)[order], torch.tensor(means)[order]
