"""`MaskAdaptedCLIP`: contrastive fine-tuning of CLIP on masked crops."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip import ClipModel
from clipdense.clip.contrastive import contrastive_loss
from clipdense.clip.layouts import MASK_PROMPTS
from clipdense.clip.mask_prompts import MaskPrompts, load_mask_prompts
from clipdense.clip.text import TextBank
from clipdense.evaluation.probes import RegionEncoderProbe
from clipdense.regions import CropRule, RegionEncoder
from clipdense.regions.crops import CROP_RULES

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["MaskAdaptedCLIP"]

TRAINABLE = ("image", "prompts", "both")


@META_ARCH_REGISTRY.register()
class MaskAdaptedCLIP(nn.Module):
    """Contrastive learning of masked crops and nouns (OVSeg, Liang et al., CVPR 2023, section 3).

    Trained are the image encoder, the mask prompts that replace its masked patches, or both, and the
    temperature. The text encoder and the statistics of BatchNorms are frozen. To train one part after the
    other, start the second run from the export of the first, which contains the mask prompts.

    Equal nouns in a batch count as negatives, as published. Their text embeddings are equal, since the text
    encoder is frozen; shared targets would give the same loss.

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
            encoder: with the CLIP to train, including its text encoder, and its mask prompts.
            trainable: "image", "prompts" or "both".
            templates: prompt templates of the nouns, see `TextBank`.
            max_logit_scale: upper bound of the temperature exp(logit_scale); the lower bound is 1.

        Raises:
            ValueError: If ``trainable`` is unknown, the CLIP has no text encoder, or mask prompts are to be
                trained and the encoder has none.
        """
        super().__init__()
        if trainable not in TRAINABLE:
            raise ValueError(
                f"MODEL.MASK_ADAPTED_CLIP.TRAINABLE {trainable!r} is not one of {', '.join(TRAINABLE)}"
            )
        if trainable != "image" and not encoder.prompted:
            raise ValueError(
                f"MODEL.MASK_ADAPTED_CLIP.TRAINABLE {trainable!r} needs mask prompts: set "
                "MODEL.MASK_ADAPTED_CLIP.MASK_PROMPTS.DEPTH, with ENABLED True"
            )
        self.encoder = encoder.requires_grad_(False)
        clip = encoder.clip
        clip.logit_scale.requires_grad_(True)
        if trainable != "prompts":
            clip.visual.requires_grad_(True)
        if trainable != "image":
            assert encoder.mask_prompts is not None
            encoder.mask_prompts.requires_grad_(True)
        self.max_logit_scale = max_logit_scale
        self._bank = TextBank(clip, templates)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the constructor arguments from ``MODEL.CLIP`` and ``MODEL.MASK_ADAPTED_CLIP``.

        Raises:
            ValueError: If a position grid is set (an export cannot store it), crops have another size than
                the CLIP's images, the file's mask prompts have another depth, or keys of OVSeg are set; see
                also `clip_from_config`.
        """
        keys = cfg.MODEL.MASK_ADAPTED_CLIP
        _refuse_two_stage_keys(cfg)
        if cfg.MODEL.CLIP.POSITION_GRID:
            raise ValueError("MODEL.CLIP.POSITION_GRID: an export keeps the CLIP's own grid; set it to 0")
        clip = clip_from_config(cfg)
        if clip.image_size[0] != cfg.INPUT.MASK_PAIRS.SIZE:
            raise ValueError(
                f"INPUT.MASK_PAIRS.SIZE {cfg.INPUT.MASK_PAIRS.SIZE}: '{clip.name}' takes crops of "
                f"{clip.image_size[0]} pixels"
            )
        encoder = RegionEncoder(
            clip,
            CropRule.from_config(keys.CROP),
            mask_prompts=_mask_prompts(cfg, clip),
            use_mask_prompts=keys.MASK_PROMPTS.ENABLED,
            batch_size=keys.CROP_BATCH_SIZE,
        )
        return {
            "encoder": encoder,
            "trainable": keys.TRAINABLE,
            "templates": keys.TEMPLATES,
            "max_logit_scale": keys.MAX_LOGIT_SCALE,
        }

    @property
    def device(self) -> torch.device:
        """Device of the model, to which inputs are moved."""
        return self.encoder.clip.logit_scale.device

    def train(self, mode: bool = True) -> MaskAdaptedCLIP:
        """Set the mode; the text encoder and BatchNorms stay in evaluation mode."""
        super().train(mode)
        for module in self.encoder.clip.modules():
            if module is self.encoder.clip.text or isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Compute the contrastive loss of a batch.

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
        return {"loss_contrastive": contrastive_loss(u, v, self.encoder.clip.logit_scale.exp())}

    def region_probe(self) -> RegionEncoderProbe:
        """Provide the embeddings of masks for evaluators."""
        return RegionEncoderProbe(self.encoder)

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and metadata of a file for `load_clip` and `load_mask_prompts`.

        Tensors keep full precision, so that a run from this file changes only the parameters that it trains.
        """
        self._clamp_scale()
        clip, prompts = self.encoder.clip, self.encoder.mask_prompts
        state = clip.state_dict()
        return (state if prompts is None else state | {MASK_PROMPTS: prompts.prompts}), clip.file_metadata()

    @torch.no_grad()
    def _clamp_scale(self) -> None:
        self.encoder.clip.logit_scale.clamp_(0, math.log(self.max_logit_scale))


def _mask_prompts(cfg: CfgNode, clip: ClipModel) -> MaskPrompts | None:
    """Load the mask prompts of the CLIP's file; else make new ones of the configured depth."""
    depth, file = cfg.MODEL.MASK_ADAPTED_CLIP.MASK_PROMPTS.DEPTH, cfg.MODEL.CLIP.PRETRAINED
    if os.path.isfile(file):
        stored = load_mask_prompts(file, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        if stored is not None and depth not in (0, len(stored.prompts)):
            raise ValueError(
                f"MODEL.MASK_ADAPTED_CLIP.MASK_PROMPTS.DEPTH {depth}: {file} has mask prompts of depth "
                f"{len(stored.prompts)}; set 0 to keep them"
            )
        if stored is not None:
            return stored
    return MaskPrompts.of(clip.visual, depth) if depth else None


def _refuse_two_stage_keys(cfg: CfgNode) -> None:
    """Refuse the keys of OVSeg that configured this model before it had its own."""
    stage = cfg.MODEL.TWO_STAGE
    if CropRule.from_config(stage.CROP) != CROP_RULES["ovseg"]:
        key = "CROP"
    elif stage.MASK_PROMPTS.DEPTH or not stage.MASK_PROMPTS.ENABLED:
        key = "MASK_PROMPTS"
    else:
        return
    raise ValueError(
        f"MODEL.TWO_STAGE.{key} has no effect on MaskAdaptedCLIP: set MODEL.MASK_ADAPTED_CLIP.{key}"
    )
