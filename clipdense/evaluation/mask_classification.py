"""How well masked crops are classified, and the semantic maps that follow from it.

The oracle "ground-truth masks, predicted classes" of OVSeg (Liang et al., CVPR 2023, Figure 2).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.image import read_labels
from clipdense.data.mask_pairs import labelled_segments, segment_classes
from clipdense.evaluation.accuracy import accuracy_by_kind, region_accuracy
from clipdense.evaluation.base import Results, TaskEvaluator, sample_image
from clipdense.evaluation.groups import class_attributes, class_groups
from clipdense.evaluation.probes import RegionProbe
from clipdense.evaluation.semantic import segmentation_metrics

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import create_small_table

__all__ = ["MaskClassificationEvaluator"]

logger = logging.getLogger(__name__)


class MaskClassificationEvaluator(TaskEvaluator):
    """Accuracy of mask embeddings on annotated segments.

    The masks are the segments of a panoptic dataset, or the region of each class in the images of a semantic
    dataset. Embeddings come from a probe. All classes compete; crowds are ignored.

    Results are ``{"mask_classification": metrics}`` in percent: ``top1``, ``macc1``, ``macc5`` and those of
    groups and attributes (see `region_accuracy`) over segments; the same for things and for stuff, as
    ``thing.top1`` etc.; and ``mIoU``, ``mIoU_d2``, ``mIoU_<group>`` and ``hIoU`` (see `SemanticEvaluator`) of
    the semantic map in which each annotated segment has its predicted class. ``n`` is the number of segments.

    Args:
        dataset_name: registered dataset with panoptic or semantic segmentations; its metadata's
            ``stuff_classes`` lists all classes.
        probe: embeds masks and class names.
        output_dir: folder for ``mask_classification.json``, the metrics; None writes nothing.
        templates: prompt templates of the class names, see `TextBank`.
        separator: separates the synonyms in a class name, see `Vocabulary.from_metadata`.
    """

    def __init__(
        self,
        dataset_name: str,
        probe: RegionProbe,
        output_dir: str | None = None,
        *,
        templates: str | Sequence[str] = "ovseg_14",
        separator: str | None = ",",
        distributed: bool = True,
    ) -> None:
        super().__init__(output_dir, distributed=distributed)
        self._name, self._metadata = dataset_name, MetadataCatalog.get(dataset_name)
        self._probe, self._templates, self._separator = probe, templates, separator
        self._text: Tensor | None = None

    def reset(self) -> None:
        """Drop all images, and the class embeddings."""
        super().reset()
        self._text = None

    @cached_property
    def _dataset_records(self) -> dict[str, dict[str, Any]]:
        """Image file -> record; read at the first image, by when the loader has made sure that it exists."""
        return {record["file_name"]: record for record in DatasetCatalog.get(self._name)}

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Tensor]:
        """Compute classes, areas in pixels and embeddings of one image's segments.

        Args:
            sample: ``file_name`` and ``image`` (3, H, W) uint8 RGB, at the size of the file.

        Raises:
            ValueError: If the image and its segments differ in size.
        """
        if self._text is None:
            segment_classes(self._name)  # raises now, not after hours, if the dataset has no classes
            self._text = self._probe.embed_classes(self._vocabulary(), self._templates)
        record = self._dataset_records[sample["file_name"]]
        segments = labelled_segments(record, self._metadata.get("ignore_label", 255))
        ids = torch.tensor(segments.labels, dtype=torch.int64)
        masks = torch.from_numpy(read_labels(segments.file_name)) == ids[:, None, None]
        image = sample_image(sample, masks.shape[1:])
        areas = masks.sum((1, 2))
        visible = areas > 0
        embeddings = self._probe.embed_masks(image, masks[visible])
        return {
            "labels": torch.tensor(segments.classes, dtype=torch.int64)[visible],
            "areas": areas[visible],
            "embeddings": F.normalize(embeddings.float(), dim=1).cpu(),
        }

    def score(self, records: list[dict[str, Tensor]]) -> Results:
        """Compute the accuracies of the segments, and the IoU of their map."""
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
            metrics |= accuracy_by_kind(scores, labels, things, groups, attributes)
        metrics |= _map_metrics(labels, scores.argmax(1), areas, groups, len(names))
        self.save("mask_classification.json", metrics)
        logger.info("%s:\n%s", self._name, create_small_table(metrics))
        return Results(mask_classification=metrics)

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.from_metadata(self._metadata, separator=self._separator)


def _map_metrics(
    labels: Tensor, predicted: Tensor, areas: Tensor, groups: Mapping[str, Sequence[int]], num_classes: int
) -> dict[str, float]:
    """Compute the IoU of the map in which each segment (n,) has its predicted class."""
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64)
    confusion.index_add_(0, labels * num_classes + predicted, areas)
    metrics, _, _ = segmentation_metrics(confusion.view(num_classes, num_classes).numpy(), groups)
    return {name: value for name, value in metrics.items() if "IoU" in name and name != "fwIoU"}
