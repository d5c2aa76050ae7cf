"""Weight-free pooling of dense maps into region embeddings: RoIAlign for boxes, weighted means for masks.

Pooling with weights (attention pool, MLP head) belongs to the towers: `Tower.embed_regions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clipdense.clip.roi_align import roi_align

__all__ = ["POOLINGS", "Pooling", "get_pooling", "pool_boxes", "pool_masks", "resize_masks"]


@dataclass(frozen=True)
class Pooling:
    """Settings of a pooling.

    Attributes:
        normalize_map: L2-normalise the dense map over its channels before pooling.
        normalize: L2-normalise the pooled features.
        threshold: Binarise masks by `> threshold`; None uses their values as weights.
        eps: Added to the sum of a mask.
        empty: Features of a mask whose sum is 0: "zero", or "global" for the mean of the whole map.

    Raises:
        ValueError: If `empty` is unknown.
    """

    normalize_map: bool = False
    normalize: bool = False
    threshold: float | None = None
    eps: float = 1e-12
    empty: str = "zero"

    def __post_init__(self) -> None:
        if self.empty not in ("zero", "global"):
            raise ValueError(f"empty must be 'zero' or 'global', not '{self.empty}'")


POOLINGS: dict[str, Pooling] = {
    "plain": Pooling(),
    # CLIPSelf (Wu et al., ICLR 2024, section 3) and the VLM scores of F-ViT: unit vectors are pooled and
    # normalised again.
    "clipself": Pooling(normalize_map=True, normalize=True),
    # The same without the second normalisation, which CLIPSelf's loss does in training.
    "clipself_raw": Pooling(normalize_map=True),
    # FC-CLIP and ODISE: mask logits, inside where above 0.
    "fcclip": Pooling(threshold=0.0, eps=1e-8),
}


def get_pooling(pooling: str | Pooling) -> Pooling:
    """Return a pooling by name; a pooling is returned as it is.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(pooling, Pooling):
        return pooling
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling '{pooling}'; known: {', '.join(POOLINGS)}")
    return POOLINGS[pooling]


def pool_boxes(
    features: Tensor,
    boxes: Sequence[Tensor] | Tensor,
    batch_index: Tensor | None = None,
    *,
    scale: float | tuple[float, float] = 1.0,
    pooling: str | Pooling = "plain",
    output_size: int | tuple[int, int] = 1,
    sampling_ratio: int = -1,
) -> Tensor:
    """Pool boxes of a dense map by RoIAlign.

    Args:
        features: (B, C, h, w).
        boxes: xyxy; a list with (n_i, 4) per image, (B, n, 4), or flat (N, 4) with `batch_index`.
        batch_index: (N,), the image of each flat box.
        scale: Map cells per unit of the boxes, one number or (x, y): 1 / stride for boxes in pixels, (w, h)
            for boxes in 0 .. 1.
        pooling: A `Pooling` or its name; its mask settings have no effect.
        output_size: Height and width of the result in cells.
        sampling_ratio: Sampling points per cell and axis; -1: as many as the box has map cells there.

    Returns:
        (N, C), or (N, C, *output_size) if that is not 1 x 1, in the dtype of the features. Image by image for
        lists, in their order for flat boxes. Half precision is computed in float32.

    Raises:
        ValueError: If lists do not match the batch, flat boxes have no `batch_index`, or the pooling is
            unknown.
    """
    policy = get_pooling(pooling)
    features, dtype = _prepare(features, policy)
    boxes, index = _flat(boxes, batch_index, features, "boxes", 4)
    sx, sy = scale if isinstance(scale, tuple) else (scale, scale)
    rois = torch.cat([index[:, None].to(boxes), boxes * boxes.new_tensor([sx, sy, sx, sy])], dim=1)
    pooled = roi_align(features, rois, output_size, sampling_ratio=sampling_ratio)
    if policy.normalize:
        pooled = F.normalize(pooled, dim=1)
    return (pooled.flatten(1) if pooled.shape[2:] == (1, 1) else pooled).to(dtype)


def pool_masks(
    features: Tensor,
    masks: Sequence[Tensor] | Tensor,
    batch_index: Tensor | None = None,
    *,
    pooling: str | Pooling = "plain",
) -> Tensor:
    """Pool masks of a dense map by their weighted mean: sum(f m) / (sum(m) + eps).

    Args:
        features: (B, C, h, w).
        masks: bool, weights of at least 0, or logits if the pooling has a threshold, at the map's size (see
            `resize_masks`); a list with (n_i, h, w) per image, (B, n, h, w), or flat (N, h, w) with
            `batch_index`.
        batch_index: (N,), the image of each flat mask.
        pooling: A `Pooling` or its name.

    Returns:
        (N, C) in the dtype of the features. Image by image for lists, in their order for flat masks. Half
        precision is computed in float32.

    Raises:
        ValueError: As `pool_boxes`, or if the masks differ in size from the map.
    """
    policy = get_pooling(pooling)
    features, dtype = _prepare(features, policy)
    if isinstance(masks, Tensor) and masks.dim() == 4 and batch_index is None:
        _check_batch(masks, features)
        grouped = masks.flatten(2).to(features.device)  # (B, n, hw): nothing to sort
        grouped = grouped if masks.dtype == torch.bool else grouped.to(features.dtype)
        return _masked_means(features, grouped, policy).flatten(0, 1).to(dtype)
    flat, index = _flat(masks, batch_index, features, "masks", *features.shape[-2:])
    order = index.argsort(stable=True)
    counts = index.bincount(minlength=len(features)).tolist()
    grouped = pad_sequence(
        list(torch.split(flat[order].flatten(1), counts)), batch_first=True
    )  # (B, max n, hw)
    pooled = _masked_means(features, grouped, policy)
    rows = torch.cat([image[:n] for image, n in zip(pooled, counts, strict=True)])
    return rows[order.argsort()].to(dtype)


