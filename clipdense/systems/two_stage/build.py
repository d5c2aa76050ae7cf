"""Construction of the CLIP branch of two-stage systems from a configuration."""

from __future__ import annotations

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip import load_clip
from clipdense.clip.mask_prompts import MaskPrompts, load_mask_prompts
from clipdense.regions import CropRule, RegionEncoder

from detectron2.config import CfgNode

__all__ = ["build_encoder"]


def build_encoder(cfg: CfgNode) -> RegionEncoder:
    """Build the CLIP that embeds class names and crops, from ``MODEL.TWO_STAGE`` and ``MODEL.CLIP``.

    Raises:
        ValueError: If the CLIP has no text tower, or MODEL.CLIP.POSITION_GRID would resize the positions of
            ADAPTED_CLIP.
    """
    keys, name = cfg.MODEL.TWO_STAGE, cfg.MODEL.TWO_STAGE.CROP_CLIP.NAME
    pickles = {"allow_pickle": cfg.MODEL.ALLOW_PICKLE}
    clip = load_clip(name, keys.CROP_CLIP.PRETRAINED, **pickles) if name else clip_from_config(cfg)
    if clip.text is None:
        raise ValueError(f"'{clip.name}' has no text tower, which two-stage systems need for class names")
    mask_prompts = None
    if keys.ADAPTED_CLIP:
        if cfg.MODEL.CLIP.POSITION_GRID and not name:
            raise ValueError("MODEL.CLIP.POSITION_GRID must be 0: ADAPTED_CLIP keeps its own grid")
        adapted = load_clip(name or cfg.MODEL.CLIP.NAME, keys.ADAPTED_CLIP, text=False, **pickles)
        clip.visual, clip.logit_scale = adapted.visual, adapted.logit_scale
        mask_prompts = load_mask_prompts(keys.ADAPTED_CLIP, **pickles)
    elif keys.MASK_PROMPTS.DEPTH:
        mask_prompts = MaskPrompts.of(clip.visual, keys.MASK_PROMPTS.DEPTH)
    return RegionEncoder(
        clip,
        CropRule.from_config(keys.CROP),
        mask_prompts=mask_prompts,
        use_mask_prompts=keys.MASK_PROMPTS.ENABLED,
        batch_size=keys.CROP_BATCH_SIZE,
        precision=keys.PRECISION,
        compile=keys.COMPILE,
    )
