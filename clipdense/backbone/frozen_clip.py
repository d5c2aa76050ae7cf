"""A frozen CLIP image tower to detect on and to classify regions with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipdense.backbone.clip_trunk import CLIPTrunk
from clipdense.backbone.trunk import JOINT
from clipdense.clip.model import ClipModel
from clipdense.clip.towers import Tower, TowerRequest, TransformerTower
from clipdense.regions import pool_boxes

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

__all__ = ["FrozenCLIPTrunk"]

POOLING = "pooling"


@BACKBONE_REGISTRY.register()
class FrozenCLIPTrunk(CLIPTrunk):
    """A CLIP image tower of which nothing is trained (F-VLM, Kuo et al., ICLR 2023; F-ViT).

    It always stays in evaluation mode and runs without autograd. In evaluation the same forward gives
    "joint" as well, from which :meth:`embed_boxes` makes region embeddings in CLIP's joint space.
    """

    @configurable
    def __init__(
        self,
        tower: Tower | ClipModel,
        *,
        out_features: Sequence[str] = (),
        blocks: Sequence[int] = (),
        last_block: str = "plain",
        joint: str = POOLING,
        window_size: int = 0,
        global_blocks: Collection[int] = (),
    ) -> None:
        """
        Args:
            tower, out_features, window_size, global_blocks: see :class:`CLIPTrunk`.
            blocks: ViTs: give what leaves these blocks, from 0, as "block<i>", all of the tower's stride.
            last_block: ViTs: mode of the last block for its map (published F-ViT: "value").
            joint: "pooling": what the tower's own region pooling reads (ResNet's attention pool, heads of
                ConvNeXt and SigLIP); or the mode of the tower's dense map, which is pooled by RoIAlign as
                CLIPSelf does.

        Raises:
            ValueError: blocks, modes or a pooling that the tower has not.
        """
        super().__init__(
            tower,
            out_features=out_features,
            freeze_at=5,
            norm="FrozenBN",
            window_size=window_size,
            global_blocks=global_blocks,
        )
        if isinstance(self.tower, TransformerTower):
            if unknown := [i for i in (*blocks, *self._want.taps) if i not in self.tower.tap_channels]:
                raise ValueError(
                    f"MODEL.FROZEN_CLIP.BLOCKS {unknown}: blocks are 0..{max(self.tower.tap_channels)}"
                )
            if joint == POOLING and self.tower.dense_modes:
                raise self.tower.cannot("region embeddings", "set MODEL.FROZEN_CLIP.JOINT to a dense mode")
        elif blocks or last_block != "plain":
            raise ValueError(
                f"MODEL.FROZEN_CLIP.BLOCKS and LAST_BLOCK are for ViTs, not for a {type(self.tower).__name__}"
            )
        if joint not in (POOLING, *self.tower.dense_modes):
            known = ", ".join((POOLING, *self.tower.dense_modes))
            raise self.tower.cannot(f"MODEL.FROZEN_CLIP.JOINT {joint!r}", f"it has {known}")
        if blocks:
            channels = self.tower.tap_channels
            self._outputs = {
                f"block{i}": ShapeSpec(channels=channels[i], stride=self.tower.stride) for i in blocks
            }
        self._pooling = joint == POOLING
        self._want = TowerRequest(taps=tuple(blocks) or self._want.taps, tap_mode=last_block)
        self._want_joint = replace(self._want, **({"pre": True} if self._pooling else {"dense": joint}))

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        for trained in ("freeze_at", "norm"):
            del arguments[trained]
        keys = cfg.MODEL.FROZEN_CLIP
        return arguments | {"blocks": keys.BLOCKS, "last_block": keys.LAST_BLOCK, "joint": keys.JOINT}

    def train(self, mode: bool = True) -> FrozenCLIPTrunk:
        """The tower stays in evaluation mode; ``mode`` decides whether "joint" is left out."""
        self._give_joint = not mode
        super().train(mode)
        return self

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every map, by name, "joint" last."""
        tower = self.tower
        channels = tower.tap_channels[max(tower.tap_channels)] if self._pooling else tower.embed_dim
        return super().output_shape() | {JOINT: ShapeSpec(channels=channels, stride=tower.stride)}

    def features(self, images: Tensor) -> dict[str, Tensor]:
        out = self._run(images, self._want_joint if self._give_joint else self._want)
        maps = self._maps(out)
        if self._give_joint:
            maps[JOINT] = out.pre if self._pooling else out.dense
        return maps

    @torch.no_grad()
    def embed_boxes(self, joint: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Region embeddings in CLIP's joint space, unit length only from a dense map.

        Args:
            joint: the map "joint", (B, C, h, w).
            boxes: one (n_i, 4) an image, xyxy in pixels of the padded images.

        Returns:
            (sum n_i, D).
        """
        if self._pooling:
            return self.tower.embed_regions(joint, boxes=boxes)
        return pool_boxes(joint, boxes, scale=1 / self.tower.stride, pooling="clipself")
