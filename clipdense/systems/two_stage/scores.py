"""Fusion of the class scores of queries with CLIP's class scores of their crops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.regions import FusionSettings, fuse_valid, get_fusion

from detectron2.config import CfgNode

__all__ = ["Scoring"]

Source = Literal["ensemble", "proposals", "clip"]
Empty = Literal["neutral", "boost"]


@dataclass(frozen=True)
class Scoring:
    """Rule that makes one class score from two classifiers.

    Attributes:
        source: "ensemble" fuses both; "proposals" and "clip" use one of them alone. With "clip", masks
        without
            a crop are background.
        fusion: Name of the ensemble's rule in `clipdense.regions.FUSIONS`.
        settings: Weights of CLIP's scores for base and novel classes.
        empty: The ensemble's policy for masks without a crop, "neutral" or "boost"; see `fuse_valid`.
        clip_background: Add the query's background logit to CLIP's class logits before the softmax
            (ZegFormer); otherwise CLIP's probabilities of the classes sum to 1.
        min_query_score: CLIP skips the crops of queries whose best class probability in the proposals' own
            scores is lower. Such queries keep their own scores; with "clip" they are background. 0: no query
            is skipped.

    Raises:
        ValueError: If the source, fusion or policy is unknown.
    """

    source: Source = "ensemble"
    fusion: str = "ovseg"
    settings: FusionSettings = field(default_factory=lambda: FusionSettings(0.7, 0.7))
    empty: Empty = "neutral"
    clip_background: bool = False
    min_query_score: float = 0.0

    @classmethod
    def from_config(cls, keys: CfgNode) -> Scoring:
        """Read the rule from ``MODEL.TWO_STAGE.SCORES``."""
        return cls(
            source=keys.SOURCE,
            fusion=keys.FUSION,
            settings=FusionSettings(keys.ALPHA, keys.BETA),
            empty=keys.EMPTY,
            clip_background=keys.CLIP_BACKGROUND,
            min_query_score=keys.MIN_QUERY_SCORE,
        )

    def __post_init__(self) -> None:
        get_fusion(self.fusion)
        for name, choices in (("source", Source), ("empty", Empty)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(choices))}, not '{getattr(self, name)}'"
                )

    def query_mask(self, query_logits: Tensor) -> Tensor | None:
        """Select the queries (Q,) that CLIP sees, by their logits (Q, K + 1); None: all."""
        if not self.min_query_score:
            return None
        return query_logits.softmax(-1)[:, :-1].amax(-1) >= self.min_query_score

    def __call__(
        self,
        query_logits: Tensor,
        crop_logits: Tensor,
        valid: Tensor,
        base: Tensor | None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """Fuse the scores of one image.

        Args:
            query_logits: (Q, K + 1), background last.
            crop_logits: (V, K), of the masks where `valid` is True.
            valid: (Q,) bool, the masks that have a crop and are in `query_mask`.
            base: (K,) bool, the base classes, or None if they are not known.
            query_mask: (Q,) bool, the queries that CLIP has seen; None: all.

        Returns:
            (Q, K + 1) scores, background last. CLIP alone gives the background 0 if it does not score it.
        """
        p = query_logits.softmax(-1)
        if self.source == "proposals":
            return p
        if self.clip_background:
            q = torch.cat([crop_logits, query_logits[valid, -1:]], dim=-1).softmax(-1)
        else:
            q = F.pad(crop_logits.softmax(-1), (0, 1))
        if self.source == "clip":
            background = torch.full_like(valid, p.shape[1] - 1, dtype=torch.long)
            return F.one_hot(background, p.shape[1]).to(p).masked_scatter(valid[:, None], q)
        fused = fuse_valid(get_fusion(self.fusion), p, q, valid, base, self.settings, self.empty)
        return fused if query_mask is None else torch.where(query_mask[:, None], fused, p)
