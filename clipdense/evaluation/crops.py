"""Image classification of object crops, from base to novel classes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from clipdense.evaluation.accuracy import region_accuracy
from clipdense.evaluation.base import Results, TaskEvaluator
from clipdense.evaluation.groups import class_attributes, class_groups

from detectron2.data import MetadataCatalog
from detectron2.utils.logger import create_small_table

__all__ = ["CropClassificationEvaluator"]

logger = logging.getLogger(__name__)


class CropClassificationEvaluator(TaskEvaluator):
    """Accuracy of image classification.

    Results are ``{"classification": metrics}`` in percent: those of `region_accuracy`, in which all classes
    compete, and, if the dataset marks base and novel classes, the accuracies of CoCoOp (Zhou et al., CVPR
    2022, section 4.1): ``base`` and ``novel``, where only the classes of the group compete, and their
    harmonic mean ``H``. ``n`` is the number of images.

    Args:
        dataset_name: registered dataset with ``thing_classes``; its records have a ``label``.
        output_dir: folder for ``classification.json``, the metrics; None writes nothing.
        distributed: see `TaskEvaluator`.
    """

    outputs = ("class_scores",)

    def __init__(self, dataset_name: str, output_dir: str | None = None, *, distributed: bool = True) -> None:
        super().__init__(output_dir, distributed=distributed)
        self._name, self._metadata = dataset_name, MetadataCatalog.get(dataset_name)

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> tuple[Tensor, int]:
        """Return the scores (K,) and the class of one image."""
        return output["class_scores"].float().cpu(), int(sample["label"])

    def score(self, records: list[tuple[Tensor, int]]) -> Results:
        """Compute the accuracies."""
        scores = torch.stack([scores for scores, _ in records])
        labels = torch.tensor([label for _, label in records])
        names = list(self._metadata.thing_classes)
        groups = class_groups(self._metadata, names)
        metrics = {"n": float(len(labels))}
        metrics |= region_accuracy(scores, labels, groups, class_attributes(self._metadata, names))
        for group in ("base", "novel"):
            classes = torch.tensor(groups.get(group, []), dtype=torch.int64)
            members = torch.isin(labels, classes)
            if members.any():
                predicted = classes[scores[members][:, classes].argmax(1)]
                metrics[group] = 100 * float((predicted == labels[members]).double().mean())
        if "base" in metrics and "novel" in metrics:
            base, novel = metrics["base"], metrics["novel"]
            metrics["H"] = 2 * base * novel / (base + novel) if base + novel else 0.0
        self.save("classification.json", metrics)
        logger.info("%s:\n%s", self._name, create_small_table(metrics))
        return Results(classification=metrics)
