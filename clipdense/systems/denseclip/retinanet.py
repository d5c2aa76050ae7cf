"""RetinaNet (Lin et al., ICCV 2017) under Detectron2's or mmdetection's rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from clipdense.data.heads import register_head_classes

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances

__all__ = [
    "MMDetRetinaNet",
    "OwnBoxMatcher",
    "RetinaNetRules",
    "TwoSidedBox2BoxTransform",
    "add_retinanet_rules",
]

Framework = Literal["detectron2", "mmdetection"]


@dataclass(frozen=True)
class RetinaNetRules:
    """The framework whose rule is followed, for each rule in which the two differ.

    mmdetection's box loss, L1, is not a rule here: Detectron2 has MODEL.RETINANET.SMOOTH_L1_LOSS_BETA 0.0.

    Attributes:
        low_quality_matches: an anchor that is the best one of a box but overlaps another box more goes to the
            box that it overlaps most (detectron2), or to the box whose best anchor it is (mmdetection).
        loss_normalizer: losses are divided by a moving average of the number of positive anchors
            (detectron2), or by the number of the batch, to which every image adds at least one (mmdetection).
        delta_clamp: predicted logarithms of width and height are at most log(1000 / 16) (detectron2), and
            also at least -log(1000 / 16) (mmdetection).
        test_candidates: before non-maximum suppression, each level keeps the best TOPK_CANDIDATES_TEST pairs
            of anchor and class (detectron2), or the best anchors with all their classes (mmdetection).
        clip_before_nms: boxes are clipped to the image after non-maximum suppression (detectron2), or also
            before it (mmdetection).
    """

    low_quality_matches: Framework = "detectron2"
    loss_normalizer: Framework = "detectron2"
    delta_clamp: Framework = "detectron2"
    test_candidates: Framework = "detectron2"
    clip_before_nms: Framework = "detectron2"

    @classmethod
    def build(cls, rules: str, overrides: Mapping[str, str] | None = None) -> RetinaNetRules:
        """Return one framework's rules, with single rules taken from the other.

        Args:
            rules: "detectron2" or "mmdetection".
            overrides: rule (an attribute of the class) -> framework; an empty name changes nothing.

        Raises:
            ValueError: If a rule or a framework is unknown.
        """
        overrides = {rule: framework for rule, framework in (overrides or {}).items() if framework}
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(overrides) - set(names)):
            raise ValueError(f"MODEL.RETINANET.RULE_OVERRIDES has no {unknown}; it has {', '.join(names)}")
        for key, framework in (
            ("RULES", rules),
            *((f"RULE_OVERRIDES.{r.upper()}", f) for r, f in overrides.items()),
        ):
            if framework not in get_args(Framework):
                known = " or ".join(get_args(Framework))
                raise ValueError(f"MODEL.RETINANET.{key} must be {known}, not {framework!r}")
        values: dict[str, Any] = {**dict.fromkeys(names, rules), **overrides}
        return cls(**values)


def add_retinanet_rules(cfg: CN) -> None:
    """Add the rules in which mmdetection's RetinaNet differs from Detectron2's to ``MODEL.RETINANET`` (in
    place).
    """
    keys = cfg.MODEL.RETINANET
    # The rules that MMDetRetinaNet follows: "detectron2" or "mmdetection" (published DenseCLIP detectors).
    # mmdetection's L1 box loss is Detectron2's key SMOOTH_L1_LOSS_BETA 0.0.
    keys.RULES = "detectron2"
    # Single rules: "detectron2" or "mmdetection"; "" follows RULES. `RetinaNetRules` describes them.
    keys.RULE_OVERRIDES = CN()
    # The box of an anchor that is the best one of a box but overlaps another box more.
    keys.RULE_OVERRIDES.LOW_QUALITY_MATCHES = ""
    # The number that losses are divided by: moving average, or positive anchors of the batch.
    keys.RULE_OVERRIDES.LOSS_NORMALIZER = ""
    # Clamp of predicted logarithms of width and height: from above, or on both sides.
    keys.RULE_OVERRIDES.DELTA_CLAMP = ""
    # What TOPK_CANDIDATES_TEST counts: pairs of anchor and class, or anchors.
    keys.RULE_OVERRIDES.TEST_CANDIDATES = ""
    # Whether boxes are clipped to the image before non-maximum suppression too.
    keys.RULE_OVERRIDES.CLIP_BEFORE_NMS = ""
    for rule in keys.RULE_OVERRIDES:
        cfg.register_renamed_key(f"MODEL.RETINANET.{rule}", f"MODEL.RETINANET.RULE_OVERRIDES.{rule}")


@META_ARCH_REGISTRY.register()
class MMDetRetinaNet(RetinaNet):
    """Detectron2's RetinaNet that can follow mmdetection's rules, see `RetinaNetRules`."""

    @configurable
    def __init__(
        self,
        *,
        rules: Framework = "detectron2",
        rule_overrides: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            rules: "detectron2" or "mmdetection".
            rule_overrides: single rules that follow the other framework: name in `RetinaNetRules` ->
                framework.
            kwargs: arguments of `RetinaNet`. ``anchor_matcher`` and ``box2box_transform`` are Detectron2's;
                the rules modify them.

        Raises:
            ValueError: If a rule or a framework is unknown.
        """
        super().__init__(**kwargs)
        self.rules = RetinaNetRules.build(rules, rule_overrides)
        if self.rules.low_quality_matches == "mmdetection":
            self.anchor_matcher: Any = OwnBoxMatcher(kwargs["anchor_matcher"])
        if self.rules.delta_clamp == "mmdetection":
            transform: Box2BoxTransform = kwargs["box2box_transform"]
            self.box2box_transform = TwoSidedBox2BoxTransform(transform.weights, transform.scale_clamp)

    @classmethod
    def from_config(cls, cfg: CN) -> dict[str, Any]:
        keys = cfg.MODEL.RETINANET
        arguments: dict[str, Any] = super().from_config(cfg)
        overrides = {rule.lower(): framework for rule, framework in keys.RULE_OVERRIDES.items()}
        return arguments | {"rules": keys.RULES, "rule_overrides": overrides}

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute Detectron2's losses "loss_cls" and "loss_box_reg" under the rule of normalisation."""
        losses: dict[str, Tensor] = super().losses(
            anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        if self.rules.loss_normalizer == "detectron2":
            return losses
        labels = torch.stack(gt_labels)
        positives = ((labels >= 0) & (labels < self.num_classes)).sum(1).clamp(min=1).sum()
        # Detectron2 has divided by the moving average, which it keeps in loss_normalizer.
        return {name: loss * (self.loss_normalizer / positives) for name, loss in losses.items()}

    def _decode_per_level_predictions(
        self,
        anchors: Boxes,
        pred_scores: Tensor,
        pred_deltas: Tensor,
        score_thresh: float,
        topk_candidates: int,
        image_size: tuple[int, int],
    ) -> Instances:
        """Select one level's candidates for non-maximum suppression.

        Args:
            anchors: A anchors.
            pred_scores: (A, K), in 0..1; pred_deltas: (A, 4).
        """
        if self.rules.test_candidates == "mmdetection":
            best = pred_scores.amax(1).topk(min(topk_candidates, len(pred_scores))).indices
            anchors, pred_scores, pred_deltas = anchors[best], pred_scores[best], pred_deltas[best]
            topk_candidates = pred_scores.numel()
        candidates: Instances = super()._decode_per_level_predictions(
            anchors, pred_scores, pred_deltas, score_thresh, topk_candidates, image_size
        )
        if self.rules.clip_before_nms == "mmdetection":
            candidates.pred_boxes.clip(image_size)
        return candidates


class OwnBoxMatcher:
    """Detectron2's matcher, except that the best anchors of a box are matched to that box.

    An anchor that is the best one of several boxes goes to the last of them (mmdetection's MaxIoUAssigner).
    """

    def __init__(self, matcher: Matcher) -> None:
        """
        Args:
            matcher: decides which anchors are positive; must allow low-quality matches.
        """
        self.matcher = matcher

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Match anchors to boxes.

        Args:
            match_quality_matrix: IoU (M, N) of boxes and anchors.

        Returns:
            The index of each anchor's box (N,), and its label (N,) as Detectron2's matcher gives it.
        """
        matches, labels = self.matcher(match_quality_matrix)
        if match_quality_matrix.numel():
            best = match_quality_matrix == match_quality_matrix.amax(1, keepdim=True)
            number = torch.arange(1, len(best) + 1, device=best.device)[:, None]
            own = (best * number).amax(0)
            matches = torch.where(own > 0, own - 1, matches)
        return matches, labels


class TwoSidedBox2BoxTransform(Box2BoxTransform):
    """Detectron2's box transform that clamps the logarithms of width and height from below too."""

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Apply deltas (N, 4 k) to boxes (N, 4) -> boxes (N, 4 k)."""
        _, _, w, h = self.weights
        limits = [-torch.inf, -torch.inf, -self.scale_clamp * w, -self.scale_clamp * h]
        lowest = deltas.new_tensor(limits, dtype=torch.float32).repeat(deltas.shape[1] // 4)
        decoded: Tensor = super().apply_deltas(deltas.float().maximum(lowest), boxes)
        return decoded


register_head_classes("MMDetRetinaNet", base="RetinaNet")
