"""Evaluators by the ``evaluator_type`` of a dataset."""

from __future__ import annotations

import os

from clipdense.data.checks import check_dataset_names
from clipdense.evaluation.base import AlternativeEvaluators
from clipdense.evaluation.crops import CropClassificationEvaluator
from clipdense.evaluation.dense_regions import DenseRegionEvaluator, DenseView
from clipdense.evaluation.instances import InstanceEvaluator
from clipdense.evaluation.mask_classification import MaskClassificationEvaluator
from clipdense.evaluation.panoptic import PanopticEvaluator
from clipdense.evaluation.patches import CoherenceEvaluator, GroupingEvaluator
from clipdense.evaluation.probes import DenseProbe, Probes
from clipdense.evaluation.proposals import OracleClassEvaluator
from clipdense.evaluation.semantic import SemanticEvaluator

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, PascalVOCDetectionEvaluator
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import Registry

__all__ = ["EVALUATOR_REGISTRY", "build_evaluator"]

EVALUATOR_REGISTRY = Registry("EVALUATOR")
EVALUATOR_REGISTRY.__doc__ = """
Functions ``(cfg, dataset_name, output_dir, probes) -> DatasetEvaluator``. The name of a function is the
``evaluator_type`` in the metadata of the datasets that it is for; ``probes`` are those of the model, see
`clipdense.evaluation.probes`.
"""


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | None = None, probes: Probes | None = None
) -> DatasetEvaluator:
    """Build the evaluator of a dataset.

    Args:
        cfg: its ``TEST`` keys configure the metrics.
        dataset_name: a registered dataset; the ``evaluator_type`` in its metadata selects the evaluator.
        output_dir: folder for predictions; None: ``OUTPUT_DIR/inference/<dataset_name>``.
        probes: what the model provides for evaluators of features, see `model_probes`; None: no probe, so
            that only outputs of the model are evaluated.

    Raises:
        KeyError: If the dataset has no evaluator_type, or an unknown one.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATOR_REGISTRY:
        known = ", ".join(name for name, _ in EVALUATOR_REGISTRY)
        raise KeyError(
            f"dataset '{dataset_name}' has evaluator_type {kind!r}; its metadata must name one of: {known}"
        )
    if output_dir is None:
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    return EVALUATOR_REGISTRY.get(kind)(cfg, dataset_name, output_dir, probes or Probes())


@EVALUATOR_REGISTRY.register()
def coco(cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes) -> DatasetEvaluator:
    """Evaluate boxes and masks under COCO's rules."""
    return _instances(cfg, dataset_name, output_dir, "coco")


@EVALUATOR_REGISTRY.register()
def lvis(cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes) -> DatasetEvaluator:
    """Evaluate boxes and masks under LVIS's rules."""
    return _instances(cfg, dataset_name, output_dir, "lvis")


@EVALUATOR_REGISTRY.register()
def sem_seg(cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes) -> DatasetEvaluator:
    """Evaluate semantic segmentation, and the oracles that apply: classes of mask proposals, and of
    ground-truth masks if the model provides a region probe. ``TEST.PATCHES`` adds the measures of patches."""
    return AlternativeEvaluators(
        [
            *_semantic_and_oracle(cfg, dataset_name, output_dir),
            *_mask_classification(cfg, dataset_name, output_dir, probes),
            *_patch_measures(cfg, dataset_name, output_dir, probes),
        ]
    )


@EVALUATOR_REGISTRY.register()
def cityscapes_sem_seg(cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes) -> DatasetEvaluator:
    """Same as `sem_seg`: the IoU of Cityscapes' own tools is that of all pixels, class by class."""
    return sem_seg(cfg, dataset_name, output_dir, probes)


@EVALUATOR_REGISTRY.register()
def dense_regions(cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes) -> DatasetEvaluator:
    """Evaluate a dense map on the segments of a panoptic dataset."""
    if probes.dense is None:
        raise ValueError(
            f"dataset '{dataset_name}' has evaluator_type 'dense_regions', which needs a model with a "
            "dense_probe() (see clipdense.evaluation.probes)"
        )
    return _dense_regions(cfg, dataset_name, output_dir, probes.dense)


@EVALUATOR_REGISTRY.register()
def coco_panoptic_seg(cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes) -> DatasetEvaluator:
    """Evaluate panoptic segmentation, with semantic and instance segmentation if both the dataset and the
    model have them, and the probes that the model provides."""
    metadata = MetadataCatalog.get(dataset_name)
    evaluators: list[DatasetEvaluator] = [
        PanopticEvaluator(
            dataset_name,
            output_dir,
            backend=cfg.TEST.METRIC_BACKEND,
            per_class=cfg.TEST.PER_CLASS,
            optional=True,
        )
    ]
    if probes.dense is not None:
        evaluators.append(_dense_regions(cfg, dataset_name, output_dir, probes.dense))
    evaluators += _mask_classification(cfg, dataset_name, output_dir, probes)
    if all("sem_seg_file_name" in record for record in DatasetCatalog.get(dataset_name)[:1]):
        evaluators += _semantic_and_oracle(cfg, dataset_name, output_dir)
    if metadata.get("json_file") and PathManager.isfile(metadata.json_file):
        evaluators.append(_instances(cfg, dataset_name, output_dir, "coco", optional=True))
    return DatasetEvaluators(evaluators)


