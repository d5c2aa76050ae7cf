"""A user's own data: COCO-format files, images alone, and mask-category pairs, named in the config."""

import os
from functools import partial
from pathlib import Path

from clipdense.data.datasets.images import register_images
from clipdense.data.datasets.layouts import DatasetDicts, load_json
from clipdense.data.mask_pairs import register_mask_pairs

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

__all__ = ["register_from_config"]


def register_from_config(cfg: CfgNode) -> None:
    """Register what ``DATASETS.COCO_JSON``, ``DATASETS.IMAGES`` and ``DATASETS.MASK_PAIRS`` list; what is
    registered already, with the same paths, is left as it is.

    Raises:
        ValueError: an entry that is not "name:annotations.json:image_folder" (of images, "name:source" or
            "name:images.json:image_folder"; of pairs, "name:source" or "name:pairs.jsonl:image_folder"), a
            name that is taken, or a file without categories.
        FileNotFoundError: a json file, a folder or a shard is not there.
    """
    for entry in cfg.DATASETS.IMAGES:
        parts = _parts(entry)
        if len(parts) not in (2, 3) or not all(parts):
            raise ValueError(
                f"DATASETS.IMAGES: {entry!r} reads neither name:folder nor name:images.json:image_folder nor "
                "name:shards.tar (example: photos:data/photos)"
            )
        register_images(*parts)
    for entry in cfg.DATASETS.MASK_PAIRS:
        parts = _parts(entry)
        if len(parts) not in (2, 3) or not all(parts):
            raise ValueError(
                f"DATASETS.MASK_PAIRS: {entry!r} reads neither name:data_set nor name:pairs.jsonl nor "
                "name:pairs.parquet:image_folder (example: nouns:data/nouns.jsonl:data/photos)"
            )
        register_mask_pairs(*parts)
    for entry in cfg.DATASETS.COCO_JSON:
        parts = [os.path.expandvars(part.strip()) for part in str(entry).split(":")]
        if len(parts) != 3 or not all(parts):
            raise ValueError(
                f"DATASETS.COCO_JSON: {entry!r} does not read name:annotations.json:image_folder "
                "(example: birds_train:data/birds/train.json:data/birds/images)"
            )
        name, json_file, image_root = parts[0], Path(parts[1]).expanduser(), Path(parts[2]).expanduser()
        if not json_file.is_file():
            raise FileNotFoundError(f"DATASETS.COCO_JSON: annotations of {name}: no file {json_file}")
        if not image_root.is_dir():
            raise FileNotFoundError(f"DATASETS.COCO_JSON: images of {name}: no folder {image_root}")
        if name in DatasetCatalog.list():
            taken = MetadataCatalog.get(name)
            if (taken.get("json_file"), taken.get("image_root")) != (str(json_file), str(image_root)):
                raise ValueError(
                    f"DATASETS.COCO_JSON: the name {name} is taken by another data set; choose a new one"
                )
            continue
        categories = _categories(json_file)
        DatasetCatalog.register(name, partial(_load, str(json_file), str(image_root), name))
        MetadataCatalog.get(name).set(
            json_file=str(json_file),
            image_root=str(image_root),
            evaluator_type="coco",
            thing_classes=list(categories.values()),
            thing_dataset_id_to_contiguous_id={k: i for i, k in enumerate(categories)},
        )


def _parts(entry: object) -> list[str]:
    return [os.path.expanduser(os.path.expandvars(part.strip())) for part in str(entry).split(":")]


def _categories(json_file: Path) -> dict[int, str]:
    """Category id -> name, in order of id."""
    content = load_json(json_file)
    try:
        return {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{json_file}: no list of categories with id and name ({error!r})") from error


def _load(json_file: str, image_root: str, name: str) -> DatasetDicts:
    try:
        return load_coco_json(json_file, image_root, name)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"data set {name}: {json_file} holds no COCO instances ({error!r})") from error
