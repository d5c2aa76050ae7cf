"""Evaluation of pre-training: retrieval between crops and captions."""

from typing import Any

import torch
from torch import Tensor

from clipdense.data.shapes.pretraining.meta_arch import positive_pairs
from clipdense.evaluation.base import Results, TaskEvaluator
from clipdense.evaluation.build import EVALUATOR_REGISTRY
from clipdense.evaluation.probes import Probes

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator


class CropRetrievalEvaluator(TaskEvaluator):
    """Recall at 1 and 5 between all crops and all captions of a dataset, in percent.

    A crop counts as correct if at least one of its k most similar captions describes it. A caption counts as
    correct if it describes at least one of its k most similar crops. See `positive_pairs`.
    """

    outputs = ("image_embeddings",)

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image embeddings, text embeddings and content vectors of one image's crops."""
        return output["image_embeddings"].cpu(), output["text_embeddings"].cpu(), sample["contents"]

    def score(self, records: list[Any]) -> Results:
        """Compute the recalls over the whole dataset."""
        images, texts, contents = (torch.cat(parts) for parts in zip(*records, strict=True))
        positives = positive_pairs(contents, contents) > 0
        similarity = images @ texts.T
        recalls = {
            f"{name}_R@{k}": _recall(scores, hits, k)
            for name, scores, hits in (
                ("image_to_text", similarity, positives),
                ("text_to_image", similarity.T, positives.T),
            )
            for k in (1, 5)
        }
        return Results(retrieval=recalls)


def _recall(scores: Tensor, hits: Tensor, k: int) -> float:
    best = scores.topk(min(k, scores.shape[1])).indices
    return 100 * hits.gather(1, best).any(1).double().mean().item()


@EVALUATOR_REGISTRY.register()
def clip_retrieval(cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes) -> DatasetEvaluator:
    """Build the evaluator of crops and captions from `CropCaptionMapper`."""
    return CropRetrievalEvaluator(output_dir)
