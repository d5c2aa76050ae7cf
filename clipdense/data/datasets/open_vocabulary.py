"""OV-COCO and OV-LVIS: COCO and LVIS with novel classes, which are never labelled in training.

OV-COCO: 48 base and 17 novel classes (Bansal et al., arXiv:1804.04340); validation uses all 65 (generalized
protocol). OV-LVIS: the 337 rare classes of LVIS v1 are novel, the 866 others base (ViLD, arXiv:2104.13921).
`datasets/prepare_ov_coco.py` and `prepare_ov_lvis.py` make the files from the originals.
"""

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clipdense.data.datasets.layouts import load_instances, load_lvis
from clipdense.data.datasets.registration import dataset_root

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

__all__ = [
    "LVIS_RARE",
    "OV_COCO",
    "OV_COCO_BASE",
    "OV_COCO_NOVEL",
    "OV_LVIS_FILES",
    "register_open_vocabulary",
]

# fmt: off
OV_COCO_BASE = [
    "person", "bicycle", "car", "motorcycle", "train", "truck", "boat", "bench", "bird", "horse", "sheep",
    "bear", "zebra", "giraffe", "backpack", "handbag", "suitcase", "frisbee", "skis", "kite", "surfboard",
    "bottle", "fork", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "pizza",
    "donut", "chair", "bed", "toilet", "tv", "laptop", "mouse", "remote", "microwave", "oven", "toaster",
    "refrigerator", "book", "clock", "vase", "toothbrush",
]
OV_COCO_NOVEL = [
    "airplane", "bus", "cat", "dog", "cow", "elephant", "umbrella", "tie", "snowboard", "skateboard", "cup",
    "knife", "cake", "couch", "keyboard", "sink", "scissors",
]
# fmt: on

OV_COCO: dict[int, str] = {
    c["id"]: c["name"] for c in COCO_CATEGORIES if c["name"] in {*OV_COCO_BASE, *OV_COCO_NOVEL}
}
"""COCO category id -> name of the 65 classes, in order of id."""

_LVIS = sorted(LVIS_CATEGORIES, key=lambda category: category["id"])

LVIS_RARE = frozenset(category["id"] for category in _LVIS if category["frequency"] == "r")
"""Category ids of LVIS v1's 337 rare classes."""

OV_LVIS_FILES = ("lvis_v1_train_seen_1203_cat.json", "lvis_v1_train_norare.json")
"""File names in use for LVIS v1's training annotations without the rare classes."""

_OV_COCO_FILES = ("instances_train2017_seen_2.json", "instances_train2017_seen_2_65_cat.json")


def register_open_vocabulary(root: Path | None = None) -> None:
    """Register the datasets below a root folder (default: ``DETECTRON2_DATASETS``).

    | name | classes | layout below the root |
    | --- | --- | --- |
    | ovcoco_2017_train | the 48 base classes | coco/annotations/instances_train2017_seen_2.json |
    | ovcoco_2017_train_65 | all 65, the base ones labelled | ..._seen_2_65_cat.json |
    | ovcoco_2017_val | all 65 | instances_val2017_all_2.json |
    | ovlvis_v1_train | the 866 base classes | lvis/lvis_v1_train_seen_1203_cat.json or _norare.json |
    | ovlvis_v1_train_1203 | all 1203, the base ones labelled | the same |
    | ovlvis_v1_val | all 1203 | lvis/lvis_v1_val.json |

    The two training sets of OV-COCO differ only in their class list: each can be read from either file.

    Metadata: ``novel_classes`` (names; may be empty); for OV-LVIS also ``class_synonyms``, all names of each
    class.
    """
    root = root or dataset_root()
    annotations = root / "coco" / "annotations"
    base = {k: name for k, name in OV_COCO.items() if name in OV_COCO_BASE}
    train, val = root / "coco" / "train2017", root / "coco" / "val2017"
    _register_coco("train", base, _first(annotations, _OV_COCO_FILES), train)
    _register_coco("train_65", OV_COCO, _first(annotations, _OV_COCO_FILES[::-1]), train)
    _register_coco("val", OV_COCO, annotations / "instances_val2017_all_2.json", val)

    common = [category for category in _LVIS if category["id"] not in LVIS_RARE]
    train = _first(root / "lvis", OV_LVIS_FILES)
    _register_lvis("train", common, train, root / "coco")
    _register_lvis("train_1203", _LVIS, train, root / "coco")
    _register_lvis("val", _LVIS, root / "lvis" / "lvis_v1_val.json", root / "coco")


def _first(folder: Path, names: Sequence[str]) -> Path:
    """Return the first file that exists; the first name if none does."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def _register_coco(suffix: str, classes: dict[int, str], json_file: Path, images: Path) -> None:
    ids = {category_id: k for k, category_id in enumerate(classes)}
    name = f"ovcoco_2017_{suffix}"
    DatasetCatalog.register(name, partial(load_instances, json_file, images, ids))
    _set_metadata(name, "coco", ids, list(classes.values()), OV_COCO_NOVEL, json_file, images)


def _register_lvis(suffix: str, categories: Sequence[dict[str, Any]], json_file: Path, images: Path) -> None:
    ids = {category["id"]: k for k, category in enumerate(categories)}
    names = [category["name"] for category in categories]
    novel = [category["name"] for category in categories if category["id"] in LVIS_RARE]
    name = f"ovlvis_v1_{suffix}"
    DatasetCatalog.register(name, partial(load_lvis, json_file, images, ids))
    _set_metadata(name, "lvis", ids, names, novel, json_file, images)
    synonyms = [list(dict.fromkeys([c["name"], *c["synonyms"]])) for c in categories]
    MetadataCatalog.get(name).class_synonyms = synonyms


def _set_metadata(
    name: str,
    evaluator_type: str,
    ids: dict[int, int],
    classes: list[str],
    novel: Collection[str],
    json_file: Path,
    images: Path,
) -> None:
    MetadataCatalog.get(name).set(
        evaluator_type=evaluator_type,
        thing_classes=classes,
        thing_dataset_id_to_contiguous_id=ids,
        novel_classes=[n for n in classes if n in novel],
        json_file=str(json_file),
        image_root=str(images),
    )


register_open_vocabulary()
