"""Image examples in place of class names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.systems.training_free.encoder import Cosines

__all__ = ["mix_examples", "region_means"]

_CHUNK = 64
"""Channels of the embedding whose maps are held at image size at a time."""


def region_means(
    cosines: Cosines, size: tuple[int, int], box: tuple[float, float, float, float] | None
) -> tuple[Tensor, Tensor]:
    """Average a map of embeddings over a box, and over the whole image.

    Args:
        cosines: cosines of the windows with the D axes of the embedding space: the embeddings themselves.
        size: height and width of the image in which the box is given.
        box: x0, y0, x1, y1; None for the whole image.

    Returns:
        (D,) of the box and (D,) of the image.

    Raises:
        ValueError: If the box has no pixel of the image.
    """
    height, width = cosines.size
    x0, y0, x1, y1 = box or (0, 0, size[1], size[0])
    if not (0 <= x0 < min(x1, size[1]) and 0 <= y0 < min(y1, size[0])):
        raise ValueError(f"the box {box} is outside of the picture of {size[1]} x {size[0]} pixels")
    scale_x, scale_y = width / size[1], height / size[0]
    columns = slice(int(x0 * scale_x), max(int(x0 * scale_x) + 1, round(x1 * scale_x)))
    rows = slice(int(y0 * scale_y), max(int(y0 * scale_y) + 1, round(y1 * scale_y)))
    inside, everywhere = [], []
    for start in range(0, cosines.maps.shape[1], _CHUNK):
        part = cosines.fold(slice(start, start + _CHUNK))
        if part.shape[-2:] != cosines.size:
            part = F.interpolate(part[None], cosines.size, mode="bilinear", align_corners=False)[0]
        inside.append(part[:, rows, columns].mean((1, 2)))
        everywhere.append(part.mean((1, 2)))
    return torch.cat(inside), torch.cat(everywhere)


def mix_examples(
    text: Tensor, classes: Tensor, regions: Sequence[tuple[int, Tensor, Tensor]], weight: float
) -> tuple[Tensor, Tensor]:
    """Replace the names of some classes by image examples, or mix both.

    Image and text embeddings of CLIP lie in separate parts of the space (the modality gap, Liang et al.,
    NeurIPS 2022), so that a region embedding as it is would win against every word. An example is therefore
    expressed as a text: e = m + s d / |d|, where d is the difference of the region to its whole picture, m
    the mean of the other class names, and s their mean distance to m. A class with examples has one
    embedding, weight e + (1 - weight) t, with the mean t of its names.

    Args:
        text: (S, D), L2-normalised embeddings of the names.
        classes: (S,), the class of each name.
        regions: class, region embedding (D,) and picture embedding (D,) of each example.
        weight: 0..1.

    Returns:
        Text (S', D), L2-normalised, and classes (S',).
    """
    shown = sorted({c for c, _, _ in regions})
    is_shown = torch.isin(classes, torch.tensor(shown, device=classes.device))
    others = text[~is_shown] if int((~is_shown).sum()) > 1 else text
    centre = others.mean(0)
    distance = (others - centre).norm(dim=1).mean()
    rows = []
    for c in shown:
        differences = torch.stack([F.normalize(r - whole, dim=0) for k, r, whole in regions if k == c])
        direction = F.normalize(differences.to(text).mean(0), dim=0)
        name = F.normalize(text[classes == c].mean(0), dim=0)
        rows.append(
            F.normalize(
                weight * F.normalize(centre + distance * direction, dim=0) + (1 - weight) * name, dim=0
            )
        )
    kept = torch.cat([text[~is_shown], torch.stack(rows)])
    labels = torch.cat([classes[~is_shown], torch.tensor(shown, device=classes.device)])
    order = labels.argsort(stable=True)
    return kept[order], labels[order]
