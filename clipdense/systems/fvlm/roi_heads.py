"""Heads of F-VLM: classification by text embeddings, and fusion with CLIP's scores."""

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

__all__ = ["FVLMBoxPredictor", "FVLMROIHeads"]


class FVLMBoxPredictor(FastRCNNOutputLayers):
    """Class scores by cosine similarity to text, and class-agnostic boxes (F-VLM, Kuo et al., ICLR 2023,
    section 3).

    Attributes:
        cls_score: `TextClassifier` of the training classes, whose text embeddings are in checkpoints.
        class_weight: (K + 1,) weight of each training class in the loss, 0 for novel classes; the background
            is last.
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
        fusion_settings: FusionSettings,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: shape of a region feature.
            classifier: the detector's classifier of the training classes.
            class_weight: (K + 1,), see the class.
            box_fc_dim: width of a fully connected layer of the box regression only; 0: no such layer.
            clip_scale: inverse temperature of CLIP's scores.
            fusion: name of a rule in `clipdense.regions.fusion`.
            fusion_settings: CLIP's weights for base and novel classes.
            kwargs: arguments of `FastRCNNOutputLayers`.
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
        self.fusion, self.fusion_settings = get_fusion(fusion), fusion_settings

    def forward(self, x: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict class logits and box deltas.

        Args:
            x: region features (R, C).
            text: (K, D) unit embeddings of the classes; None for the training classes.

        Returns:
            Logits (R, K + 1) with the background last, and box deltas (R, 4).
        """
        return self.cls_score(x, text), self.bbox_pred(x)

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: Sequence[Instances]) -> dict[str, Tensor]:
        """Compute the classification loss over the base classes, and Detectron2's box regression loss."""
        logits, deltas = predictions
        labels = torch.cat([p.gt_classes for p in proposals])
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        # an image without objects has no gt_boxes; its regions are background, whose targets are not used
        targets = [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
        losses = {
            "loss_cls": open_vocabulary_loss(logits, labels, self.class_weight),
            "loss_box_reg": self.box_reg_loss(boxes, torch.cat(targets), deltas, labels),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def clip_probabilities(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """Score regions by CLIP: softmax of scaled cosines.

        Args:
            embeddings: CLIP's region embeddings (R, D), of any length.
            text: (K, D) unit embeddings of the classes.

        Returns:
            (R, K + 1), the background last; 0 for a learned background, which is not in CLIP's space.
        """
        background = cast(TextClassifier, self.cls_score).background
        z = F.normalize(embeddings.float(), dim=1) * self.clip_scale
        if background is None or isinstance(background, nn.Parameter):
            return F.pad((z @ text.T).softmax(1), (0, 1))
        return (z @ torch.cat([text, background]).T).softmax(1)

    def fuse(self, p: Tensor, q: Tensor, base: Tensor | None) -> Tensor:
        """Fuse the detector's scores p with CLIP's scores q; see `clipdense.regions.fusion`.

        Args:
            p, q: (R, K + 1), the background last.
            base: (K,) bool, which classes are base; None: all count as novel.
        """
        return self.fusion(p, q, base, self.fusion_settings)

    def detect(self, boxes: Tensor, scores: Tensor, image_size: tuple[int, int]) -> Instances:
        """Select the best detections of one image: score threshold, NMS per class, limit.

        Args:
            boxes: (R, 4) decoded boxes in pixels; clipped to the image here.
            scores: (R, K + 1), the background last.
            image_size: (height, width) without padding.

        Returns:
            ``pred_boxes``, ``scores`` and ``pred_classes``, by descending score.
        """
        # boxes that are not finite get scores below every threshold: to select the others would cost a wait
        finite = (boxes.isfinite().all(1) & scores.isfinite().all(1))[:, None]
        clipped = Boxes(boxes.where(finite, 0.0))
        clipped.clip(image_size)
        scores = scores[:, :-1].where(finite, -torch.inf)
        index, classes = class_nms(
            clipped.tensor,
            scores,
            threshold=self.test_score_thresh,
            iou=self.test_nms_thresh,
            limit=self.test_topk_per_image,
        )
        return Instances(
            image_size,
            pred_boxes=clipped[index],
            scores=scores[index, classes],
            pred_classes=classes,
        )


class FVLMROIHeads(StandardROIHeads):
    """`StandardROIHeads` with a `FVLMBoxPredictor`, on pyramids of any strides.

    A mask head, if there is one, is class-agnostic. `FVLM.inference` combines the heads with CLIP's scores;
    their own inference gives the detector's scores of the training classes alone.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

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
            cfg, input_shape: as for Detectron2's heads.
            text: (K, D) embeddings of the training classes.
            background: (1, D) embedding of the background; None: it is learned.
            base: (K,) bool, which training classes have labels; None: all.
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
                fusion_settings=FusionSettings(keys.ALPHA, keys.BETA),
                **predictor,
            ),
        }
        if cfg.MODEL.MASK_ON:
            if not mask.CLS_AGNOSTIC_MASK:
                raise ValueError(
                    "set MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK True: the vocabulary of F-VLM changes, so its "
                    "mask head cannot have one output per class"
                )
            arguments["mask_in_features"] = cfg.MODEL.ROI_HEADS.IN_FEATURES
            arguments["mask_pooler"] = pooler(mask)
            arguments["mask_head"] = build_mask_head(cfg, pooled(mask))
        return arguments

    def pool_regions(self, features: Mapping[str, Tensor], boxes: Sequence[Boxes]) -> Tensor:
        """Pool the pyramid over boxes and run the box head.

        Args:
            features: maps by name.
            boxes: one entry per image, in pixels of the padded images.

        Returns:
            Region features (R, C) of all images, in order.
        """
        maps = [features[name] for name in self.box_in_features]
        regions: Tensor = self.box_head(self.box_pooler(maps, boxes))
        return regions
