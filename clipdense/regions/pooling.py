"""Region embeddings from a dense map by weight-free pooling: RoIAlign for boxes, weighted means for masks.

Pooling that has weights (attention pool, MLP head) belongs to the towers: `Tower.embed_regions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import roi_align

__all__ = ["POOLINGS", "Pooling", "get_pooling", "pool_boxes", "pool_masks", "resize_masks"]


@dataclass(frozen=True)
class Pooling:
    """What happens to features and masks besides the averaging.

    Attributes:
        normalize_map: L2-normalise the dense map over its channels first.
        normalize: L2-normalise the pooled features.
        threshold: binarise masks by `> threshold`; None takes them as weights.
        eps: added to the mask's sum.
        empty: a mask whose sum is 0 gives "zero" features, or the mean of the whole map ("global").
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
    # CLIPSelf, section 3: pooled on unit vectors, unit again; F-ViT's VLM scores too
    "clipself": Pooling(normalize_map=True, normalize=True),
    # the same before the second normalisation, which CLIPSelf's training leaves to its loss
    "clipself_raw": Pooling(normalize_map=True),
    # FC-CLIP and ODISE: mask logits, inside where > 0
    "fcclip": Pooling(threshold=0.0, eps=1e-8),
}


def get_pooling(pooling: str | Pooling) -> Pooling:
    """A pooling by name. Raises ValueError for an unknown one."""
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
    """RoIAlign (aligned) of boxes on a dense map, without weights.

    Args:
        features: (B, C, h, w).
        boxes: xyxy; one (n_i, 4) an image, or (B, n, 4), or flat (N, 4) with `batch_index`.
        batch_index: (N,) the image of each flat box.
        scale: map cells a box unit, (x, y) or one for both: 1 / stride for pixels, (w, h) for boxes in 0 ..
            1.
        pooling: a `Pooling`, or its name; what concerns masks has no effect.
        output_size: cells of the result.
        sampling_ratio: points a cell and axis; -1: as many as the map has cells there.

    Returns:
        (N, C), or (N, C, *output_size) where that is not 1 x 1; image by image, flat boxes in their order. In
        the dtype of the features; half precision is computed in float32.

    Raises:
        ValueError: lists that do not fit the batch, flat boxes without `batch_index`, an unknown pooling.
    """
    policy = get_pooling(pooling)
    features, dtype = _prepare(features, policy)
    boxes, index = _flat(boxes, batch_index, features, "boxes", 4)
    sx, sy = scale if isinstance(scale, tuple) else (scale, scale)
    rois = torch.cat([index[:, None].to(boxes), boxes * boxes.new_tensor([sx, sy, sx, sy])], dim=1)
    pooled: Tensor = roi_align(features, rois, output_size, 1.0, sampling_ratio, aligned=True)
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
    """Mean of a dense map weighted by masks: sum(f m) / (sum(m) + eps).

    Args:
        features: (B, C, h, w).
        masks: bool, or weights of at least 0, or logits where the pooling has a threshold, at the size of the
            map (`resize_masks`); one (n_i, h, w) an image, or (B, n, h, w), or flat (N, h, w) with
            `batch_index`.
        batch_index: (N,) the image of each flat mask.
        pooling: a `Pooling`, or its name.

    Returns:
        (N, C), image by image, flat masks in their order. In the dtype of the features; half precision is
        computed in float32.

    Raises:
        ValueError: as `pool_boxes`, or masks of another size than the map.
    """
    policy = get_pooling(pooling)
    features, dtype = _prepare(features, policy)
    flat, index = _flat(masks, batch_index, features, "masks", *features.shape[-2:])
    order = index.argsort(stable=True)
    counts = index.bincount(minlength=len(features)).tolist()
    grouped = pad_sequence(
        list(torch.split(flat[order].flatten(1), counts)), batch_first=True
    )  # (B, max n, hw)
    if policy.threshold is not None:
        grouped = grouped > policy.threshold
    weights, values = grouped.to(features.dtype), features.flatten(2).transpose(1, 2)
    with torch.autocast(features.device.type, enabled=False):
        area = weights.sum(2, keepdim=True)
        pooled = weights @ values / (area + policy.eps)
    if policy.empty == "global":
        pooled = torch.where(area == 0, values.mean(1, keepdim=True), pooled)
    if policy.normalize:
        pooled = F.normalize(pooled, dim=2)
    rows = torch.cat([image[:n] for image, n in zip(pooled, counts, strict=True)])
    return rows[order.argsort()].to(dtype)


def resize_masks(masks: Tensor, size: int | tuple[int, int], *, antialias: bool = False) -> Tensor:
    """Binary masks at the size of a dense map: bicubic, then `> 0`.

    The rule of CLIPSelf's evaluation (spec 1.5). Anti-aliasing, which torchvision's resize turns on by
    default, lets the kernel reach over many cells and swells small masks several-fold.

    Args:
        masks: (N, H, W), bool or 0 / 1.
        size: an int fits the longest side to it, keeps the aspect ratio (the other side is rounded), and pads
            right and bottom to a square, as the image was; (h, w) stretches to it.

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
    """The map to pool, in float32 or float64, and the dtype of the result."""
    dtype = features.dtype
    if dtype not in (torch.float32, torch.float64):
        features = features.float()
    return (F.normalize(features, dim=1) if policy.normalize_map else features), dtype


def _flat(
    regions: Sequence[Tensor] | Tensor, batch_index: Tensor | None, features: Tensor, what: str, *shape: int
) -> tuple[Tensor, Tensor]:
    """Regions (N, *shape) and the image (N,) of each, on the device of the features."""
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
        counts = torch.tensor([len(r) for r in regions], device=features.device)
        flat = torch.cat(list(regions))
        index = torch.arange(len(regions), device=features.device)
        index = index.repeat_interleave(counts, output_size=len(flat))  # known: no wait for the device
    if flat.shape[1:] != shape:
        hint = " (see `resize_masks`)" if what == "masks" else ""
        raise ValueError(f"{what} {tuple(flat.shape)} do not fit (N, {', '.join(map(str, shape))}){hint}")
    return (flat if flat.dtype == torch.bool else flat.to(features.dtype)).to(features.device), index
