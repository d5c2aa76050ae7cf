"""Class scores of mask proposals from two classifiers: of their queries, and CLIP's of their crops."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.regions import FusionSettings, fuse_valid, get_fusion

__all__ = ["Scoring"]


@dataclass(frozen=True)
class Scoring:
    """How both classifiers become one.

    Attributes:
        source: "ensemble" fuses both; "proposals" and "clip" are one of them alone. With "clip", masks that
            have no crop are background.
        fusion: of the ensemble, a name in `clipdense.regions.FUSIONS`.
        settings: CLIP's weight for base and for novel classes.
        empty: what the ensemble does with masks that have no crop: "neutral" or "boost", see `fuse_valid`.
        clip_background: the proposals' background logit stands beside CLIP's class logits in its softmax
            (ZegFormer); otherwise CLIP shares all of 1 among the classes.
        min_query_score: CLIP skips the crops of queries whose best class probability in the proposals' own
            scores is lower. Such queries keep their own scores; with "clip" they are background. 0: every
            crop is seen.

    Raises:
        ValueError: an unknown source, fusion or policy.
    """

    source: str = "ensemble"
    fusion: str = "ovseg"
    settings: FusionSettings = field(default_factory=lambda: FusionSettings(0.7, 0.7))
    empty: str = "neutral"
    clip_background: bool = False
    min_query_score: float = 0.0

    def __post_init__(self) -> None:
        get_fusion(self.fusion)
        for name, known in (
            ("source", ("ensemble", "proposals", "clip")),
            ("empty", ("neutral", "boost")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not '{getattr(self, name)}'")

    def query_mask(self, proposals: Tensor) -> Tensor | None:
        """The queries (Q,) that CLIP is to see, from their logits (Q, K + 1); None: all."""
        return (
            proposals.softmax(-1)[:, :-1].amax(-1) >= self.min_query_score if self.min_query_score else None
        )

    def __call__(
        self,
        proposals: Tensor,
        clip: Tensor | None,
        valid: Tensor | None,
        base: Tensor | None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            proposals: logits (Q, K + 1), the background last.
            clip: logits (V, K) of the masks where `valid` (Q,) is true; None for "proposals".
            base: (K,) bool, or None.
            query_mask: which queries CLIP has seen, from `query_mask`; None: all.

        Returns:
            (Q, K + 1), the background last; 0 for it where CLIP alone scores and knows none.
        """
        p = proposals.softmax(-1)
        if self.source == "proposals":
            return p
        assert clip is not None and valid is not None
        if self.clip_background:
            q = torch.cat([clip, proposals[valid, -1:]], dim=-1).softmax(-1)
        else:
            q = F.pad(clip.softmax(-1), (0, 1))
        if self.source == "clip":
            nothing = F.one_hot(torch.full_like(valid, p.shape[1] - 1, dtype=torch.long), p.shape[1]).to(p)
            return nothing.masked_scatter(valid[:, None], q)
        fused = fuse_valid(get_fusion(self.fusion), p, q, valid, base, self.settings, self.empty)
        return fused if query_mask is None else torch.where(query_mask[:, None], fused, p)
