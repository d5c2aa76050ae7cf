"""Check of registered datasets, with reports cached by the stamps of their files."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clipdense.data.validation.coco import CocoKind, read_coco
from clipdense.data.validation.images import check_image_files, check_label_maps
from clipdense.data.validation.report import DataError, Report
from clipdense.files import cache_dir, write_text

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

__all__ = ["check_dataset", "check_datasets"]

logger = logging.getLogger(__name__)

_VERSION = 3
"""Of the checks: a change makes cached reports void."""
_JSON_KINDS: dict[str, CocoKind] = {
    "coco": "instances",
    "lvis": "lvis",
    "clip_retrieval": "captions",
    "coco_panoptic_seg": "panoptic",
    "ade20k_panoptic_seg": "panoptic",
}


def check_datasets(
    names: Iterable[str],
    *,
    training: Iterable[str] = (),
    masks: bool = False,
    objects_required: bool = True,
    thorough: bool = False,
) -> list[str]:
    """Check the registered datasets of a run before it costs anything.

    Args:
        names: datasets to evaluate on.
        training: datasets to train on.
        masks: whether masks are trained (MODEL.MASK_ON).
        objects_required: whether training needs objects (DATALOADER.FILTER_EMPTY_ANNOTATIONS).
        thorough: open every image and label map; else some hundreds, evenly chosen.

    Returns:
        Messages about what was repaired or noticed, one for each dataset, for the log.

    Raises:
        DataError: If one would train or score wrongly; names file, place and remedy.
        FileNotFoundError, ValueError: If an annotation file or a folder is missing, or a file is not JSON.
    """
    trained = set(training)
    messages = []
    for name in dict.fromkeys([*names, *training]):
        _check_presence(name)
        report = check_dataset(name, thorough=thorough)
        if report is None:
            continue
        report.raise_errors()
        if name in trained:
            _check_training(report, masks, objects_required)
        if report.findings:
            messages.append(f"Dataset {name}: " + "\n".join(report.lines()))
    return messages


def _check_training(report: Report, masks: bool, objects_required: bool) -> None:
    objects = report.counts.get("annotations")
    if objects == 0 and objects_required:
        raise DataError(
            f"{report.source}: no annotations, so there is nothing to train on. Choose another dataset for "
            "DATASETS.TRAIN."
        )
    if masks and objects and report.without_mask == objects:
        raise DataError(
            f"{report.source}: no object has a mask, which MODEL.MASK_ON True needs. Set MODEL.MASK_ON False "
            "to train on boxes alone, or choose another dataset for DATASETS.TRAIN."
        )


def _check_presence(name: str) -> None:
    """Raise an error for a missing annotation file or image folder, unless it is made at the first use."""
    if name not in DatasetCatalog.list():
        return
    metadata = MetadataCatalog.get(name).as_dict()
    kind = _JSON_KINDS.get(metadata.get("evaluator_type", ""))
    if kind is None or metadata.get("made_at_first_use"):
        return
    for key in ("panoptic_json" if kind == "panoptic" else "json_file", "image_root"):
        if metadata.get(key) and not PathManager.exists(metadata[key]):
            root = os.environ.get("DETECTRON2_DATASETS", "datasets (DETECTRON2_DATASETS is not set)")
            raise FileNotFoundError(
                f"dataset {name}: {metadata[key]} does not exist. Datasets are read from {root}; "
                "datasets/README.md describes the layout."
            )


def check_dataset(name: str, *, thorough: bool = False, use_cache: bool = True) -> Report | None:
    """Check the annotation file, the images and the label maps of a registered dataset.

    A report without errors is kept. It is made again if the annotation file changes, a file is added to or
    removed from a folder of images, or an image or label map that was opened is replaced or edited (size or
    time of change). Other images that are replaced in place are not noticed, as they are not opened.

    Args:
        name: registered name.
        thorough: open every image and label map; else some hundreds, evenly chosen.
        use_cache: take the report of an earlier check of the same files.

    Returns:
        What was found; None for a dataset whose files are drawn or prepared at its first use, or that has
        none to check.
    """
    if name not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(name).as_dict()
    kind = _JSON_KINDS.get(metadata.get("evaluator_type", ""))
    files = _files(metadata, kind)
    if not files or not all(Path(file).exists() for file in files):
        return None
    cached = _cache_file(name, files, thorough)
    if use_cache and cached.is_file():
        try:
            known = Report.from_json(cached.read_text())
            if known.is_current():
                return known
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.debug("%s is damaged and made again", cached)
    report = _check(name, metadata, kind, thorough)
    if not report.errors:
        try:
            write_text(cached, report.to_json())
        except OSError as error:
            logger.debug("The report of %s was not cached: %s", name, error)
    return report


def _files(metadata: Mapping[str, Any], kind: CocoKind | None) -> list[str]:
    """The files and folders on which a report depends."""
    if own := metadata.get("images") or metadata.get("mask_pairs"):
        return [path for path in str(own).split(":") if Path(path).exists()]
    keys = ("panoptic_json", "panoptic_root") if kind == "panoptic" else ("json_file",)
    return [
        str(metadata[key]) for key in (*keys, "image_root", "sem_seg_root", "label_root") if metadata.get(key)
    ]


def _cache_file(name: str, files: Iterable[str], thorough: bool) -> Path:
    stamps = [(str(Path(f).resolve()), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    digest = hashlib.sha256(repr((_VERSION, name, thorough, stamps)).encode()).hexdigest()[:32]
    return cache_dir() / "checks" / f"{digest}.json"


def _check(name: str, metadata: Mapping[str, Any], kind: CocoKind | None, thorough: bool) -> Report:
    every = -1 if thorough else 500
    root = metadata.get("image_root")
    if kind is None:
        own = metadata.get("images") or metadata.get("mask_pairs")
        report = Report(str(own or metadata.get("sem_seg_root") or root or name))
        records = DatasetCatalog.get(name)
        if metadata.get("lazy") and not thorough:  # of any length
            records = records[:: max(1, len(records) // every)]
        records = list({record["file_name"]: record for record in records}.values())
        records = [record for record in records if "://" not in record["file_name"]]
        report.counts = {"images": len(records)}
    else:
        content, report = read_coco(
            metadata["panoptic_json" if kind == "panoptic" else "json_file"], kind, root
        )
        records = content["images"]
        if root is not None:
            records = [{**r, "file_name": str(Path(root) / _name(r))} for r in records]
        if kind == "panoptic":
            _check_panoptic_files(content["annotations"], Path(metadata["panoptic_root"]), report)
    report.source = metadata.get("source", report.source)
    if kind is None or root is not None:
        check_image_files(records, report, headers=every)
    if kind is None and metadata.get("stuff_classes"):
        check_label_maps(
            records,
            report,
            num_classes=len(metadata["stuff_classes"]),
            ignore=(metadata.get("ignore_label", 255),),
            maps=every if thorough else 100,
        )
    return report


def _name(image: Mapping[str, Any]) -> str:
    return str(image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:]))


def _check_panoptic_files(annotations: Iterable[Mapping[str, Any]], root: Path, report: Report) -> None:
    for annotation in annotations:
        if not (root / annotation["file_name"]).is_file():
            report.add(
                "error",
                "panoptic label maps that are not there",
                str(root / annotation["file_name"]),
                "Check the panoptic root.",
            )
