"""Evaluators of detection, segmentation and features, as Detectron2's `DatasetEvaluator`.

`build_evaluator` builds the one that a dataset's metadata names; `EVALUATOR_REGISTRY` accepts more.
Evaluators only score: those that need features of a model get them from a probe, see
`clipdense.evaluation.probes`.
"""

from clipdense.evaluation.build import EVALUATOR_REGISTRY, build_evaluator
from clipdense.evaluation.crops import CropClassificationEvaluator
from clipdense.evaluation.dense_regions import DenseRegionEvaluator, DenseView
from clipdense.evaluation.instances import InstanceEvaluator
from clipdense.evaluation.mask_classification import MaskClassificationEvaluator
from clipdense.evaluation.panoptic import PanopticEvaluator
from clipdense.evaluation.patches import CoherenceEvaluator, GroupingEvaluator
from clipdense.evaluation.probes import (
    CLIPProbe,
    DenseProbe,
    MapProbe,
    PatchProbe,
    Probes,
    RegionEncoderProbe,
    RegionProbe,
    model_probes,
)
from clipdense.evaluation.proposals import OracleClassEvaluator
from clipdense.evaluation.semantic import SemanticEvaluator

__all__ = [
    "CLIPProbe",
    "CoherenceEvaluator",
    "CropClassificationEvaluator",
    "DenseProbe",
    "DenseRegionEvaluator",
    "DenseView",
    "EVALUATOR_REGISTRY",
    "GroupingEvaluator",
    "InstanceEvaluator",
    "MapProbe",
    "MaskClassificationEvaluator",
    "OracleClassEvaluator",
    "PanopticEvaluator",
    "PatchProbe",
    "Probes",
    "RegionEncoderProbe",
    "RegionProbe",
    "SemanticEvaluator",
    "build_evaluator",
    "model_probes",
]
