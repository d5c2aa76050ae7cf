"""Export of Mask R-CNN and its open-vocabulary kin: TextRCNN, DenseCLIP's detector, F-VLM and F-ViT."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone import JOINT
from clipdense.backbone.score_map import find_language_trunk
from clipdense.regions import TextClassifier
from clipdense.run.export.file_metadata import FileMetadata
from clipdense.run.export.graph import ExportError, Graph, Inputs
from clipdense.run.export.language import without_text_tower
from clipdense.run.export.masks import base_names
from clipdense.run.export.proposals import clip_boxes, pool_rows, propose, select_detections
from clipdense.systems.fvlm import FVLM

from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads

__all__ = ["CANDIDATES", "detector_graph"]

CANDIDATES = 10
"""Pairs of box and class that the suppression of an exported file sees, per detection that it may return."""


class Detector(nn.Module):
    """Detections of one image, with or without their selection."""

    def __init__(self, model: GeneralizedRCNN, select: bool) -> None:
        super().__init__()
        self.backbone: Any = model.backbone
        if find_language_trunk(model) is not None:
            self.backbone, _ = without_text_tower(model.backbone)
        self.proposal_generator: Any = model.proposal_generator
        self.heads: Any = model.roi_heads
        self.select = select

    def forward(self, images: Tensor, image_size: Tensor, text: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detect objects.

        Args:
            images: normalised and padded (1, 3, H, W).
            image_size: (2,) int64, height and width without the padding.
            text: (K, D), unit length; None if the classes are constants.

        Returns:
            With the selection boxes (D, 4), scores (D,), classes (D,) and, with a mask head, masks
            (D, h, w), probabilities in the box; otherwise boxes (R, 4) or (R, K, 4) and scores (R, K + 1),
            background last, of all proposals.
        """
        features = self.backbone(images)
        proposals, exists = propose(self.proposal_generator, features, image_size)
        boxes, scores = self.classify(features, proposals, image_size, text)
        return self.finish(features, boxes, scores, exists)

    def classify(
        self, features: dict[str, Tensor], proposals: Tensor, image_size: Tensor, text: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the boxes (R, 4) or (R, K, 4) of proposals (R, 4), and their scores (R, K + 1)."""
        predictor = self.heads.box_predictor
        regions = self.pool(features, proposals)
        logits = predictor.cls_score(regions) if text is None else predictor.cls_score(regions, text)
        return self.decode(regions, proposals, image_size), logits.softmax(-1)

    def pool(self, features: dict[str, Tensor], boxes: Tensor) -> Tensor:
        """Pool the pyramid over boxes and run the box head: (R, C)."""
        maps = [features[name] for name in self.heads.box_in_features]
        regions: Tensor = self.heads.box_head(pool_rows(self.heads.box_pooler, maps, boxes))
        return regions.flatten(1)

    def decode(self, regions: Tensor, proposals: Tensor, image_size: Tensor) -> Tensor:
        """Apply the predicted deltas to proposals (R, 4), and clip the boxes to the image."""
        predictor = self.heads.box_predictor
        decoded = predictor.box2box_transform.apply_deltas(predictor.bbox_pred(regions), proposals)
        boxes = clip_boxes(decoded.unflatten(1, (-1, 4)), image_size)
        return boxes[:, 0] if boxes.shape[1] == 1 else boxes

    def finish(
        self, features: dict[str, Tensor], boxes: Tensor, scores: Tensor, exists: Tensor
    ) -> tuple[Tensor, ...]:
        """Select detections and predict their masks, or return all scored boxes."""
        if not self.select:
            return boxes, torch.where(exists[:, None], scores, 0.0)
        predictor, limit = self.heads.box_predictor, self.heads.box_predictor.test_topk_per_image
        found, best, classes = select_detections(
            boxes,
            scores[:, :-1],
            exists,
            threshold=predictor.test_score_thresh,
            overlap=predictor.test_nms_thresh,
            limit=limit,
            candidates=CANDIDATES * limit,
        )
        if not self.heads.mask_on:
            return found, best, classes
        maps = [features[name] for name in self.heads.mask_in_features]
        logits = self.heads.mask_head.layers(pool_rows(self.heads.mask_pooler, maps, found))
        if logits.shape[1] == 1:
            return found, best, classes, logits[:, 0].sigmoid()
        own = classes[:, None, None, None].expand(-1, 1, *logits.shape[2:])
        return found, best, classes, logits.gather(1, own)[:, 0].sigmoid()


class FusedDetector(Detector):
    """F-VLM: scores of the detector, fused with CLIP's scores of the same regions."""

    def __init__(self, model: FVLM, select: bool) -> None:
        super().__init__(model, select)
        self.model = model

    def forward(  # type: ignore[override]
        self, images: Tensor, image_size: Tensor, text: Tensor, base: Tensor
    ) -> tuple[Tensor, ...]:
        """Detect objects; as `Detector`, with ``base`` (K,) bool, the classes that were trained."""
        features = self.backbone(images)
        proposals, exists = propose(self.proposal_generator, features, image_size)
        predictor = self.heads.box_predictor
        regions = self.pool(features, proposals)
        p = predictor.cls_score(regions, text).softmax(1)
        embeddings = self.model.trunk.embed_regions(features[JOINT], boxes=[proposals])
        scores = predictor.fuse(p, predictor.clip_probabilities(embeddings, text), base)
        return self.finish(features, self.decode(regions, proposals, image_size), scores, exists)


def detector_graph(
    model: GeneralizedRCNN,
    *,
    fixed_size: tuple[int, int] | None = None,
    select: bool = True,
    classes: tuple[str, ...] = (),
) -> Graph:
    """Prepare a two-stage detector for export.

    Args:
        model: Detectron2's GeneralizedRCNN or a subclass, with an RPN and `StandardROIHeads`.
        fixed_size: height and width of the padded images in pixels; None: any.
        select: whether the file selects detections; otherwise it returns all scored boxes, without masks.
        classes: names of its classes, if they are constants.

    Raises:
        ExportError: If it has other parts, or pads images to squares.
    """
    heads: Any = model.roi_heads
    _check(model, select)
    predictor = heads.box_predictor
    fused = isinstance(model, FVLM)
    open_classes = isinstance(predictor.cls_score, TextClassifier)
    dim = predictor.cls_score.text.shape[1] if open_classes else 0
    fixed_classes = _fixed_classes(heads) if open_classes and not fused else 0
    module: nn.Module = FusedDetector(model, select) if fused else Detector(model, select)
    divisor = _padding(model, fixed_size)
    metadata = FileMetadata(
        system=type(model).__name__,
        task="boxes",
        channels=model.input_format or "RGB",
        pixel_mean=tuple(model.pixel_mean.flatten().tolist()),
        pixel_std=tuple(model.pixel_std.flatten().tolist()),
        multiple=divisor,
        min_size=32,
        fixed_size=fixed_size or (),
        text="classes" if open_classes else "none",
        embed_dim=dim,
        num_classes=fixed_classes,
        classes=() if open_classes else classes,
        base_names=base_names(model.training_vocabulary) if fused else (),
        reads_base=fused,
        reads_image_size=True,
        score_threshold=float(predictor.test_score_thresh),
        postprocessed=select,
        nms_threshold=float(predictor.test_nms_thresh),
        max_detections=max(int(predictor.test_topk_per_image), 0),
    )

    def example(height: int, width: int, count: int) -> Inputs:
        count = fixed_classes or count
        generator = torch.Generator().manual_seed(height * width + count)
        inputs = {
            "images": torch.randn(1, 3, height, width, generator=generator),
            "image_size": torch.tensor([height - 3, width - 5]),
        }
        if open_classes:
            inputs["text"] = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
        if fused:
            inputs["base"] = torch.arange(count) % 2 == 0
        return inputs

    outputs = ("boxes", "scores", "classes", "masks")[: 4 if heads.mask_on else 3]
    side = max(divisor, 32)
    free = () if fixed_classes else (0,)
    return Graph(
        module.eval(),
        metadata,
        example,
        outputs=outputs if select else ("boxes", "scores"),
        dynamic={"images": () if fixed_size else (2, 3), "text": free, "base": free},
        size=fixed_size or (3 * side, 4 * side),
    )


def _check(model: GeneralizedRCNN, select: bool) -> None:
    """Raise ExportError if the model has parts that do not export."""
    heads: Any = model.roi_heads
    if not isinstance(model.proposal_generator, RPN) or not isinstance(heads, StandardROIHeads):
        raise ExportError(
            f"{type(model).__name__} with {type(model.proposal_generator).__name__} and "
            f"{type(heads).__name__}: only an RPN with StandardROIHeads (or a subclass) can be exported; set "
            "MODEL.PROPOSAL_GENERATOR.NAME RPN and MODEL.ROI_HEADS.NAME StandardROIHeads"
        )
    if select and heads.box_predictor.test_topk_per_image < 0:
        raise ExportError("TEST.DETECTIONS_PER_IMAGE must be 1 or more for a file that selects detections")


def _fixed_classes(heads: Any) -> int:
    """Return the number of classes, if boxes or masks have weights for each; otherwise 0."""
    boxes = [m for m in heads.box_predictor.bbox_pred.modules() if isinstance(m, nn.Linear)][-1]
    per_class = boxes.out_features > 4
    if heads.mask_on:
        masks = [m for m in heads.mask_head.modules() if isinstance(m, nn.Conv2d)][-1]
        per_class = per_class or masks.out_channels > 1
    return int(heads.num_classes) if per_class else 0


def _padding(model: GeneralizedRCNN, fixed_size: tuple[int, int] | None) -> int:
    """Return the number whose multiples the sides of images are padded to."""
    square = getattr(model, "square_size", 0) or dict(getattr(model.backbone, "padding_constraints", {})).get(
        "square_size", 0
    )
    if square and fixed_size != (square, square):
        raise ExportError(
            f"the model pads its images to squares of {square} px: give a fixed size, "
            f"--size {square} {square}"
        )
    divisor = square or model.backbone.size_divisibility
    return divisor if divisor > 1 else 0
