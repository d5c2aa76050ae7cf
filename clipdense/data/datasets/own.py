"""Data listed in the configuration: COCO annotations, label maps, images alone, mask-category pairs, object
crops.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from clipdense.data.datasets.captions import register_captions
from clipdense.data.datasets.images import register_images
from clipdense.data.datasets.label_maps import register_label_maps
from clipdense.data.datasets.layouts import DatasetDicts, load_instances
from clipdense.data.datasets.mask_pairs import register_mask_pairs
from clipdense.data.datasets.object_crops import register_object_crops
from clipdense.data.datasets.registration import register_once
from clipdense.data.validation.coco import read_categories
from clipdense.data.validation.report import DataError

from detectron2.config import CfgNode

__all__ = ["register_coco", "register_from_config"]


logger = logging.getLogger(__name__)


def register_from_config(cfg: CfgNode) -> None:
    """Register the datasets of ``DATASETS.COCO_JSON``, ``LABEL_MAPS``, ``IMAGES``, ``CAPTIONS``,
    ``MASK_PAIRS`` and ``OBJECT_CROPS``.

    The set-up of a run, `Predictor` and the tools call it once for each process; everything else takes
    registered names. Calling it again with the same entries changes nothing.

    Raises:
        ValueError: If an entry is malformed, its name is in use, or a file has no categories.
        FileNotFoundError: If a file, a folder or a shard does not exist.
    """
    for fields in _entries(
        cfg,
        "IMAGES",
        "name:folder, name:images.json:image_folder or name:shards.tar (example: photos:data/photos)",
    ):
        register_images(*fields)
    for fields in _entries(
        cfg,
        "CAPTIONS",
        "name:captions.json:image_folder, name:captions.jsonl, name:folder or name:shards.tar "
        "(example: pairs:data/pairs.tar)",
    ):
        register_captions(*fields)
    for fields in _entries(
        cfg,
        "MASK_PAIRS",
        "name:dataset, name:pairs.jsonl or name:pairs.parquet:image_folder "
        "(example: nouns:data/nouns.jsonl:data/photos)",
    ):
        register_mask_pairs(*fields)
    for fields in _entries(
        cfg,
        "COCO_JSON",
        "name:annotations.json:image_folder (example: birds_train:data/birds/train.json:data/birds/images)",
        counts=(3,),
    ):
        register_coco(*fields)
    for fields in _entries(
        cfg,
        "LABEL_MAPS",
        "name:image_folder:label_folder:classes.txt, or the same and :ignored_value "
        "(example: roads_train:data/roads/images:data/roads/labels:data/roads/classes.txt)",
        counts=(4, 5),
    ):
        register_label_maps(*fields)
    for fields in _entries(
        cfg,
        "OBJECT_CROPS",
        "name:dataset, name:dataset:shots or name:dataset:shots:seed (example: crops:coco_2017_train:16)",
        counts=(2, 3, 4),
    ):
        register_object_crops(*fields)


def register_coco(name: str, json_file: str, image_root: str) -> None:
    """Register COCO instances whose class names come from the annotation file.

    Args:
        name: of the dataset.
        json_file: annotations in COCO's format.
        image_root: folder of the images.

    Raises:
        ValueError: If the name is in use, or the file has no list of categories.
        FileNotFoundError: If the file or the folder does not exist.
    """
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"dataset {name}: no annotation file {json_file}")
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"dataset {name}: no image folder {image_root}")
    categories = read_categories(json_file)
    ids = {category["id"]: k for k, category in enumerate(categories)}
    register_once(
        name,
        partial(_load, name, json_file, image_root, ids),
        {"json_file": json_file, "image_root": image_root},
        {
            "evaluator_type": "coco",
            "thing_classes": [category["name"] for category in categories],
            "thing_dataset_id_to_contiguous_id": ids,
        },
    )


def _entries(cfg: CfgNode, key: str, forms: str, counts: tuple[int, ...] = (2, 3)) -> Iterator[list[str]]:
    """Split the entries of a key in DATASETS at colons, with "~" and environment variables expanded."""
    for entry in cfg.DATASETS[key]:
        fields = [os.path.expanduser(os.path.expandvars(field.strip())) for field in str(entry).split(":")]
        if len(fields) not in counts or not all(fields):
            raise ValueError(f"DATASETS.{key}: {entry!r} is not of the form {forms}")
        if fields[0] in (".", "..") or "/" in fields[0] or os.sep in fields[0]:
            raise ValueError(
                f"DATASETS.{key}: {fields[0]!r} is a path; results are written to a folder of this name, so "
                "choose a name without slashes"
            )
        yield fields


def _load(name: str, json_file: str, image_root: str, ids: Mapping[Any, int]) -> DatasetDicts:
    try:
        records = load_instances(json_file, image_root, ids, ("keypoints",))
    except ValueError as error:
        raise DataError(f"dataset {name}: {error}") from error
    logger.info("Loaded %d images of %s from %s", len(records), name, json_file)
    return records
