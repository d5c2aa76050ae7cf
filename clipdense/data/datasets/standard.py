"""COCO, LVIS, ADE20K, Mapillary Vistas and Pascal VOC in their standard layouts, where Detectron2 does not
register them.

`datasets/README.md` describes the layouts. The root folder is ``DETECTRON2_DATASETS`` (default ``datasets``),
read at import.
"""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clipdense.data.datasets.layouts import (
    DatasetDicts,
    load_captions,
    load_instances,
    load_lvis,
    load_panoptic,
    load_sem_seg,
)
from clipdense.data.datasets.registration import dataset_root
from clipdense.files import read_text

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, _get_builtin_metadata

__all__ = [
    "ADE20K_CLASSES",
    "ADE20K_THINGS",
    "MAPILLARY_CLASSES",
    "MAPILLARY_THINGS",
    "VOC_CLASSES",
    "load_voc21",
    "register_standard",
]

ADE20K_CLASSES: list[str] = [name.strip() for name in ADE20K_SEM_SEG_CATEGORIES]
"""The 150 classes, each with its synonyms separated by commas."""

# fmt: off
_ADE20K_STUFF = {
    0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63,
    68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145,
}

VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]

MAPILLARY_CLASSES = [
    "Bird", "Ground Animal", "Curb", "Fence", "Guard Rail", "Barrier", "Wall", "Bike Lane",
    "Crosswalk - Plain", "Curb Cut", "Parking", "Pedestrian Area", "Rail Track", "Road", "Service Lane",
    "Sidewalk", "Bridge", "Building", "Tunnel", "Person", "Bicyclist", "Motorcyclist", "Other Rider",
    "Lane Marking - Crosswalk", "Lane Marking - General", "Mountain", "Sand", "Sky", "Snow", "Terrain",
    "Vegetation", "Water", "Banner", "Bench", "Bike Rack", "Billboard", "Catch Basin", "CCTV Camera",
    "Fire Hydrant", "Junction Box", "Mailbox", "Manhole", "Phone Booth", "Pothole", "Street Light", "Pole",
    "Traffic Sign Frame", "Utility Pole", "Traffic Light", "Traffic Sign (Back)", "Traffic Sign (Front)",
    "Trash Can", "Bicycle", "Boat", "Bus", "Car", "Caravan", "Motorcycle", "On Rails", "Other Vehicle",
    "Trailer", "Truck", "Wheeled Slow", "Car Mount", "Ego Vehicle",
]
"""The 65 classes of Mapillary Vistas 1.2, in the order of the label maps' values; 65 is "Unlabeled", and the
panoptic file counts from 1.

Source: names, order, ids and things are those that Mask2Former (package maskformer2 0.1) and MMSegmentation
(1.2.2) register."""

MAPILLARY_THINGS = [0, 1, 8, *range(19, 24), *range(32, 43), *range(44, 58), *range(59, 63)]
# fmt: on

ADE20K_THINGS: list[int] = [i for i in range(len(ADE20K_CLASSES)) if i not in _ADE20K_STUFF]
"""Indices of the 100 thing classes of ADE20K's instance annotations (Places challenge 2017) among the 150."""

_MAPILLARY_JSON = "panoptic_2018.json"
_SEMANTIC = {"evaluator_type": "sem_seg", "ignore_label": 255}


def register_standard(root: Path | None = None) -> None:
    """Register the standard datasets that Detectron2 lacks.

    Detectron2 reads its LVIS datasets through the package `lvis`. Without that package, which clipdense does
    not need, its names get the reader `load_lvis` instead; their metadata stay.

    | name | layout below the root | evaluator |
    | --- | --- | --- |
    | coco_2017_{train,val}_panoptic_with_sem_seg | coco/, with panoptic_semseg_* | coco_panoptic_seg |
    | coco_2017_{train,val}_sem_seg (133 classes) | the same | sem_seg |
    | coco_2017_{train,val}_captions | coco/annotations/captions_* | clip_retrieval |
    | lvis_v1_*, lvis_v0.5_* (Detectron2's names) | lvis/, images in coco/ | lvis |
    | ade20k_panoptic_{train,val} | ADEChallengeData2016/ | ade20k_panoptic_seg |
    | ade20k_instance_{train,val} (100 things) | the same | coco |
    | mapillary_vistas_panoptic_{train,val} | mapillary_vistas/ | coco_panoptic_seg |
    | pascalvoc20_sem_seg_{train,val} (no background) | VOC2012/annotations_detectron2/ | sem_seg |
    | pascalvoc21_sem_seg_{train,val} (background is class 0) | VOC2012/SegmentationClass/ | sem_seg |
    """
    root = root or dataset_root()
    for split, folder in (("train", "training"), ("val", "validation")):
        _register_coco(root / "coco", split)
        _register_ade20k(root / "ADEChallengeData2016", split, folder)
        _register_mapillary(root / "mapillary_vistas" / folder, split)
        _register_voc(root / "VOC2012", split)
    if find_spec("lvis") is None:
        _replace_lvis_readers()


def _register(name: str, load: Any, **metadata: Any) -> None:
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)


