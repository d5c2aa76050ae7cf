"""Data listed in the configuration: the user's own annotations in several formats, images, mask-category
pairs and object crops.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from clipdense.data.datasets.captions import register_captions
from clipdense.data.datasets.coco import register_coco
from clipdense.data.datasets.images import register_images
from clipdense.data.datasets.label_maps import register_label_maps
from clipdense.data.datasets.mask_pairs import register_mask_pairs
from clipdense.data.datasets.object_crops import register_object_crops
from clipdense.data.datasets.panoptic import register_panoptic
from clipdense.data.datasets.voc import register_voc
from clipdense.data.datasets.yolo import register_yolo

from detectron2.config import CfgNode

__all__ = ["FORMATS", "Format", "register_coco", "register_entry", "register_from_config"]


@dataclass(frozen=True)
class Format:
    """A format of data that a key in ``DATASETS`` lists.

    Attributes:
        register: registers one dataset, from its name and the other fields of the entry.
        form: of an entry, with an example.
        fields: least and largest number of fields, the name included.
    """

    register: Callable[..., None]
    form: str
    fields: tuple[int, int]


FORMATS: dict[str, Format] = {
    "IMAGES": Format(
        register_images,
        "name:folder, name:images.json:image_folder, name:list.txt:image_folder or name:shards.tar "
        "(example: photos:data/photos)",
        (2, 3),
    ),
    "CAPTIONS": Format(
        register_captions,
        "name:captions.json:image_folder, name:captions.jsonl, name:folder or name:shards.tar "
        "(example: pairs:data/pairs.tar)",
        (2, 3),
    ),
    "MASK_PAIRS": Format(
        register_mask_pairs,
        "name:dataset, name:pairs.jsonl, name:pairs.parquet:image_folder or name:shards.tar "
        "(example: nouns:data/nouns.jsonl:data/photos)",
        (2, 3),
    ),
    "COCO_JSON": Format(
        register_coco,
        "name:annotations.json:image_folder (example: birds_train:data/birds/train.json:data/birds/images)",
        (3, 3),
    ),
    "COCO_PANOPTIC": Format(
        register_panoptic,
        "name:panoptic.json:png_folder:image_folder, or the same and :semantic or :instances "
        "(example: town_train:data/town/train.json:data/town/train_png:data/town/images)",
        (4, 5),
    ),
    "LABEL_MAPS": Format(
        register_label_maps,
        "name:image_folder:label_folder:classes.txt, or the same and options such as :ignored_value or "
        ":zero_unlabelled (example: roads_train:data/roads/images:data/roads/labels:data/roads/classes.txt)",
        (4, 8),
    ),
    "YOLO": Format(
        register_yolo,
        "name:data.yaml:train (or val, test), or name:image_folder:label_folder:classes.txt "
        "(example: cups_train:data/cups/data.yaml:train)",
        (3, 4),
    ),
    "VOC": Format(
        register_voc,
        "name:folder:split, or the same and :boxes, :masks or :semantic "
        "(example: parts_train:data/parts:train)",
        (3, 4),
    ),
    "OBJECT_CROPS": Format(
        register_object_crops,
        "name:dataset, name:dataset:shots or name:dataset:shots:seed (example: crops:coco_2017_train:16)",
        (2, 4),
    ),
}
"""Key in ``DATASETS`` -> its format."""


def register_from_config(cfg: CfgNode) -> None:
    """Register the datasets that the keys of `FORMATS` list.

    The set-up of a run, `Predictor` and the tools call it once for each process; everything else takes
    registered names. Calling it again with the same entries changes nothing.

    Raises:
        ValueError: If an entry is malformed, its name is in use, or a file has no categories.
        DataError: If a file that has to be converted has a fault; names the file and the line.
        FileNotFoundError: If a file, a folder or a shard does not exist.
    """
    for key in FORMATS:
        for entry in cfg.DATASETS[key]:
            register_entry(key, str(entry))


def register_entry(key: str, entry: str) -> None:
    """Register one entry of a key of `FORMATS`, with "~" and environment variables expanded.

    Raises:
        See `register_from_config`.
    """
    entry_format = FORMATS[key]
    least, most = entry_format.fields
    fields = [os.path.expanduser(os.path.expandvars(field.strip())) for field in _fields(entry)]
    if not least <= len(fields) <= most or not all(fields):
        raise ValueError(f"DATASETS.{key}: {entry!r} is not of the form {entry_format.form}")
    if fields[0] in (".", "..") or "/" in fields[0] or os.sep in fields[0]:
        raise ValueError(
            f"DATASETS.{key}: {fields[0]!r} is a path; results are written to a folder of this name, so "
            "choose a name without slashes"
        )
    entry_format.register(*fields)


_FIELD = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]+://[^:/]*(?::\d+(?=/))?)?[^:]*")
"""A field of an entry: colons separate fields, except those of ``http://host:8000/a.tar``."""


def _fields(entry: str) -> Iterator[str]:
    """Split an entry at the colons that separate its fields."""
    start = 0
    while start <= len(entry):
        found = _FIELD.match(entry, start)
        assert found is not None  # it matches the empty text
        yield found[0]
        start = found.end() + 1
