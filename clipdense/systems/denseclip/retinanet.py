"""RetinaNet (Lin et al., ICCV 2017) under the rules that DenseCLIP's detectors were trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipdense.data.heads import register_head_classes

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances

__all__ = ["OwnBoxMatcher", "MMDetRetinaNet", "TwoSidedBox2BoxTransform", "add_retinanet_rules"]


def add_retinanet_rules(cfg: CN) -> None:
    """Add the rules by which mmdetection's RetinaNet differs from Detectron2's to ``MODEL.RETINANET`` (in
    place); the defaults are Detectron2's. SMOOTH_L1_LOSS_BETA, 0.0 in mmdetection, is a key of Detectron2.
    """
    keys = cfg.MODEL.RETINANET
    # An anchor that has the best IoU of a box but overlaps another box more is positive for the box that it
    # overlaps most ("detectron2") or for the one whose best it is ("mmdet").
    keys.LOW_QUALITY_MATCHES = "detectron2"
    # Losses are divided by a moving average of the number of positive anchors ("ema"), or by that of the
    # batch, in which every image counts at least one ("batch"; mmdetection).
    keys.LOSS_NORMALIZER = "ema"
    # Predicted logarithms of width and height are clamped at log(1000 / 16) from "above", or on "both" sides
    # (mmdetection).
    keys.DELTA_CLAMP = "above"
    # What TOPK_CANDIDATES_TEST counts on a level before non-maximum suppression: (anchor, class) "pairs", or
    # "anchors" by their best class (mmdetection).
    keys.TEST_CANDIDATES = "pairs"
    # Cut boxes at the image's border before non-maximum suppression (mmdetection), not only after it.
    keys.CLIP_BEFORE_NMS = False


@META_ARCH_REGISTRY.register()
class MMDetRetinaNet(RetinaNet):
    """Detectron2's RetinaNet with its rules to choose, see `add_retinanet_rules`."""

    @configurable
    def __init__(
        self,
        *,
        normalize_by: str = "ema",
        test_candidates: str = "pairs",
        clip_before_nms: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            normalize_by: "ema" or "batch".
            test_candidates: "pairs" or "anchors".
            clip_before_nms: cut boxes at the border before non-maximum suppression.
            kwargs: Detectron2's; ``anchor_matcher`` and ``box2box_transform`` carry the other rules.
        """
        super().__init__(**kwargs)
        _check("LOSS_NORMALIZER", normalize_by, ("ema", "batch"))
        _check("TEST_CANDIDATES", test_candidates, ("pairs", "anchors"))
        self.normalize_by, self.test_candidates = normalize_by, test_candidates
        self.clip_before_nms = clip_before_nms

    @classmethod
    def from_config(cls, cfg: CN) -> dict[str, Any]:
        keys = cfg.MODEL.RETINANET
        _check("LOW_QUALITY_MATCHES", keys.LOW_QUALITY_MATCHES, ("detectron2", "mmdet"))
        _check("DELTA_CLAMP", keys.DELTA_CLAMP, ("above", "both"))
        arguments: dict[str, Any] = super().from_config(cfg)
        if keys.LOW_QUALITY_MATCHES == "mmdet":
            arguments["anchor_matcher"] = OwnBoxMatcher(
                keys.IOU_THRESHOLDS, keys.IOU_LABELS, allow_low_quality_matches=True
            )
        if keys.DELTA_CLAMP == "both":
            arguments["box2box_transform"] = TwoSidedBox2BoxTransform(keys.BBOX_REG_WEIGHTS)
        return arguments | {
            "normalize_by": keys.LOSS_NORMALIZER,
            "test_candidates": keys.TEST_CANDIDATES,
            "clip_before_nms": keys.CLIP_BEFORE_NMS,
        }

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Detectron2's losses "loss_cls" and "loss_box_reg", divided as ``normalize_by`` says."""
        losses: dict[str, Tensor] = super().losses(
            anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        if self.normalize_by == "ema":
            return losses
        labels = torch.stack(gt_labels)
        positives = ((labels >= 0) & (labels < self.num_classes)).sum(1).clamp(min=1).sum()
        # Detectron2 has divided by the average, which it keeps in loss_normalizer.
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
        """One level's candidates for non-maximum suppression.

        Args:
            anchors: A of them.
            pred_scores: (A, K), 0..1; pred_deltas: (A, 4).
        """
        if self.test_candidates == "anchors":
            best = pred_scores.amax(1).topk(min(topk_candidates, len(pred_scores))).indices
            anchors, pred_scores, pred_deltas = anchors[best], pred_scores[best], pred_deltas[best]
            topk_candidates = pred_scores.numel()
        candidates: Instances = super()._decode_per_level_predictions(
            anchors, pred_scores, pred_deltas, score_thresh, topk_candidates, image_size
        )
        if self.clip_before_nms:
            candidates.pred_boxes.clip(image_size)
        return candidates


class OwnBoxMatcher(Matcher):
    """Detectron2's matcher, with every anchor that attains the best IoU of a box assigned to that box.

    Of several such boxes the last one has the anchor (mmdetection's MaxIoUAssigner).
    """

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """IoU (M, N) of boxes and anchors -> index of the box (N,), and label (N,) as Detectron2's."""
        matches, labels = super().__call__(match_quality_matrix)
        if match_quality_matrix.numel():
            best = match_quality_matrix == match_quality_matrix.amax(1, keepdim=True)
            number = torch.arange(1, len(best) + 1, device=best.device)[:, None]
            own = (best * number).amax(0)
            matches = torch.where(own > 0, own - 1, matches)
        return matches, labels


class TwoSidedBox2BoxTransform(Box2BoxTransform):
    """Detectron2's transform, with the logarithms of width and height clamped from below as from above."""

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Deltas (N, 4 k) of boxes (N, 4) -> boxes (N, 4 k)."""
        _, _, w, h = self.weights
        limits = [-torch.inf, -torch.inf, -self.scale_clamp * w, -self.scale_clamp * h]
        lowest = deltas.new_tensor(limits, dtype=torch.float32).repeat(deltas.shape[1] // 4)
        decoded: Tensor = super().apply_deltas(deltas.float().maximum(lowest), boxes)
        return decoded


def _check(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"MODEL.RETINANET.{key} must be {' or '.join(known)}, not {value!r}")


register_head_classes("MMDetRetinaNet", base="RetinaNet")