def _register_coco(root: Path, split: str) -> None:
    year = f"{split}2017"
    meta = _get_builtin_metadata("coco_panoptic_standard")
    things = meta["thing_dataset_id_to_contiguous_id"]
    ids = things | meta["stuff_dataset_id_to_contiguous_id"]
    images, panoptic, semantic = root / year, root / f"panoptic_{year}", root / f"panoptic_semseg_{year}"
    panoptic_json = root / "annotations" / f"panoptic_{year}.json"
    captions = root / "annotations" / f"captions_{year}.json"
    _register(
        f"coco_2017_{split}_panoptic_with_sem_seg",
        partial(load_panoptic, panoptic_json, images, panoptic, ids, set(things.values()), semantic),
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
        image_root=str(images),
        panoptic_root=str(panoptic),
        panoptic_json=str(panoptic_json),
        sem_seg_root=str(semantic),
        json_file=str(root / "annotations" / f"instances_{year}.json"),
        **meta,
    )
    _register(
        f"coco_2017_{split}_sem_seg",
        partial(load_sem_seg, semantic, images),
        stuff_classes=meta["stuff_classes"],
        stuff_colors=meta["stuff_colors"],
        image_root=str(images),
        sem_seg_root=str(semantic),
        **_SEMANTIC,
    )
    _register(
        f"coco_2017_{split}_captions",
        partial(load_captions, captions, images),
        evaluator_type="clip_retrieval",
        json_file=str(captions),
        image_root=str(images),
    )


def _register_ade20k(root: Path, split: str, folder: str) -> None:
    images, semantic = root / "images" / folder, root / "annotations_detectron2" / folder
    panoptic, panoptic_json = root / f"ade20k_panoptic_{split}", root / f"ade20k_panoptic_{split}.json"
    instances = root / f"ade20k_instance_{split}.json"
    things = {i: i for i in ADE20K_THINGS}
    stuff = {i: i for i in range(len(ADE20K_CLASSES)) if i not in things}
    _register(
        f"ade20k_panoptic_{split}",
        partial(load_panoptic, panoptic_json, images, panoptic, things | stuff, set(things), semantic),
        evaluator_type="ade20k_panoptic_seg",
        thing_classes=ADE20K_CLASSES,
        stuff_classes=ADE20K_CLASSES,
        thing_dataset_id_to_contiguous_id=things,
        stuff_dataset_id_to_contiguous_id=stuff,
        ignore_label=255,
        label_divisor=1000,
        image_root=str(images),
        panoptic_root=str(panoptic),
        panoptic_json=str(panoptic_json),
        sem_seg_root=str(semantic),
        json_file=str(instances),
    )
    instance_ids = {i: k for k, i in enumerate(ADE20K_THINGS)}
    _register(
        f"ade20k_instance_{split}",
        partial(load_instances, instances, images, instance_ids),
        evaluator_type="coco",
        thing_classes=[ADE20K_CLASSES[i] for i in ADE20K_THINGS],
        thing_dataset_id_to_contiguous_id=instance_ids,
        image_root=str(images),
        json_file=str(instances),
    )


def _register_mapillary(root: Path, split: str) -> None:
    panoptic, images, labels = root / "panoptic", root / "images", root / "labels"
    ids, things = range(len(MAPILLARY_CLASSES)), set(MAPILLARY_THINGS)
    _register(
        f"mapillary_vistas_panoptic_{split}",
        partial(
            load_panoptic,
            panoptic / _MAPILLARY_JSON,
            images,
            panoptic,
            {i + 1: i for i in ids},
            things,
            labels,
        ),
        evaluator_type="coco_panoptic_seg",
        thing_classes=MAPILLARY_CLASSES,
        stuff_classes=MAPILLARY_CLASSES,
        thing_dataset_id_to_contiguous_id={i + 1: i for i in ids if i in things},
        stuff_dataset_id_to_contiguous_id={i + 1: i for i in ids if i not in things},
        ignore_label=len(MAPILLARY_CLASSES),  # "Unlabeled"
        label_divisor=1000,
        image_root=str(images),
        panoptic_root=str(panoptic),
        panoptic_json=str(panoptic / _MAPILLARY_JSON),
        sem_seg_root=str(labels),
    )


def _register_voc(root: Path, split: str) -> None:
    images, without_background = root / "JPEGImages", root / "annotations_detectron2" / split
    _register(
        f"pascalvoc20_sem_seg_{split}",
        partial(load_sem_seg, without_background, images),
        stuff_classes=VOC_CLASSES,
        image_root=str(images),
        sem_seg_root=str(without_background),
        **_SEMANTIC,
    )
    _register(
        f"pascalvoc21_sem_seg_{split}",
        partial(load_voc21, root, split),
        stuff_classes=["background", *VOC_CLASSES],
        image_root=str(images),
        sem_seg_root=str(root / "SegmentationClass"),
        **_SEMANTIC,
    )


def load_voc21(root: Path, split: str) -> DatasetDicts:
    """Load VOC's label maps, in which 0 is the background, of a split of its ``ImageSets``."""
    names = read_text(root / "ImageSets" / "Segmentation" / f"{split}.txt").split()
    return load_sem_seg(root / "SegmentationClass", root / "JPEGImages", names=names)


def _replace_lvis_readers() -> None:
    for name in DatasetCatalog.list():
        if name.startswith("lvis_v") and not name.endswith("cocofied"):
            DatasetCatalog.remove(name)
            DatasetCatalog.register(name, partial(_load_registered_lvis, name))


def _load_registered_lvis(name: str) -> DatasetDicts:
    metadata = MetadataCatalog.get(name)
    return load_lvis(metadata.json_file, metadata.image_root)


register_standard()
