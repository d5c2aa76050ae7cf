"""Registration of the datasets of the `shapes` world; each is generated at its first use."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from clipdense.data.datasets.layouts import (
    DatasetDicts,
    load_captions,
    load_instances,
    load_lvis,
    load_panoptic,
)
from clipdense.data.shapes.layouts import CATEGORIES, class_synonyms, novel_kind
from clipdense.data.shapes.make import annotation_file, ensure_shapes, shapes_root
from clipdense.data.shapes.records import IGNORE, png_folders
from clipdense.data.shapes.splits import FREQUENCY, MINI, TINY
from clipdense.data.shapes.world import BASE, CLASSES, GROUNDS

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["register_shapes"]

_NOVEL = [name for k, name in enumerate(CLASSES) if novel_kind(k)]
_NOVEL_KINDS = {
    kind: [name for k, name in enumerate(CLASSES) if novel_kind(k) == kind]
    for kind in ("novel_shape", "novel_combination")
}


def register_shapes(root: Path | None = None) -> None:
    """Register every `shapes_*` dataset without generating it.

    | name | annotations | evaluator |
    | --- | --- | --- |
    | shapes_closed_{train,val} | instances of all 80 classes | coco |
    | shapes_ov_{train,val} | instances; train labels the 60 base classes, val all 80 | coco |
    | shapes_{closed,ov}_panoptic_{train,val} | all three kinds; 88 classes | coco_panoptic_seg |
    | shapes_{closed,ov}_sem_seg_{train,val} | semantic; 88 classes (ov train: 68) | sem_seg |
    | shapes_shift_[panoptic_|sem_seg_]val | shifted light, grounds and sizes; all classes | as above |
    | shapes_lvis_{train,val} | long-tailed, federated | lvis |
    | shapes_clip_{train,val} | five captions per image, instances and semantic maps | clip_retrieval |

    Every closed and ov dataset also has smaller versions. ``mini_train`` and ``mini_val``, for example
    ``shapes_closed_mini_train``, are the first 800 training and 200 validation images. ``tiny_train`` is the
    first 100 training images.

    The metadata of ov and shift datasets contain ``novel_classes`` (names) and ``novel_kinds`` (kind ->
    names). Those of instance and panoptic datasets contain ``class_attributes`` (colour and shape of each
    thing class).

    Args:
        root: dataset folder (default: `make.shapes_root`).
    """
    root = shapes_root() if root is None else root
    for split in ("train", "val"):
        for images, part in ((None, ""), (MINI[split], "mini_")):
            _register_views(root, "closed", part + split, split, images)
            _register_views(root, "ov", part + split, split, images)
        if split == "train":
            _register_views(root, "closed", "tiny_train", split, TINY)
            _register_views(root, "ov", "tiny_train", split, TINY)
        _register_lvis(root, split)
        _register_clip(root, split)
    _register_views(root, "shift", "val", "shift_val", None)


def _register_views(root: Path, family: str, suffix: str, split: str, images: int | None) -> None:
    """Register the instance, panoptic and semantic datasets of one split."""
    labels = "ov" if family == "ov" and split == "train" else "closed"
    classes = BASE if labels == "ov" else tuple(range(len(CLASSES)))
    things = {k + 1: i for i, k in enumerate(classes)}
    stuff = {len(CLASSES) + g + 1: len(classes) + g for g in range(len(GROUNDS))}
    names = [CLASSES[k] for k in classes]
    folders = png_folders(root, split)
    semantic = folders["semantic_ov" if labels == "ov" else "semantic"]
    instances, panoptic = (
        annotation_file(root, f"{kind}_{labels}", split, images) for kind in ("instances", "panoptic")
    )
    load_detection = partial(load_instances, instances, folders["image"], things, ("visible",))
    load_segments = partial(
        load_panoptic,
        panoptic,
        folders["image"],
        folders["panoptic"],
        things | stuff,
        set(things.values()),
        semantic,
    )
    ensure = partial(ensure_shapes, split, images, root)
    novel = _novel_metadata(names) if family != "closed" else {}
    maps = {"sem_seg_root": str(semantic), "ignore_label": IGNORE, "image_root": str(folders["image"])}
    objects = {
        "thing_dataset_id_to_contiguous_id": things,
        "image_root": str(folders["image"]),
        "json_file": str(instances),
        "class_attributes": {"color": [n.split()[0] for n in names], "shape": [n.split()[1] for n in names]},
    }
    everything = [*names, *GROUNDS]
    _register(
        f"shapes_{family}_{suffix}",
        load_detection,
        ensure,
        **{**objects, **novel, "evaluator_type": "coco", "thing_classes": names},
    )
    _register(
        f"shapes_{family}_panoptic_{suffix}",
        partial(_load_everything, load_segments, load_detection),
        ensure,
        **{**objects, **maps, **novel, "evaluator_type": "coco_panoptic_seg"},
        # As in Detectron2's COCO panoptic datasets, both lists name every class. The id maps separate things
        # from stuff.
        thing_classes=everything,
        stuff_classes=everything,
        stuff_dataset_id_to_contiguous_id=stuff,
        panoptic_root=str(folders["panoptic"]),
        panoptic_json=str(panoptic),
        label_divisor=1000,
    )
    _register(
        f"shapes_{family}_sem_seg_{suffix}",
        partial(_load_semantic, load_segments),
        ensure,
        **{**maps, **novel, "evaluator_type": "sem_seg", "stuff_classes": everything},
        thing_dataset_id_to_contiguous_id=things,
        stuff_dataset_id_to_contiguous_id=things | stuff,
    )


def _load_everything(
    load_segments: Callable[[], DatasetDicts], load_detection: Callable[[], DatasetDicts]
) -> DatasetDicts:
    """Load panoptic records and add the instance annotations."""
    annotations = {d["image_id"]: d["annotations"] for d in load_detection()}
    return [d | {"annotations": annotations[d["image_id"]]} for d in load_segments()]


def _load_semantic(load_segments: Callable[[], DatasetDicts]) -> DatasetDicts:
    """Load records that contain only the semantic label maps."""
    kept = ("file_name", "image_id", "height", "width", "sem_seg_file_name")
    return [{key: d[key] for key in kept} for d in load_segments()]


def _novel_metadata(names: list[str]) -> dict[str, Any]:
    """Return the metadata about the novel classes among ``names``."""
    novel = [n for n in _NOVEL if n in names]
    return {"novel_classes": novel, "novel_kinds": _NOVEL_KINDS if novel else {}}


def _register_lvis(root: Path, split: str) -> None:
    name = f"lvis_{split}"
    json_file = annotation_file(root, "lvis", name)
    _register(
        f"shapes_lvis_{split}",
        partial(load_lvis, json_file, root),
        partial(ensure_shapes, name, None, root),
        evaluator_type="lvis",
        thing_classes=list(CLASSES),
        thing_dataset_id_to_contiguous_id={k + 1: k for k in range(len(CLASSES))},
        class_image_count=[{"id": k + 1, "frequency": FREQUENCY[k]} for k in range(len(CLASSES))],
        json_file=str(json_file),
        image_root=str(root),
    )


def _register_clip(root: Path, split: str) -> None:
    name = f"clip_{split}"
    folders = png_folders(root, name)
    instances, captions = (annotation_file(root, kind, name) for kind in ("instances_closed", "captions"))
    things = {c["id"]: c["id"] - 1 for c in CATEGORIES if c["isthing"]}

    def load() -> DatasetDicts:
        words = {d["image_id"]: d["captions"] for d in load_captions(captions, folders["image"])}
        return [
            d
            | {
                "captions": words[d["image_id"]],
                "sem_seg_file_name": str(folders["semantic"] / Path(d["file_name"]).name),
            }
            for d in load_instances(instances, folders["image"], things, ("visible",))
        ]

    _register(
        f"shapes_clip_{split}",
        load,
        partial(ensure_shapes, name, None, root),
        evaluator_type="clip_retrieval",
        thing_classes=list(CLASSES),
        thing_dataset_id_to_contiguous_id=things,
        class_synonyms=[class_synonyms(k) for k in range(len(CLASSES))],
        novel_classes=_NOVEL,
        novel_kinds=_NOVEL_KINDS,
        json_file=str(captions),
        image_root=str(folders["image"]),
    )


def _register(
    name: str, load: Callable[[], DatasetDicts], ensure: Callable[[], Path], **metadata: Any
) -> None:
    def draw_and_load() -> DatasetDicts:
        ensure()
        return load()

    DatasetCatalog.register(name, draw_and_load)
    MetadataCatalog.get(name).set(made_at_first_use=True, **metadata)


register_shapes()
