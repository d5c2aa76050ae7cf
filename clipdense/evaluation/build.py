"""From a data set's ``evaluator_type`` to its evaluator."""

from __future__ import annotations

import os

from clipdense.data.checks import check_dataset_names
from clipdense.evaluation.base import AlternativeEvaluators
from clipdense.evaluation.dense_regions import DenseRegionEvaluator, DenseView
from clipdense.evaluation.instances import InstanceEvaluator
from clipdense.evaluation.mask_classification import MaskClassificationEvaluator
from clipdense.evaluation.panoptic import PanopticEvaluator
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
Functions ``(cfg, dataset_name, output_dir) -> DatasetEvaluator``, each under the name of the
``evaluator_type`` in a data set's metadata that it serves.
"""


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """The evaluator of a data set.

    Args:
        cfg: its ``TEST`` keys say how metrics are computed.
        dataset_name: a registered data set; its metadata's ``evaluator_type`` decides.
        output_dir: folder for predictions; by default ``OUTPUT_DIR/inference/<dataset_name>``.

    Raises:
        KeyError: the data set has no evaluator_type, or an unknown one.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATOR_REGISTRY:
        known = ", ".join(name for name, _ in EVALUATOR_REGISTRY)
        raise KeyError(
            f"data set '{dataset_name}' has evaluator_type {kind!r}; its metadata must name one of: {known}"
        )
    if output_dir is None:
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    return EVALUATOR_REGISTRY.get(kind)(cfg, dataset_name, output_dir)


def _instances(
    cfg: CfgNode, dataset_name: str, output_dir: str, rules: str, **kwargs: bool
) -> DatasetEvaluator:
    test = cfg.TEST
    return InstanceEvaluator(
        dataset_name,
        rules,  # type: ignore[arg-type]
        output_dir,
        backend=test.METRIC_BACKEND,
        max_dets=test.MAX_DETS,
        per_class=test.PER_CLASS,
        **kwargs,
    )


@EVALUATOR_REGISTRY.register()
def coco(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """Boxes and masks, COCO's rules."""
    return _instances(cfg, dataset_name, output_dir, "coco")


@EVALUATOR_REGISTRY.register()
def lvis(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """Boxes and masks, LVIS's rules."""
    return _instances(cfg, dataset_name, output_dir, "lvis")


@EVALUATOR_REGISTRY.register()
def sem_seg(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """Semantic segmentation, or, of a model that gives its region encoder, the names of labelled masks."""
    return AlternativeEvaluators(
        [
            _semantic(cfg, dataset_name, output_dir, optional=True),
            OracleClassEvaluator(dataset_name, per_class=cfg.TEST.PER_CLASS, optional=True),
            _mask_classification(cfg, dataset_name, output_dir),
        ]
    )


def _mask_classification(cfg: CfgNode, dataset_name: str, output_dir: str) -> MaskClassificationEvaluator:
    return MaskClassificationEvaluator(
        dataset_name,
        output_dir,
        templates=cfg.TEST.MASK_CLASSIFICATION.TEMPLATES,
        separator="," if cfg.DATASETS.SPLIT_NAMES else None,
        optional=True,
    )


def _semantic(cfg: CfgNode, dataset_name: str, output_dir: str, optional: bool = False) -> SemanticEvaluator:
    tables = {}
    for entry in cfg.TEST.SEMANTIC.ALLOWED_PAIRS:
        name, _, path = str(entry).rpartition(":")
        if not name:
            raise ValueError(
                f"TEST.SEMANTIC.ALLOWED_PAIRS: {entry!r} does not read name:file.json "
                "(example: ade20k_sem_seg_val:datasets/allowed_pairs_ade20k.json)"
            )
        check_dataset_names([name])
        tables[name] = os.path.expanduser(os.path.expandvars(path))
    return SemanticEvaluator(
        dataset_name,
        output_dir,
        per_class=cfg.TEST.PER_CLASS,
        allowed_pairs=tables.get(dataset_name),
        optional=optional,
    )


@EVALUATOR_REGISTRY.register()
def dense_regions(
    cfg: CfgNode, dataset_name: str, output_dir: str, optional: bool = False
) -> DatasetEvaluator:
    """A CLIP on the segments of a panoptic data set."""
    keys = cfg.TEST.DENSE_REGIONS
    return DenseRegionEvaluator(
        dataset_name,
        output_dir,
        views=[DenseView(keys.MODE, keys.IMAGE_SIZE, keys.ANTIALIAS)],
        templates=keys.TEMPLATES,
        table=keys.TABLE,
        optional=optional,
    )


@EVALUATOR_REGISTRY.register()
def coco_panoptic_seg(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """Panoptic segmentation, with semantic and instance segmentation where data set and model have them;
    dense regions where the model gives a CLIP, the names of masks where it gives its region encoder."""
    metadata = MetadataCatalog.get(dataset_name)
    evaluators: list[DatasetEvaluator] = [
        PanopticEvaluator(
            dataset_name,
            output_dir,
            backend=cfg.TEST.METRIC_BACKEND,
            per_class=cfg.TEST.PER_CLASS,
            optional=True,
        ),
        dense_regions(cfg, dataset_name, output_dir, optional=True),
        _mask_classification(cfg, dataset_name, output_dir),
    ]
    if all("sem_seg_file_name" in record for record in DatasetCatalog.get(dataset_name)[:1]):
        evaluators += [
            _semantic(cfg, dataset_name, output_dir, optional=True),
            OracleClassEvaluator(dataset_name, per_class=cfg.TEST.PER_CLASS, optional=True),
        ]
    if metadata.get("json_file") and PathManager.isfile(metadata.json_file):
        evaluators.append(_instances(cfg, dataset_name, output_dir, "coco", optional=True))
    return DatasetEvaluators(evaluators)


@EVALUATOR_REGISTRY.register()
def ade20k_panoptic_seg(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """As `coco_panoptic_seg`."""
    return coco_panoptic_seg(cfg, dataset_name, output_dir)


@EVALUATOR_REGISTRY.register()
def pascal_voc(cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """Boxes, Pascal VOC's rules: Detectron2's evaluator."""
    return PascalVOCDetectionEvaluator(dataset_name)
