"""Embeddings of masks in the image-text space of a CLIP, for the out-of-vocabulary classifier."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.backbone import FrozenCLIPTrunk
from clipdense.clip.mask_tokens import embed_mask_tokens
from clipdense.clip.model import ClipModel
from clipdense.clip.towers import Tower, TransformerTower
from clipdense.systems.mask_pooling.pooling import MaskPolicy, region_masks

__all__ = ["RegionEmbeddings", "RegionHead", "embed_dense_regions", "embed_token_regions", "token_tower"]

RegionHead = Literal["dense", "mask_tokens", "none"]
"""Source of region embeddings: `embed_dense_regions`, `embed_token_regions`, or no such classifier."""


class RegionEmbeddings(NamedTuple):
    """Embeddings of the masks of a batch.

    Attributes:
        embeddings: (B, Q, D), of any length.
        valid: (B, Q) bool, False for masks without a cell of the map.
    """

    embeddings: Tensor
    valid: Tensor


def embed_dense_regions(
    trunk: FrozenCLIPTrunk, joint: Tensor, mask_logits: Tensor, masks: MaskPolicy = "fcclip"
) -> RegionEmbeddings:
    """Embed masks by pooling the map that the backbone has computed already (FC-CLIP, Yu et al., NeurIPS
    2023, section 3.3).

    ResNets attend within the mask (attention pool), ConvNeXts apply their head to the pooled vector, and ViTs
    pool their dense map, whose vectors are in the joint space before they are pooled. An empty mask gives the
    bias of the attention pool, the head's result for zeros, or zeros.

    Args:
        trunk: The CLIP in the backbone.
        joint: (B, C, h, w), its map "joint".
        mask_logits: (B, Q, H, W), over the same padded images.
        masks: See `MaskPolicy`.
    """
    size = (joint.shape[-2], joint.shape[-1])
    weights = region_masks(mask_logits, size, masks, cell=trunk.tower.stride)
    return RegionEmbeddings(trunk.embed_regions(joint, masks=weights), weights.flatten(2).any(2))


@torch.no_grad()
def embed_token_regions(
    clip: ClipModel, images: Tensor, mask_logits: Tensor, masks: MaskPolicy = "odise"
) -> RegionEmbeddings:
    """Embed masks by class tokens that attend within them, in a CLIP that sees the image at its native size.

    Args:
        clip: A CLIP with a ViT whose image embedding is its class token.
        images: (B, 3, H, W) padded RGB images in 0 .. 255.
        mask_logits: (B, Q, h, w), over the same padded images.
        masks: See `MaskPolicy`.

    Returns:
        Embeddings (B, Q, D). A mask without a patch attends to the class token only and is not valid.

    Raises:
        ValueError: If the image tower is not such a ViT.

    Source: Ding et al., Open-Vocabulary Universal Image Segmentation with MaskCLIP, ICML 2023; ODISE (Xu et
        al., CVPR 2023, section 3.4), which only uses it in inference.
    """
    tower = token_tower(clip.visual)
    pixels = F.interpolate(images.float(), size=tower.image_size, mode="bilinear", align_corners=False)
    grid = (tower.image_size[0] // tower.stride, tower.image_size[1] // tower.stride)
    weights = region_masks(mask_logits, grid, masks, cell=tower.stride)
    embeddings = embed_mask_tokens(tower, clip.normalize(pixels), weights.float())
    return RegionEmbeddings(embeddings, weights.flatten(2).any(2))


def token_tower(tower: Tower) -> TransformerTower:
    """Return the tower if it has mask tokens.

    Raises:
        ValueError: If it is not a ViT whose image embedding is its class token.
    """
    if not isinstance(tower, TransformerTower) or not tower.pools_class_token:
        raise tower.cannot("mask tokens", "only ViTs whose image embedding is the class token have them")
    return tower
