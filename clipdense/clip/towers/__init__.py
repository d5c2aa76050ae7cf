"""Image and text towers: one file per family, one contract (`Tower`)."""

from __future__ import annotations

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from clipdense.clip.towers.base import Tower, TowerOutput, TowerRequest
from clipdense.clip.towers.convnext import ConvNeXtTower
from clipdense.clip.towers.groups import TowerGroups
from clipdense.clip.towers.resnet import ResNetTower
from clipdense.clip.towers.text import TextTower
from clipdense.clip.towers.timm_vit import TimmViTTower
from clipdense.clip.towers.transformer import BlockHook, TransformerTower
from clipdense.clip.towers.vit import ViTTower

__all__ = [
    "BlockHook",
    "ConvNeXtTower",
    "ResNetTower",
    "TextTower",
    "TimmViTTower",
    "Tower",
    "TowerGroups",
    "TowerOutput",
    "TowerRequest",
    "TransformerTower",
    "ViTTower",
    "build_tower",
]


def build_tower(visual: nn.Module, position_rule: str = "bicubic") -> Tower:
    """Build the tower of an open_clip image module; parameters are shared, not copied.

    Args:
        visual: image tower of an open_clip model.
        position_rule: rule for grids other than the native one, see `clipdense.clip.position`.

    Raises:
        ValueError: If the family has no tower, or its tower does not support this variant.
    """
    if isinstance(visual, ModifiedResNet):
        return ResNetTower(visual, position_rule)
    if isinstance(visual, VisionTransformer):
        return ViTTower(visual, position_rule)
    if isinstance(visual, TimmModel):
        if isinstance(visual.trunk, Eva | TimmVisionTransformer):
            return TimmViTTower(visual, position_rule)
        if isinstance(visual.trunk, ConvNeXt):
            return ConvNeXtTower(visual, position_rule)
        visual = visual.trunk
    raise ValueError(
        f"no tower for {type(visual).__name__}: the families are ModifiedResNet, open_clip's ViT, timm's EVA "
        f"and ViT (EVA02-CLIP, SigLIP, Perception Encoder) and timm's ConvNeXt"
    )
