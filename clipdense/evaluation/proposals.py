"""The quality of mask proposals, independent of their classification."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F

from clipdense.evaluation.base import Results
from clipdense.evaluation.semantic import SemanticEvaluator
from clipdense.inference import semantic_labels

__all__ = ["OracleClassEvaluator"]


class OracleClassEvaluator(SemanticEvaluator):
    """IoU of ``"proposal_masks"`` (Q, h, w), probabilities, with oracle classes.

    The upper bound for a classifier of the proposals (OVSeg, Liang et al., CVPR 2023, Figure 2). The class of
    a proposal is the most frequent one among the labelled pixels where its probability exceeds 0.5; proposals
    without such pixels are dropped. Each pixel gets the class with the largest sum of probabilities.
    Arguments and metrics are those of `SemanticEvaluator`; the task is ``oracle_classes``.
    """

    outputs = ("proposal_masks",)

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> Any:
        """Make the record of the map that follows from the proposals, as `SemanticEvaluator`."""
        masks = output["proposal_masks"].float()
        actual, labelled = (torch.from_numpy(a).to(masks.device) for a in self._labels(sample["file_name"]))
        size = (actual.shape[0], actual.shape[1])
        inside = F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0] > 0.5
        counts = masks.new_zeros(len(masks), len(self._classes))
        counts.index_add_(1, actual[labelled], inside[:, labelled].float())
        oracle = F.one_hot(counts.argmax(dim=1), counts.shape[1]) * counts.any(dim=1, keepdim=True)
        labels, _ = semantic_labels(oracle.float(), masks, size)
        return super().process_image(sample, {"sem_seg_labels": labels})

    def score(self, records: list[Any]) -> Results:
        """Compute the metrics of `SemanticEvaluator`, as task ``oracle_classes``."""
        return OrderedDict(oracle_classes=super().score(records)["sem_seg"])
