"""A frozen CLIP image tower for detection and region classification."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipdense.backbone.clip_trunk import CLIPTrunk
from clipdense.backbone.trunk import JOINT, PixelConversion
from clipdense.clip.model import ClipModel
from clipdense.clip.towers import Tower, TowerRequest, TransformerTower
from clipdense.clip.visual_prompts import VisualPrompts
from clipdense.regions import pool_boxes, pool_masks

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

__all__ = ["FrozenCLIPTrunk", "find_frozen_clip"]

POOLING = "pooling"


@BACKBONE_REGISTRY.register()
class FrozenCLIPTrunk(CLIPTrunk):
    """A frozen CLIP image tower (F-VLM, Kuo et al., ICLR 2023; F-ViT, Wu et al., CLIPSelf, ICLR 2024).

    The tower always stays in evaluation mode, and runs without autograd unless it is trained. In evaluation,
    and in the training of the tower, the same forward also returns the map "joint", from which
    :meth:`embed_regions` pools region embeddings in CLIP's joint space.
    """

    train_tower: bool = False

    @configurable
    def __init__(
        self,
        tower: Tower | ClipModel,
        *,
        out_features: Sequence[str] = (),
        blocks: Sequence[int] = (),
        last_block: str = "plain",
        joint: str = POOLING,
        train_tower: bool = False,
        window_size: int = 0,
        global_blocks: Collection[int] = (),
        pixels: PixelConversion | None = None,
        visual_prompts: VisualPrompts | None = None,
    ) -> None:
        """
        Args:
            tower, out_features, window_size, global_blocks, pixels: see :class:`CLIPTrunk`.
            visual_prompts: ViTs: learned tokens, which are frozen too.
            blocks: ViTs: indices, from 0, of the blocks whose outputs are returned, as "block<i>". All have
                the tower's stride. Empty: the last block alone.
            last_block: ViTs: mode of the last block for its map (published F-ViT: "value").
            joint: "pooling": the input of the tower's own region pooling (ResNet's attention pool, the heads
                of ConvNeXt and SigLIP); or a mode of the tower's dense map, which is pooled without weights
                as in CLIPSelf.
            train_tower: Fine-tune the whole tower (OVRCOAT). Batch norms stay constant.

        Raises:
            ValueError: If the tower lacks a block, the mode or the region pooling.
        """
        super().__init__(
            tower,
            out_features=out_features,
            freeze_at=0 if train_tower else 5,
            norm="FrozenBN",
            joint=train_tower,
            dense="plain" if joint == POOLING else joint,
            window_size=window_size,
            global_blocks=global_blocks,
            pixels=pixels,
            visual_prompts=None if visual_prompts is None else visual_prompts.requires_grad_(False),
        )
        if isinstance(self.tower, TransformerTower):
            if unknown := [i for i in (*blocks, *self._request.taps) if i not in self.tower.tap_channels]:
                raise ValueError(
                    f"MODEL.FROZEN_CLIP.BLOCKS {unknown}: blocks are 0..{max(self.tower.tap_channels)}"
                )
            if joint == POOLING and not self.tower.pools_regions:
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
        self.train_tower = train_tower
        self.train(self.training)
        self._request = TowerRequest(taps=tuple(blocks) or self._request.taps, tap_mode=last_block)
        self._joint_request = replace(self._request, **({"pre": True} if self._pooling else {"dense": joint}))

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, Any]:
        prompts = cfg.MODEL.PROMPT
        if prompts.VISUAL.N_TOKENS and not prompts.WEIGHTS:
            raise ValueError(
                f"MODEL.PROMPT.VISUAL.N_TOKENS {prompts.VISUAL.N_TOKENS}: a FrozenCLIPTrunk trains no "
                "tokens; name a file of trained ones in MODEL.PROMPT.WEIGHTS, or use CLIPTrunk"
            )
        arguments = super().from_config(cfg, input_shape)
        for key in ("freeze_at", "norm"):
            del arguments[key]
        keys = cfg.MODEL.FROZEN_CLIP
        return arguments | {
            "blocks": keys.BLOCKS,
            "last_block": keys.LAST_BLOCK,
            "joint": keys.JOINT,
            "train_tower": keys.TRAIN_TOWER,
        }

    def train(self, mode: bool = True) -> FrozenCLIPTrunk:
        """Keep the tower in evaluation mode; training of a frozen tower only leaves "joint" out of the
        outputs."""
        self._joint_enabled = not mode or self.train_tower
        super().train(mode)
        self.tower.eval()
        return self

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every map, by name, "joint" last."""
        tower = self.tower
        channels = tower.tap_channels[max(tower.tap_channels)] if self._pooling else tower.embed_dim
        return super().output_shape() | {JOINT: ShapeSpec(channels=channels, stride=tower.stride)}

    def features(self, images: Tensor) -> dict[str, Tensor]:
        out = self._run(images, self._joint_request if self._joint_enabled else self._request)
        maps = self._maps(out)
        if self._joint_enabled:
            maps[JOINT] = out.pre if self._pooling else out.dense
        return maps

    def embed_regions(
        self, joint: Tensor, *, boxes: Sequence[Tensor] | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """Embed regions in CLIP's joint space.

        Args:
            joint: the map "joint", (B, C, h, w).
            boxes: one (n_i, 4) per image, xyxy in pixels of the padded images -> (sum n_i, D).
            masks: (B, Q, h, w), at least 0, at the size of ``joint`` -> (B, Q, D).

        Returns:
            Region embeddings; L2-normalised if they are pooled from a dense map, else not.

        Raises:
            ValueError: If not exactly one of boxes and masks is given.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_tower):
            return self._embed_regions(joint, boxes, masks)

    def _embed_regions(self, joint: Tensor, boxes: Sequence[Tensor] | None, masks: Tensor | None) -> Tensor:
        if self._pooling:
            return self.tower.embed_regions(joint, boxes=boxes, masks=masks)
        if (boxes is None) == (masks is None):
            raise ValueError("embed_regions takes either boxes or masks")
        if boxes is not None:
            return pool_boxes(joint, boxes, scale=1 / self.tower.stride, pooling="clipself")
        assert masks is not None
        return pool_masks(joint, masks, pooling="clipself").unflatten(0, masks.shape[:2])


def find_frozen_clip(backbone: Backbone) -> FrozenCLIPTrunk:
    """Find the frozen CLIP in a backbone.

    Raises:
        ValueError: If there is none.
    """
    found = next((m for m in backbone.modules() if isinstance(m, FrozenCLIPTrunk)), None)
    if found is None:
        raise ValueError(
            f"the model needs a frozen CLIP in its backbone, but {type(backbone).__name__} has none: set the "
            "backbone or MODEL.TRUNK.NAME to FrozenCLIPTrunk or InterpolatedTrunk"
        )
    return found