@EVALUATOR_REGISTRY.register()
def ade20k_panoptic_seg(cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes) -> DatasetEvaluator:
    """Same as `coco_panoptic_seg`."""
    return coco_panoptic_seg(cfg, dataset_name, output_dir, probes)


@EVALUATOR_REGISTRY.register()
def crop_classification(cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes) -> DatasetEvaluator:
    """Evaluate the classification of object crops."""
    return CropClassificationEvaluator(dataset_name, output_dir)


@EVALUATOR_REGISTRY.register()
def cityscapes_panoptic_seg(
    cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes
) -> DatasetEvaluator:
    """Same as `coco_panoptic_seg`, for Detectron2's registration of Cityscapes."""
    return coco_panoptic_seg(cfg, dataset_name, output_dir, probes)


@EVALUATOR_REGISTRY.register()
def pascal_voc(cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes) -> DatasetEvaluator:
    """Evaluate boxes under Pascal VOC's rules, with Detectron2's evaluator."""
    return PascalVOCDetectionEvaluator(dataset_name)


def _instances(
    cfg: CfgNode, dataset_name: str, output_dir: str, rules: str, optional: bool = False
) -> InstanceEvaluator:
    return InstanceEvaluator(
        dataset_name,
        rules,  # type: ignore[arg-type]
        output_dir,
        backend=cfg.TEST.METRIC_BACKEND,
        max_dets=cfg.TEST.MAX_DETS,
        per_class=cfg.TEST.PER_CLASS,
        optional=optional,
    )


def _dense_regions(
    cfg: CfgNode, dataset_name: str, output_dir: str, probe: DenseProbe
) -> DenseRegionEvaluator:
    keys = cfg.TEST.DENSE_REGIONS
    return DenseRegionEvaluator(
        dataset_name,
        probe,
        output_dir,
        views=[DenseView(keys.MODE, keys.IMAGE_SIZE, keys.ANTIALIAS)],
        templates=keys.TEMPLATES,
        table=keys.TABLE,
    )


def _mask_classification(
    cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes
) -> list[DatasetEvaluator]:
    """Build the evaluator of a region probe; empty if the model provides none."""
    if probes.regions is None:
        return []
    return [
        MaskClassificationEvaluator(
            dataset_name,
            probes.regions,
            output_dir,
            templates=cfg.TEST.MASK_CLASSIFICATION.TEMPLATES,
            separator="," if cfg.DATASETS.SPLIT_NAMES else None,
        )
    ]


def _patch_measures(
    cfg: CfgNode, dataset_name: str, output_dir: str, probes: Probes
) -> list[DatasetEvaluator]:
    """Build the evaluators of ``TEST.PATCHES``; empty without any, or if the model has no patch probe."""
    keys, evaluators = cfg.TEST.PATCHES, list[DatasetEvaluator]()
    if probes.patches is not None and keys.COHERENCE:
        evaluators.append(CoherenceEvaluator(dataset_name, probes.patches, output_dir))
    if probes.patches is not None and keys.GROUPS:
        evaluators.append(
            GroupingEvaluator(dataset_name, probes.patches, output_dir, groups=keys.GROUPS, how=keys.GROUPING)
        )
    return evaluators


def _semantic_and_oracle(cfg: CfgNode, dataset_name: str, output_dir: str) -> list[DatasetEvaluator]:
    """Build the optional evaluators of semantic maps and of mask proposals with oracle classes."""
    return [
        SemanticEvaluator(
            dataset_name,
            output_dir,
            per_class=cfg.TEST.PER_CLASS,
            allowed_pairs=_allowed_pairs(cfg, dataset_name),
            optional=True,
        ),
        OracleClassEvaluator(dataset_name, per_class=cfg.TEST.PER_CLASS, optional=True),
    ]


def _allowed_pairs(cfg: CfgNode, dataset_name: str) -> str | None:
    """Return the file of ``TEST.SEMANTIC.ALLOWED_PAIRS`` for a dataset; None if there is none."""
    files = {}
    for entry in cfg.TEST.SEMANTIC.ALLOWED_PAIRS:
        name, _, path = str(entry).rpartition(":")
        if not name:
            raise ValueError(
                f"TEST.SEMANTIC.ALLOWED_PAIRS: {entry!r} does not read name:file.json "
                "(example: ade20k_sem_seg_val:datasets/allowed_pairs_ade20k.json)"
            )
        check_dataset_names([name])
        files[name] = os.path.expanduser(os.path.expandvars(path))
    return files.get(dataset_name)
