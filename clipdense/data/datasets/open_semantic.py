"""Semantic segmentation with many classes: COCO-Stuff, full ADE20K, PASCAL-Context.

`datasets/prepare_coco_stuff.py`, `prepare_coco_stuff_10k.py`, `prepare_ade20k_full.py` and
`prepare_pascal_context.py` make the label maps from the published files. ADE20K with 150 classes comes from
Detectron2, Pascal VOC from `standard`.
"""

import json
from functools import partial
from pathlib import Path

from clipdense.data.datasets.layouts import load_sem_seg
from clipdense.data.datasets.registration import dataset_root
from clipdense.data.datasets.standard import VOC_CLASSES, load_voc21

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = [
    "ADE20K_FULL",
    "COCO_STUFF",
    "COCO_STUFF_BASE",
    "COCO_STUFF_NOVEL",
    "COCO_STUFF_VALUES",
    "NUM_THINGS",
    "PASCAL_CONTEXT_459",
    "PASCAL_CONTEXT_59",
    "PASCAL_CONTEXT_60",
    "WIDE_IGNORE",
    "register_open_semantic",
]

_NAMES = json.loads(Path(__file__).with_name("class_lists.json").read_text("utf-8"))

COCO_STUFF: list[str] = _NAMES["coco_stuff"]
"""The 171 classes, 80 things first."""

NUM_THINGS = 80
"""Number of thing classes in COCO."""

COCO_STUFF_NOVEL = [
    *("cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors", "cardboard", "clouds"),
    *("grass", "playingfield", "river", "road", "tree", "wall-concrete"),
]
"""The 15 classes that are never labelled in training (SPNet, Xian et al., CVPR 2019; ZegFormer, zsseg)."""

COCO_STUFF_BASE = [name for name in COCO_STUFF if name not in COCO_STUFF_NOVEL]

COCO_STUFF_VALUES = [
    value for value in range(182) if value not in {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
]
"""Grey values (category id - 1) of the 171 classes in the published label maps, in order; 11 are unused."""

ADE20K_FULL: list[str] = _NAMES["ade20k_full"]
"""The 847 classes, each with its synonyms separated by commas."""

PASCAL_CONTEXT_459: list[str] = _NAMES["pascal_context_459"]
PASCAL_CONTEXT_59: list[str] = _NAMES["pascal_context_59"]
"""The most frequent of the 459 classes, with the names of OVSeg."""

PASCAL_CONTEXT_60: list[str] = ["background", *PASCAL_CONTEXT_59]
"""The same, after a class for everything else."""

WIDE_IGNORE = 65535
"""Void in 16-bit label maps."""


def register_open_semantic(root: Path | None = None) -> None:
    """Register the datasets below a root folder (default: ``DETECTRON2_DATASETS``).

    | name | classes | layout below the root |
    | --- | --- | --- |
    | coco_2017_{train,val}_stuff_sem_seg | 171 | coco/stuffthingmaps_detectron2/{train,val}2017/ |
    | ovcoco_stuff_2017_train | the 156 base classes | coco/stuffthingmaps_detectron2/train2017_base/ |
    | ovcoco_stuff_2017_val | 171, with ``novel_classes`` | as coco_2017_val_stuff_sem_seg |
    | ade20k_full_sem_seg_{train,val} | 847 | ADE20K_2021_17_01/{images,annotations}_detectron2/ |
    | coco_stuff_10k_sem_seg_{train,test} | 171 | coco_stuff10k/{images,annotations_detectron2}/ |
    | pascal_context_{59,459}_sem_seg_{train,val} | 59, 459 | VOC2010/annotations_detectron2/ |
    | pascal_context_60_sem_seg_{train,val} | background is class 0, then the 59 | the same |
    | coco_object_sem_seg_{train,val} | background is class 0, then the 80 things | coco/objects_detectron2/ |
    | pascalvoc20b_sem_seg_{train,val} | as pascalvoc21_sem_seg; predicted: the 59 | VOC2012/ |

    PAS-20b (OpenSeg, Ghiasi et al., ECCV 2022) is VOC with background: the 59 classes of PASCAL-Context are
    predicted, and those that VOC lacks are background.

    Label maps of the 847 and the 459 classes are 16-bit and mark void as `WIDE_IGNORE`, the others as 255.
    """
    root = root or dataset_root()
    coco, ade, voc = root / "coco", root / "ADE20K_2021_17_01", root / "VOC2010"
    stuff = coco / "stuffthingmaps_detectron2"
    for split, folder in (("train", "training"), ("val", "validation")):
        images = coco / f"{split}2017"
        _register(f"coco_2017_{split}_stuff_sem_seg", COCO_STUFF, stuff / images.name, images)
        _register(
            f"ade20k_full_sem_seg_{split}",
            ADE20K_FULL,
            ade / "annotations_detectron2" / folder,
            ade / "images_detectron2" / folder,
        )
        objects = ["background", *COCO_STUFF[:NUM_THINGS]]
        _register(f"coco_object_sem_seg_{split}", objects, coco / "objects_detectron2" / images.name, images)
        for names in (PASCAL_CONTEXT_59, PASCAL_CONTEXT_60, PASCAL_CONTEXT_459):
            labels = voc / "annotations_detectron2" / f"pc{len(names)}_{split}"
            _register(f"pascal_context_{len(names)}_sem_seg_{split}", names, labels, voc / "JPEGImages")
        _register_voc20b(root / "VOC2012", split)
    for split in ("train", "test"):
        small = root / "coco_stuff10k"
        labels = small / "annotations_detectron2" / split
        _register(f"coco_stuff_10k_sem_seg_{split}", COCO_STUFF, labels, small / "images")
    base, val = stuff / "train2017_base", stuff / "val2017"
    _register("ovcoco_stuff_2017_train", COCO_STUFF_BASE, base, coco / "train2017")
    _register("ovcoco_stuff_2017_val", COCO_STUFF, val, coco / "val2017", COCO_STUFF_NOVEL)


def _register_voc20b(root: Path, split: str) -> None:
    name, classes = f"pascalvoc20b_sem_seg_{split}", ["background", *VOC_CLASSES]
    names = ["diningtable" if name == "table" else name for name in PASCAL_CONTEXT_59]
    DatasetCatalog.register(name, partial(load_voc21, root, split))
    MetadataCatalog.get(name).set(
        evaluator_type="sem_seg",
        ignore_label=255,
        stuff_classes=classes,
        vocabulary_classes=PASCAL_CONTEXT_59,
        vocabulary_mapping=[classes.index(name) if name in classes else 0 for name in names],
        image_root=str(root / "JPEGImages"),
        sem_seg_root=str(root / "SegmentationClass"),
    )


def _register(
    name: str, classes: list[str], labels: Path, images: Path, novel: list[str] | None = None
) -> None:
    wide = len(classes) > 255
    load = partial(load_sem_seg, labels, images, label_ext=".tif" if wide else ".png")
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        evaluator_type="sem_seg",
        ignore_label=WIDE_IGNORE if wide else 255,
        stuff_classes=classes,
        image_root=str(images),
        sem_seg_root=str(labels),
        **({"novel_classes": novel} if novel else {}),
    )


register_open_semantic()