def resize_masks(masks: Tensor, size: int | tuple[int, int], *, antialias: bool = False) -> Tensor:
    """Resize binary masks to the size of a dense map: bicubic, then `> 0`, as CLIPSelf's evaluation does (Wu
    et al., ICLR 2024).

    Args:
        masks: (N, H, W), bool or 0 / 1.
        size: An int scales the longest side to it, rounds the other side, and pads right and bottom to a
            square, as a letterboxed image. (h, w) stretches the masks.
        antialias: Torchvision's default, but off in the published evaluation: the kernel then reaches over
            many cells and enlarges small masks several times.

    Returns:
        (N, size, size) or (N, h, w) bool.
    """
    if isinstance(size, int):
        longest = max(masks.shape[-2:])
        inner = tuple(max(1, round(side * size / longest)) for side in masks.shape[-2:])
        outer = (size, size)
    else:
        inner = outer = size
    if not len(masks):
        return masks.new_zeros(0, *outer, dtype=torch.bool)
    values = F.interpolate(
        masks[:, None].float(), inner, mode="bicubic", align_corners=False, antialias=antialias
    )
    return F.pad(values[:, 0] > 0, (0, outer[1] - inner[1], 0, outer[0] - inner[0]))


def _prepare(features: Tensor, policy: Pooling) -> tuple[Tensor, torch.dtype]:
    """Convert the map to float32 or float64, normalise it if asked, and return the result's dtype."""
    dtype = features.dtype
    if dtype not in (torch.float32, torch.float64):
        features = features.float()
    return (F.normalize(features, dim=1) if policy.normalize_map else features), dtype


def _masked_means(features: Tensor, masks: Tensor, policy: Pooling) -> Tensor:
    """Pool each image's own masks (B, n, h * w) of maps (B, C, h, w): (B, n, C)."""
    if policy.threshold is not None:
        masks = masks > policy.threshold
    weights, values = masks.to(features.dtype), features.flatten(2).transpose(1, 2)
    with torch.autocast(features.device.type, enabled=False):
        area = weights.sum(2, keepdim=True)
        pooled = weights @ values / (area + policy.eps)
    if policy.empty == "global":
        pooled = torch.where(area == 0, values.mean(1, keepdim=True), pooled)
    return F.normalize(pooled, dim=2) if policy.normalize else pooled


def _check_batch(masks: Tensor, features: Tensor) -> None:
    """Raise ValueError unless masks (B, n, h, w) fit maps (B, C, h, w)."""
    if masks.shape[0] != features.shape[0]:
        raise ValueError(f"{len(masks)} lists of masks for {len(features)} images")
    if masks.shape[2:] != features.shape[2:]:
        h, w = features.shape[2:]
        flat = tuple(masks.flatten(0, 1).shape)
        raise ValueError(f"masks {flat} do not fit (N, {h}, {w}) (see `resize_masks`)")


def _flat(
    regions: Sequence[Tensor] | Tensor, batch_index: Tensor | None, features: Tensor, what: str, *shape: int
) -> tuple[Tensor, Tensor]:
    """Flatten regions to (N, *shape) and find the image (N,) of each, on the device of the features."""
    if isinstance(regions, Tensor) and regions.dim() == len(shape) + 1:
        if batch_index is None:
            raise ValueError(f"flat {what} {tuple(regions.shape)} need `batch_index`")
        flat, index = regions, batch_index.to(features.device)
        if len(index) != len(flat):
            raise ValueError(f"{len(flat)} {what}, but `batch_index` has {len(index)} entries")
    else:
        if batch_index is not None or len(regions) != len(features):
            raise ValueError(
                f"{len(regions)} lists of {what} for {len(features)} images"
                + (", and a `batch_index`, which is for flat ones" if batch_index is not None else "")
            )
        flat = torch.cat(list(regions))
        index = torch.cat([torch.full((len(r),), i, device=features.device) for i, r in enumerate(regions)])
    if flat.shape[1:] != shape:
        hint = " (see `resize_masks`)" if what == "masks" else ""
        raise ValueError(f"{what} {tuple(flat.shape)} do not fit (N, {', '.join(map(str, shape))}){hint}")
    return (flat if flat.dtype == torch.bool else flat.to(features.dtype)).to(features.device), index
