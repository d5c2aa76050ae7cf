"""Fusion of the in-vocabulary and the out-of-vocabulary classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from detectron2.config import CfgNode

__all__ = ["EmptyMasks", "Ensemble", "EnsembleSource", "Rule", "with_objectness"]

EnsembleSource = Literal["ensemble", "in_vocabulary", "out_of_vocabulary"]
Rule = Literal["probability", "logit"]
EmptyMasks = Literal["in_vocabulary", "pooled"]


@dataclass(frozen=True)
class Ensemble:
    """Rule that makes one class score from two classifiers.

    With the in-vocabulary probabilities p and the out-of-vocabulary probabilities q, both without void, and
    the exponent e = alpha for base and beta for novel classes:

        score_k = softmax over k of log(p_k^(1 - e) q_k^e), times 1 - p_void.

    Attributes:
        alpha: Weight of q for base classes, 0 .. 1 (FC-CLIP 0.4; ODISE 0.3, on captions 0.35).
        beta: Weight of q for novel classes, 0 .. 1 (FC-CLIP 0.8; ODISE 0.7, on captions 0.65).
        rule: "probability", as above; or "logit": softmax of (2 - alpha - beta) times the in-vocabulary
            logits plus e times the out-of-vocabulary logits (an option of ODISE's code).
        source: "ensemble"; or one classifier alone, with the void of the in-vocabulary classifier.
        empty: Masks without a cell of CLIP's map: "in_vocabulary" takes p alone (FC-CLIP's
            ENSEMBLE_ON_VALID_MASK); "pooled" fuses q of an empty region, which the tower's head makes of
            zeros (published ConvNeXts).
        void_adjustment: Void is multiplied by 1 - this times the largest q (OVRCOAT: 0.5); 0: unchanged.

    Raises:
        ValueError: If a choice is unknown, or a number lies outside 0 .. 1.

    Source: FC-CLIP (Yu et al., NeurIPS 2023, section 3.3), ODISE (Xu et al., CVPR 2023, equation 7).
    """

    alpha: float = 0.4
    beta: float = 0.8
    rule: Rule = "probability"
    source: EnsembleSource = "ensemble"
    empty: EmptyMasks = "in_vocabulary"
    void_adjustment: float = 0.0

    @classmethod
    def from_config(cls, keys: CfgNode) -> Ensemble:
        """Read the rule from ``MODEL.MASK_POOLING.ENSEMBLE``."""
        return cls(
            alpha=keys.ALPHA,
            beta=keys.BETA,
            rule=keys.RULE,
            source=keys.SOURCE,
            empty=keys.EMPTY,
            void_adjustment=keys.VOID_ADJUSTMENT,
        )

    def __post_init__(self) -> None:
        for name, choices in (("rule", Rule), ("source", EnsembleSource), ("empty", EmptyMasks)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(choices))}, not {getattr(self, name)!r}"
                )
        for name in ("alpha", "beta", "void_adjustment"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0 .. 1, not {getattr(self, name)}")

    def __call__(
        self, in_logits: Tensor, out_logits: Tensor | None, valid: Tensor, base: Tensor | None
    ) -> Tensor:
        """Fuse the scores of one image.

        Args:
            in_logits: (Q, K + 1), void last.
            out_logits: (Q, K); None if there is no out-of-vocabulary classifier.
            valid: (Q,) bool, the masks with a cell of CLIP's map.
            base: (K,) bool, the base classes; None: every class counts as novel.

        Returns:
            (Q, K + 1) probabilities, void last.
        """
        void = in_logits.softmax(-1)[:, -1:]
        if out_logits is None:
            return _with_void(in_logits[:, :-1].softmax(-1), void)
        classes = self.fuse(in_logits[:, :-1], out_logits, valid, base).softmax(-1)
        if self.void_adjustment:
            q = out_logits.softmax(-1).amax(-1, keepdim=True) * valid[:, None]
            void = void * (1 - self.void_adjustment * q)
        return _with_void(classes, void)

    def fuse(self, in_logits: Tensor, out_logits: Tensor, valid: Tensor, base: Tensor | None) -> Tensor:
        """Fuse the logits of classes, both (Q, K) without void, to logits (Q, K)."""
        weights = self._weights(in_logits, base)
        if self.empty == "in_vocabulary":
            weights = weights * valid[:, None]
            # an empty region may be NaN, which a weight of 0 does not remove from a sum
            out_logits = torch.where(valid[:, None], out_logits, 0.0)
        if self.rule == "logit" and self.source == "ensemble":
            return (2 - self.alpha - self.beta) * in_logits + weights * out_logits
        return (1 - weights) * in_logits.log_softmax(-1) + weights * out_logits.log_softmax(-1)

    def _weights(self, logits: Tensor, base: Tensor | None) -> Tensor:
        """Return the weight e of the out-of-vocabulary classifier for each class, (1, K)."""
        if self.source != "ensemble":
            return logits.new_full((1, logits.shape[1]), float(self.source == "out_of_vocabulary"))
        if base is None:
            return logits.new_full((1, logits.shape[1]), self.beta)
        return torch.where(base, self.alpha, self.beta).to(logits)[None]


def with_objectness(logits: Tensor, objectness: Tensor) -> Tensor:
    """Append void, which a binary classifier decides, to the logits of classes.

    Args:
        logits: (..., K).
        objectness: (..., 2) logits of "object" and "no object".

    Returns:
        (..., K + 1) logits whose softmax is (1 - p_void) softmax(logits), then p_void.
    """
    is_object, is_void = objectness.log_softmax(-1).split(1, dim=-1)
    return torch.cat([logits.log_softmax(-1) + is_object, is_void], dim=-1)


def _with_void(classes: Tensor, void: Tensor) -> Tensor:
    return torch.cat([classes * (1 - void), void], dim=-1)
