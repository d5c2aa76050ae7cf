"""How good mask proposals are, whatever names them."""

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
    """IoU of proposals that are told their class (OVSeg, Liang et al., CVPR 2023, Figure 2): what a perfect
    classifier of ``"proposal_masks"`` (Q, h, w), probabilities, would reach.

    The class of a proposal is that of most labelled pixels where it exceeds 0.5; one without such pixels is
    left out. A pixel has the class whose proposals' probabilities have the greatest sum there. Arguments and
    metrics are those of `SemanticEvaluator`; the task is ``oracle_classes``.
    """

    outputs = ("proposal_masks",)

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> Any:
        """What `SemanticEvaluator` keeps of the proposals' map."""
        masks = output["proposal_masks"].float()
        actual, judged = (torch.from_numpy(a).to(masks.device) for a in self._labels(sample["file_name"]))
        size = (actual.shape[0], actual.shape[1])
        inside = F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0] > 0.5
        counts = masks.new_zeros(len(masks), len(self._classes))
        counts.index_add_(1, actual[judged], inside[:, judged].float())
        told = F.one_hot(counts.argmax(dim=1), counts.shape[1]) * counts.any(dim=1, keepdim=True)
        labels, _ = semantic_labels(told.float(), masks, size)
        return super().process_image(sample, {"sem_seg_labels": labels})

    def score(self, records: list[Any]) -> Results:
        """As `SemanticEvaluator`, by another name."""
        return OrderedDict(oracle_classes=super().score(records)["sem_seg"])
