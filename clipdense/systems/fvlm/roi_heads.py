"""Heads of F-VLM: any words as classes, scores fused with CLIP's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone import AnyStridePooler
from clipdense.regions import FusionSettings, TextClassifier, class_nms, get_fusion
from clipdense.systems.fvlm.loss import open_vocabulary_loss

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    FastRCNNOutputLayers,
    StandardROIHeads,
    build_box_head,
    build_mask_head,
)
from detectron2.structures import Boxes, Instances

__all__ = ["CLIP_EMBEDDING", "FVLMBoxPredictor", "FVLMROIHeads"]

CLIP_EMBEDDING = "clip_embedding"
"""Field of proposals with CLIP's embedding of each region, (n, D)."""


class FVLMBoxPredictor(FastRCNNOutputLayers):
    """Scores by cosine similarity to text, class-agnostic boxes; in evaluation scores fused with CLIP's (Kuo
    et al., F-VLM, ICLR 2023, section 3).

    Attributes:
        classifier: of the training classes; its `text` goes into checkpoints.
        class_weight: (K + 1,) weight of each training class in the loss, 0 for novel ones, the background
            last.
    """

    class_weight: Tensor

    def __init__(
        self,
        input_shape: ShapeSpec,
        classifier: TextClassifier,
        *,
        class_weight: Tensor,
        box_fc_dim: int = 0,
        clip_scale: float = 100.0,
        fusion: str = "fvlm",
        settings: FusionSettings,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: of a region's feature.
            classifier: the detector's.
            class_weight: see the class.
            box_fc_dim: width of a layer that only box regression has; 0 for none.
            clip_scale: inverse temperature of CLIP's scores.
            fusion, settings: see `clipdense.regions.fusion`.
            kwargs: of `FastRCNNOutputLayers`.
        """
        super().__init__(input_shape, num_classes=len(classifier.text), cls_agnostic_bbox_reg=True, **kwargs)
        self.cls_score: nn.Module = classifier
        if box_fc_dim:
            deltas = nn.Linear(box_fc_dim, 4)
            nn.init.normal_(deltas.weight, std=0.001)
            nn.init.zeros_(deltas.bias)
            self.bbox_pred: nn.Module = nn.Sequential(
                nn.Linear(input_shape.channels, box_fc_dim), nn.ReLU(), deltas
            )
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.clip_scale = clip_scale
        self.fusion, self.settings = get_fusion(fusion), settings

    def forward(self, x: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Region features (R, C) -> logits (R, K + 1), the background last, and box deltas (R, 4).

        Args:
            text: (K, D) embeddings of the classes; None for those of training.
        """
        return self.cls_score(x, text), self.bbox_pred(x)

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: Sequence[Instances]) -> dict[str, Tensor]:
        """Classification over the known classes, and Detectron2's box regression."""
        logits, deltas = predictions
        labels = torch.cat([p.gt_classes for p in proposals])
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        # an image without objects has no targets, and no region of its own that needs one
        targets = [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
        losses = {
            "loss_cls": open_vocabulary_loss(logits, labels, self.class_weight),
            "loss_box_reg": self.box_reg_loss(boxes, torch.cat(targets), deltas, labels),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def clip_probabilities(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """CLIP's scores of regions: softmax of scaled cosines.

        Args:
            embeddings: (R, D), of any length.
            text: (K, D) unit embeddings.

        Returns:
            (R, K + 1), the background last; 0 where the detector has learned one, that CLIP does not know.
        """
        background = cast(TextClassifier, self.cls_score).background
        z = F.normalize(embeddings.float(), dim=1) * self.clip_scale
        if background is None or isinstance(background, nn.Parameter):
            return F.pad((z @ text.T).softmax(1), (0, 1))
        return (z @ torch.cat([text, background]).T).softmax(1)

    def fused_probabilities(
        self, logits: Tensor, embeddings: Tensor, text: Tensor, base: Tensor | None
    ) -> Tensor:
        """The detector's logits (R, K + 1) and CLIP's region embeddings (R, D) -> fused scores (R, K + 1)."""
        clip = self.clip_probabilities(embeddings, text)
        return self.fusion(logits.float().softmax(1), clip, base, self.settings)

    def detect(self, boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> Instances:
        """The best detections of one image.

        Args:
            boxes: (R, 4) decoded; clipped to the image here.
            scores: (R, K + 1), the background last.
            image_size: (h, w) without padding.
        """
        finite = boxes.isfinite().all(1) & scores.isfinite().all(1)
        clipped = Boxes(boxes[finite])
        clipped.clip(image_size)
        index, classes = class_nms(
            clipped.tensor,
            scores[finite, :-1],
            threshold=self.test_score_thresh,
            iou=self.test_nms_thresh,
            limit=self.test_topk_per_image,
        )
        return Instances(
            image_size,
            pred_boxes=clipped[index],
            scores=scores[finite][index, classes],
            pred_classes=classes,
        )


class FVLMROIHeads(StandardROIHeads):
    """`StandardROIHeads` with a `FVLMBoxPredictor`, on pyramids of any strides.

    Its mask head, if there is one, is class-agnostic. Evaluation needs the field "clip_embedding" of the
    proposals, and speaks of the classes that :meth:`set_classes` was told, or of those of training.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_classes(None, None)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        input_shape: Mapping[str, ShapeSpec],
        text: Tensor,
        background: Tensor | None,
        base: Tensor | None,
    ) -> dict[str, Any]:
        """
        Args:
            cfg, input_shape: as Detectron2's.
            text: (K, D) embeddings of the training classes.
            background: (1, D), or None: it is learned.
            base: (K,) bool, which of them have labels; None for all.
        """
        features = [input_shape[name] for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
        keys, box, mask = cfg.MODEL.FVLM, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD

        def pooler(head: CfgNode) -> AnyStridePooler:
            return AnyStridePooler(
                head.POOLER_RESOLUTION,
                [feature.stride for feature in features],
                finest=keys.FINEST_BOX_SIZE,
                sampling_ratio=head.POOLER_SAMPLING_RATIO,
            )

        def pooled(head: CfgNode) -> ShapeSpec:
            side = head.POOLER_RESOLUTION
            return ShapeSpec(channels=features[0].channels, height=side, width=side)

        box_head = build_box_head(cfg, pooled(box))
        classifier = TextClassifier(
            box_head.output_shape.channels,
            text,
            background="learned" if background is None else background,
            temperature=1 / keys.SCALE,
            learn_temperature=keys.LEARN_SCALE,
            relu=keys.EMBEDDING_RELU,
        )
        weight = torch.ones(len(text)) if base is None else base.float()
        predictor = FastRCNNOutputLayers.from_config(cfg, box_head.output_shape)
        for decided in ("input_shape", "num_classes", "cls_agnostic_bbox_reg"):
            del predictor[decided]
        arguments: dict[str, Any] = {
            **super(StandardROIHeads, cls).from_config(cfg),
            "num_classes": len(text),
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "box_pooler": pooler(box),
            "box_head": box_head,
            "box_predictor": FVLMBoxPredictor(
                box_head.output_shape,
                classifier,
                class_weight=F.pad(weight, (0, 1), value=keys.BACKGROUND_WEIGHT),
                box_fc_dim=keys.BOX_FC_DIM,
                clip_scale=keys.CLIP_SCALE,
                fusion=keys.FUSION,
                settings=FusionSettings(keys.ALPHA, keys.BETA),
                **predictor,
            ),
        }
        if cfg.MODEL.MASK_ON:
            if not mask.CLS_AGNOSTIC_MASK:
                raise ValueError("F-VLM needs MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK True: its classes change")
            arguments["mask_in_features"] = cfg.MODEL.ROI_HEADS.IN_FEATURES
            arguments["mask_pooler"] = pooler(mask)
            arguments["mask_head"] = build_mask_head(cfg, pooled(mask))
        return arguments

    def set_classes(self, text: Tensor | None, base: Tensor | None) -> None:
        """Let evaluation speak of other classes; training does not.

        Args:
            text: (K, D) unit embeddings; None for those of training.
            base: (K,) bool, which of them training had labels of; None: not known, so that all are fused as
                novel ones (F-VLM's code without a base indicator).
        """
        self._text, self._base = text, base

    def classes(self) -> tuple[Tensor, Tensor | None]:
        """Embeddings (K, D) and base mask (K,), see :meth:`set_classes`, of the classes of evaluation."""
        if self._text is None:
            return self.box_predictor.cls_score.text, self.box_predictor.class_weight[:-1] > 0
        return self._text, self._base

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances]) -> Any:
        if self.training:
            return super()._forward_box(features, proposals)
        boxes = [p.proposal_boxes for p in proposals]
        x = self.box_head(self.box_pooler([features[name] for name in self.box_in_features], boxes))
        text, base = self.classes()
        logits, deltas = self.box_predictor(x, text)
        embeddings = torch.cat([p.get(CLIP_EMBEDDING) for p in proposals])
        scores = self.box_predictor.fused_probabilities(logits, embeddings, text, base)
        sizes = [len(p) for p in proposals]
        decoded = self.box_predictor.predict_boxes((logits, deltas), proposals)
        return [
            self.box_predictor.detect(b, s, p.image_size)
            for b, s, p in zip(decoded, scores.split(sizes), proposals, strict=True)
        ]
