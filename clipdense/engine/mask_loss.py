"""Training of masks on data in which some objects have a box but no mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.structures import Instances

__all__ = ["with_masks", "leave_out_objects_without_mask"]


def leave_out_objects_without_mask(model: nn.Module) -> bool:
    """Let the mask heads of a model skip the objects whose ``gt_has_mask`` is False, in training.

    The other losses see these objects. Call it once for a model.

    Returns:
        Whether the model has such mask heads: Detectron2's `BaseMaskRCNNHead`, on pooled regions. Other
        models, such as mask transformers, cannot train an object without a mask.
    """
    heads = []
    for parent in model.modules():
        head = getattr(parent, "mask_head", None)
        if isinstance(head, BaseMaskRCNNHead) and getattr(parent, "mask_pooler", parent) is not None:
            heads.append(head)
    for head in heads:
        head.register_forward_pre_hook(_only_with_masks)
    return bool(heads)


def with_masks(regions: Tensor, instances: Sequence[Instances]) -> tuple[Tensor, list[Instances]]:
    """Select the regions of the objects that have a mask.

    Args:
        regions: (R, ...) features of the objects of all images, in order.
        instances: one entry per image; without ``gt_has_mask``, all its objects have a mask.

    Returns:
        The features and instances of the objects with a mask.
    """
    selected = [
        i.gt_has_mask if i.has("gt_has_mask") else torch.ones(len(i), dtype=torch.bool, device=regions.device)
        for i in instances
    ]
    return regions[torch.cat(selected)], [i[s] for i, s in zip(instances, selected, strict=True)]


def _only_with_masks(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Select the arguments of a mask head (forward pre-hook)."""
    regions, instances = arguments
    if not head.training or not any(i.has("gt_has_mask") for i in instances):
        return None
    return with_masks(regions, instances)
