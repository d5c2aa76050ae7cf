"""How well a region encoder names ground-truth masks, and the semantic maps that follow.

The oracle "ground-truth masks, predicted classes" of OVSeg (Liang et al., CVPR 2023, Figure 2).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip import ClipModel
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.image import read_image, read_labels
from clipdense.data.mask_pairs import labelled_segments, segment_classes
from clipdense.evaluation.base import Results, TaskEvaluator
from clipdense.evaluation.dense_regions import region_accuracy
from clipdense.evaluation.groups import class_attributes, class_groups
from clipdense.evaluation.semantic import segmentation_metrics

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import create_small_table

__all__ = ["MaskClassificationEvaluator"]

logger = logging.getLogger(__name__)


class MaskClassificationEvaluator(TaskEvaluator):
    """Accuracy of a region encoder on the annotated segments of a panoptic data set, or on the region that
    each class has in an image of a semantic one.

    A model is evaluated on what it gives as output ``region_encoder``: called with an image (3, H, W), RGB in
    0 .. 255, and masks (n, H, W) it gives embeddings (n, D) and which masks (n,) are valid; its ``clip`` has
    the text tower. Images, at their own size, and segments are read from the data set's own files. All
    classes compete; crowds do not count.

    Results are ``{"mask_classification": metrics}`` in percent: ``top1``, ``macc1``, ``macc5`` and those of
    groups and attributes (see `region_accuracy`) over segments; the same of things and of stuff, as
    ``thing.top1`` etc.; and ``mIoU``, ``mIoU_d2``, ``mIoU_<group>`` and ``hIoU`` (see `SemanticEvaluator`) of
    the semantic map whose segments are the annotated ones, painted in the predicted classes. ``n`` is the
    number of segments.

    Args:
        dataset_name: registered data set with panoptic (or semantic) segmentations, and all its classes in
            the metadata's ``stuff_classes``.
        output_dir: folder for ``mask_classification.json``, the metrics; None writes nothing.
        templates: prompt templates of the class names, see `TextBank`.
        separator: parts the names of a class, see `Vocabulary.from_metadata`.
    """

    outputs = ("region_encoder",)

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        templates: str | Sequence[str] = "ovseg_14",
        separator: str | None = ",",
        distributed: bool = True,
        optional: bool = False,
    ) -> None:
        super().__init__(output_dir, distributed=distributed, optional=optional)
        self._name, self._metadata = dataset_name, MetadataCatalog.get(dataset_name)
        self._templates, self._separator = templates, separator
        self._images: dict[str, dict[str, Any]] = {}
        self._text: Tensor | None = None

    def reset(self) -> None:
        """Forget all images, and the class embeddings of the last model."""
        super().reset()
        self._text = None

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Tensor]:
        """Classes, areas in pixels and embeddings of one image's segments."""
        encoder = output["region_encoder"]
        if self._text is None:
            segment_classes(self._name)  # that there are some, before hours of work
            self._text = self._embed_classes(encoder.clip)
        if not self._images:  # read at the first image, when the loader has seen to it that they are there
            self._images = {d["file_name"]: d for d in DatasetCatalog.get(self._name)}
        record = self._images[sample["file_name"]]
        segments = labelled_segments(record, self._metadata.get("ignore_label", 255))
        values = torch.tensor(segments.labels, dtype=torch.int64)
        masks = torch.from_numpy(read_labels(segments.file_name)) == values[:, None, None]
        areas = masks.sum((1, 2))
        there = areas > 0
        image = torch.from_numpy(read_image(record["file_name"], "RGB")).permute(2, 0, 1)
        device = encoder.clip.logit_scale.device
        with torch.no_grad():
            embeddings, _ = encoder(image.to(device), masks[there].to(device))
        return {
            "labels": torch.tensor(segments.classes, dtype=torch.int64)[there],
            "areas": areas[there],
            "embeddings": F.normalize(embeddings.float(), dim=1).cpu(),
        }

    def score(self, records: list[dict[str, Tensor]]) -> Results:
        """Accuracies of segments, and IoU of their map."""
        assert self._text is not None
        labels, areas, embeddings = (
            torch.cat([record[key] for record in records]) for key in ("labels", "areas", "embeddings")
        )
        vocabulary = self._vocabulary()
        names = list(self._metadata.stuff_classes)
        groups, attributes = class_groups(self._metadata, names), class_attributes(self._metadata, names)
        scores = embeddings @ self._text.T
        metrics = {"n": float(len(labels)), **region_accuracy(scores, labels, groups, attributes)}
        if vocabulary.thing is not None:
            things = torch.tensor(vocabulary.thing)[labels]
            for kind, chosen in (("thing", things), ("stuff", ~things)):
                accuracy = region_accuracy(scores[chosen], labels[chosen], groups, attributes)
                metrics |= {f"{kind}.{name}": value for name, value in accuracy.items()}
        metrics |= _map_metrics(labels, scores.argmax(1), areas, groups, len(names))
        self.save("mask_classification.json", metrics)
        logger.info("%s:\n%s", self._name, create_small_table(metrics))
        return Results(mask_classification=metrics)

    def _embed_classes(self, clip: ClipModel) -> Tensor:
        """Unit class embeddings (K, D) on the CPU."""
        return TextBank(clip, self._templates)(self._vocabulary()).cpu()

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.from_metadata(self._metadata, separator=self._separator)


def _map_metrics(
    labels: Tensor, predicted: Tensor, areas: Tensor, groups: dict[str, list[int]], k: int
) -> dict[str, float]:
    """IoU of segments (n,) of k classes that are painted in the predicted ones."""
    confusion = torch.zeros(k * k, dtype=torch.int64).index_add_(0, labels * k + predicted, areas)
    metrics, _, _ = segmentation_metrics(confusion.view(k, k).numpy(), groups)
    return {name: value for name, value in metrics.items() if "IoU" in name and name != "fwIoU"}
