"""`MaskAdaptedCLIP`: a CLIP that learns to name masked crops."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip import ClipModel
from clipdense.clip.layouts import MASK_PROMPTS
from clipdense.clip.mask_prompts import MaskPrompts, load_mask_prompts
from clipdense.clip.text import TextBank
from clipdense.evaluation.probes import RegionEncoderProbe
from clipdense.regions import CropRule, RegionEncoder

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm

__all__ = ["MaskAdaptedCLIP"]

TRAINABLE = ("image", "prompts", "both")


@META_ARCH_REGISTRY.register()
class MaskAdaptedCLIP(nn.Module):
    """Mask-adapted CLIP (OVSeg, Liang et al., CVPR 2023, section 3): contrast of masked crops and nouns.

    The image tower, mask prompts in place of its masked patches, or both are trained, with the temperature;
    the text tower stays as it is, and so do statistics of BatchNorms. One after the other is a run that
    starts from the file which the one before exported: its mask prompts come along.

    Equal nouns in a batch count as negatives, as published. As the text tower is locked, their embeddings are
    equal, and targets that they share would give the same loss.

    Attributes:
        encoder: embeds masked crops.
    """

    @configurable
    def __init__(
        self,
        *,
        encoder: RegionEncoder,
        trainable: str = "image",
        templates: str = "name",
        max_logit_scale: float = 100.0,
    ) -> None:
        """
        Args:
            encoder: with the CLIP to train, text tower included, and its mask prompts.
            trainable: "image", "prompts" or "both".
            templates: of the nouns, see `TextBank`.
            max_logit_scale: upper bound of the temperature exp(logit_scale), whose lower one is 1.

        Raises:
            ValueError: another choice, a CLIP without text tower, or mask prompts to train where there are
                none.
        """
        super().__init__()
        if trainable not in TRAINABLE:
            raise ValueError(
                f"MODEL.MASK_ADAPTED_CLIP.TRAINABLE {trainable!r} is none of {', '.join(TRAINABLE)}"
            )
        if trainable != "image" and not encoder.prompted:
            raise ValueError(
                f"MODEL.MASK_ADAPTED_CLIP.TRAINABLE {trainable!r} needs mask prompts: set "
                "MODEL.TWO_STAGE.MASK_PROMPTS.DEPTH, with ENABLED True"
            )
        self.encoder = encoder.requires_grad_(False)
        clip = encoder.clip
        clip.logit_scale.requires_grad_(True)
        if trainable != "prompts":
            clip.visual.requires_grad_(True)
        if trainable != "image":
            assert encoder.mask_prompts is not None
            encoder.mask_prompts.requires_grad_(True)
        self.max_logit_scale = math.log(max_logit_scale)
        self._bank = TextBank(clip, templates)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments from ``MODEL.CLIP``, ``MODEL.MASK_ADAPTED_CLIP`` and ``MODEL.TWO_STAGE``.

        Raises:
            ValueError: a position grid, which the exported file could not say; crops of another size than the
                CLIP's; mask prompts of another depth than the file's; and see `clip_from_config`.
        """
        keys, stage = cfg.MODEL.MASK_ADAPTED_CLIP, cfg.MODEL.TWO_STAGE
        if cfg.MODEL.CLIP.POSITION_GRID:
            raise ValueError("MODEL.CLIP.POSITION_GRID: the exported CLIP keeps its own grid; set it to 0")
        clip = clip_from_config(cfg)
        if clip.image_size[0] != cfg.INPUT.MASK_PAIRS.SIZE:
            raise ValueError(
                f"INPUT.MASK_PAIRS.SIZE {cfg.INPUT.MASK_PAIRS.SIZE}: '{clip.name}' takes crops of "
                f"{clip.image_size[0]} pixels"
            )
        encoder = RegionEncoder(
            clip,
            CropRule.from_config(cfg.MODEL.TWO_STAGE.CROP),
            mask_prompts=_mask_prompts(cfg, clip),
            use_mask_prompts=stage.MASK_PROMPTS.ENABLED,
            batch_size=stage.CROP_BATCH_SIZE,
        )
        return {
            "encoder": encoder,
            "trainable": keys.TRAINABLE,
            "templates": keys.TEMPLATES,
            "max_logit_scale": keys.MAX_LOGIT_SCALE,
        }

    @property
    def device(self) -> torch.device:
        """Where inputs are moved to."""
        return self.encoder.clip.logit_scale.device

    def train(self, mode: bool = True) -> MaskAdaptedCLIP:
        """The text tower, and BatchNorms, always stay in evaluation mode."""
        super().train(mode)
        for module in self.encoder.clip.modules():
            if module is self.encoder.clip.text or isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Loss of a batch.

        Args:
            batched_inputs: see `MaskPairMapper`.

        Returns:
            In training ``{"loss_contrastive"}``. In evaluation an empty dict for each input: this model
            predicts nothing itself, evaluators measure its `region_probe`.
        """
        if not self.training:
            return [{} for _ in batched_inputs]
        regions, masks = (
            torch.stack([sample[key] for sample in batched_inputs]).to(self.device, non_blocking=True)
            for key in ("region", "region_mask")
        )
        u = F.normalize(self.encoder.encode(regions, masks).float(), dim=-1)
        v = self._bank.embed_names([sample["noun"] for sample in batched_inputs]).to(self.device)
        self._clamp_scale()
        # gradients flow through what is gathered: the average over processes is that of the global batch
        loss = ClipLoss(
            local_loss=True, gather_with_grad=True, rank=comm.get_rank(), world_size=comm.get_world_size()
        )
        return {"loss_contrastive": loss(u, v, self.encoder.clip.logit_scale.exp())}

    def region_probe(self) -> RegionEncoderProbe:
        """Provide the embeddings of masks for evaluators."""
        return RegionEncoderProbe(self.encoder)

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The CLIP, what `load_clip(file)` takes, and its mask prompts, what `load_mask_prompts` does.

        In full precision: a run that starts from the file changes nothing but what it trains.
        """
        self._clamp_scale()
        clip, prompts = self.encoder.clip, self.encoder.mask_prompts
        state = clip.state_dict()
        return (state if prompts is None else state | {MASK_PROMPTS: prompts.prompts}), clip.file_metadata()

    @torch.no_grad()
    def _clamp_scale(self) -> None:
        self.encoder.clip.logit_scale.clamp_(0, self.max_logit_scale)


def _mask_prompts(cfg: CfgNode, clip: ClipModel) -> MaskPrompts | None:
    """Those of the CLIP's file; else new ones of ``MODEL.TWO_STAGE.MASK_PROMPTS.DEPTH``."""
    depth, file = cfg.MODEL.TWO_STAGE.MASK_PROMPTS.DEPTH, cfg.MODEL.CLIP.PRETRAINED
    if os.path.isfile(file):
        stored = load_mask_prompts(file, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        if stored is not None and depth not in (0, len(stored.prompts)):
            raise ValueError(
                f"MODEL.TWO_STAGE.MASK_PROMPTS.DEPTH {depth}: {file} has mask prompts of depth "
                f"{len(stored.prompts)}; 0 takes them as they are"
            )
        if stored is not None:
            return stored
    return MaskPrompts.of(clip.visual, depth) if depth else None
