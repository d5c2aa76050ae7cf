"""Construction of the parts of FC-CLIP and ODISE from a configuration."""

from __future__ import annotations

import torch
from torch import nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip import load_clip
from clipdense.clip.model import ClipModel
from clipdense.systems.mask_pooling.queries import PooledQueryHead, SynonymClassifier

from detectron2.config import CfgNode

__all__ = ["build_classifier", "build_clip", "build_query_head"]


def build_clip(cfg: CfgNode) -> ClipModel:
    """Build the CLIP that embeds class names and, with mask tokens, masks.

    Raises:
        ValueError: If the CLIP has no text tower, or OUT_OF_VOCABULARY names another CLIP than the backbone's
            with HEAD dense.
    """
    keys = cfg.MODEL.MASK_POOLING.OUT_OF_VOCABULARY
    if keys.NAME and keys.HEAD == "dense":
        raise ValueError(
            "MODEL.MASK_POOLING.OUT_OF_VOCABULARY.NAME is for HEAD mask_tokens: with HEAD dense, the CLIP is "
            "MODEL.CLIP, which is in the backbone"
        )
    clip = (
        load_clip(keys.NAME, keys.PRETRAINED, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        if keys.NAME
        else clip_from_config(cfg)
    )
    if clip.text is None:
        raise ValueError(f"'{clip.name}' has no text tower, which class names need")
    if keys.HEAD != "mask_tokens":
        clip.visual = nn.Identity()  # type: ignore[assignment]  # the backbone has its own image tower
    return clip


def build_classifier(cfg: CfgNode, clip: ClipModel) -> SynonymClassifier:
    """Build the classifier of query embeddings from ``MODEL.MASK_POOLING``.

    Raises:
        ValueError: If VOID_INIT is unknown.
    """
    keys = cfg.MODEL.MASK_POOLING
    classifier = SynonymClassifier(clip.embed_dim, project_to=keys.TEXT_PROJECTION)
    if keys.VOID_INIT not in ("random", "text"):
        raise ValueError(f"MODEL.MASK_POOLING.VOID_INIT must be random or text, not {keys.VOID_INIT!r}")
    if keys.VOID_INIT == "text" and not classifier.void.is_meta:
        with torch.no_grad():
            device = clip.logit_scale.device
            classifier.void.copy_(clip.encode_text(clip.tokenize([""]).to(device)))
    if keys.GROUNDING.ENABLED:
        classifier.void.requires_grad_(False)  # the binary classifier decides about void
    return classifier


def build_query_head(cfg: CfgNode, embed_dim: int) -> PooledQueryHead:
    """Build the head that embeds queries with the pixels in their masks."""
    masks, keys = cfg.MODEL.MASK_FORMER, cfg.MODEL.MASK_POOLING
    return PooledQueryHead(
        masks.HIDDEN_DIM,
        masks.MASK_DIM,
        embed_dim,
        num_layers=keys.EMBED_LAYERS,
        norm=keys.EMBED_NORM,
        binary=keys.GROUNDING.ENABLED,
    )
