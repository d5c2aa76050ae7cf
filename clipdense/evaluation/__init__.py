"""Evaluators of detection and segmentation, behind Detectron2's `DatasetEvaluator`.

`build_evaluator` makes the one that a data set's metadata asks for; `EVALUATOR_REGISTRY` takes more.
"""

from clipdense.evaluation.build import EVALUATOR_REGISTRY, build_evaluator
from clipdense.evaluation.dense_regions import DenseRegionEvaluator, DenseView
from clipdense.evaluation.instances import InstanceEvaluator
from clipdense.evaluation.mask_classification import MaskClassificationEvaluator
from clipdense.evaluation.panoptic import PanopticEvaluator
from clipdense.evaluation.proposals import OracleClassEvaluator
from clipdense.evaluation.semantic import SemanticEvaluator

__all__ = [
    "EVALUATOR_REGISTRY",
    "DenseRegionEvaluator",
    "DenseView",
    "InstanceEvaluator",
    "OracleClassEvaluator",
    "MaskClassificationEvaluator",
    "PanopticEvaluator",
    "SemanticEvaluator",
    "build_evaluator",
]
