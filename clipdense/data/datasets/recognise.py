"""Recognition of the format of a user's data, from a file or a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clipdense.data.datasets.images import EXTENSIONS
from clipdense.data.datasets.label_maps import LABEL_EXTENSIONS
from clipdense.data.datasets.own import FORMATS
from clipdense.data.datasets.voc import voc_splits
from clipdense.data.json_files import load_json
from clipdense.data.validation.report import DataError
from clipdense.files import read_text

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["NO_HINTS", "Found", "Hints", "recognise"]

_CLASS_FILES = (
    *("labelmap.txt", "classes.txt", "class_dict.csv", "label_colors.txt", "labels.txt", "classes.json"),
    *("classes.csv", "names.txt"),
)
_LABEL_FOLDERS = ("labels", "masks", "annotations", "label_maps", "SegmentationClass")
_IMAGE_FOLDERS = ("images", "JPEGImages", "imgs", "img")

_KNOWN = (
    "a COCO json file (instances, panoptic, captions, LVIS), a YOLO data.yaml or folder, a folder in Pascal "
    "VOC's layout (Annotations or SegmentationClass), folders images and labels with a file of class names, "
    "or a folder of images"
)


@dataclass(frozen=True)
class Hints:
    """What the user says beside the path.

    Attributes:
        images: folder of the images.
        panoptic: folder of the panoptic PNGs.
        classes: file of class names, with or without colours.
        options: further fields of an entry of ``DATASETS.LABEL_MAPS``, such as ``zero_unlabelled``.
    """

    images: Path | None = None
    panoptic: Path | None = None
    classes: Path | None = None
    options: tuple[str, ...] = ()


NO_HINTS = Hints()


@dataclass(frozen=True)
class Found:
    """One dataset in a path.

    Attributes:
        key: the key in ``DATASETS`` that lists it; "" for annotations that no key lists.
        kind: what it is, for the reader; for a JSON file without a key, the kind of `read_coco`.
        name: for the dataset, made of the names of files and folders.
        fields: of its entry, after the name.
    """

    key: str
    kind: str
    name: str
    fields: tuple[str, ...]

    @property
    def entry(self) -> str:
        """Entry of the config key."""
        return ":".join((self.name, *self.fields))

    @contextmanager
    def registered(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Register the dataset within the context; yields its name and metadata."""
        known = self.name in DatasetCatalog.list()
        FORMATS[self.key].register(self.name, *self.fields)
        try:
            yield self.name, MetadataCatalog.get(self.name).as_dict()
        finally:
            if not known:
                DatasetCatalog.remove(self.name)
                MetadataCatalog.remove(self.name)


def recognise(path: Path, hints: Hints = NO_HINTS) -> list[Found]:
    """Recognise the datasets in a file or folder.

    Args:
        path: see the message of the error for what is known.
        hints: what cannot be seen from the path.

    Raises:
        FileNotFoundError: If there is no such path.
        DataError: If it is of no known format, or something that belongs to it is not found; says what to
            name.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        found = _file(path, hints)
    else:
        found = _yolo(path) or _voc(path) or _json_files(path, hints) or _label_folders(path, hints)
        found = found or _image_folder(path)
    if not found:
        raise DataError(f"{path}: no data of a known format; expected {_KNOWN}")
    return found


def _name(*parts: str) -> str:
    words = "_".join(part for part in parts if part)
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in words)


def _file(path: Path, hints: Hints) -> list[Found]:
    if path.suffix in (".yaml", ".yml"):
        return _yolo_yaml(path)
    return [_coco(path, hints)] if path.suffix == ".json" else []


def _yolo(folder: Path) -> list[Found]:
    for name in ("data.yaml", "dataset.yaml", "data.yml"):
        if (folder / name).is_file():
            return _yolo_yaml(folder / name)
    return []


def _yolo_yaml(path: Path) -> list[Found]:
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not a YAML file ({error})") from error
    if not isinstance(content, dict) or "names" not in content:
        raise DataError(f'{path}: no "names", which a YOLO dataset needs; expected {_KNOWN}')
    folder = path.resolve().parent.name
    parts = [part for part in ("train", "val", "test") if content.get(part)]
    return [Found("YOLO", "YOLO boxes or polygons", _name(folder, part), (str(path), part)) for part in parts]


def _voc(folder: Path) -> list[Found]:
    kinds = []
    if any((folder / "Annotations").glob("*.xml")) or any(folder.glob("*.xml")):
        kinds.append(("boxes", "Pascal VOC boxes"))
    if any((folder / "SegmentationObject").glob("*.png")):
        kinds.append(("masks", "Pascal VOC objects with masks"))
    if any((folder / "SegmentationClass").glob("*.png")):
        kinds.append(("semantic", "Pascal VOC label maps"))
    return [
        Found("VOC", text, _name(folder.resolve().name, split, kind), (str(folder), split, kind))
        for kind, text in kinds
        for split in voc_splits(folder, kind)
    ]


def _json_files(folder: Path, hints: Hints) -> list[Found]:
    for place in (folder, folder / "annotations"):
        files = [path for path in sorted(place.glob("*.json")) if path.name not in _CLASS_FILES]
        if files:
            return [_coco(path, hints) for path in files]
    nested = [path for path in sorted(folder.glob("*/*.json")) if path.name.endswith(".coco.json")]
    return [_coco(path, hints) for path in nested]


def _coco(path: Path, hints: Hints) -> Found:
    """Recognise the kind of a COCO file from its first annotation, and find its folders."""
    content = load_json(path)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not (isinstance(annotations, list) or "images" in content):
        raise DataError(f"{path}: not an annotation file of COCO; expected {_KNOWN}")
    first = annotations[0] if annotations and isinstance(annotations[0], dict) else {}
    name = _name(path.resolve().parent.name, path.stem)
    if "caption" in first:
        return Found("", "captions", name, (str(path),))
    if _is_lvis(content):
        return Found("", "lvis", name, (str(path),))
    images = hints.images or _find_folder(path, [row.get("file_name") for row in content.get("images") or []])
    if "segments_info" in first:
        places = (
            [hints.panoptic] if hints.panoptic else [path.with_suffix(""), path.parent.parent / path.stem]
        )
        pngs = next((p for p in places if p.is_dir()), None)
        if pngs is None:
            raise DataError(f"{path}: the folder of its panoptic PNGs is not found; name it with --panoptic")
        if images is None:
            raise DataError(f"{path}: the folder of its images is not found; name it with --images")
        return Found("COCO_PANOPTIC", "COCO panoptic", name, (str(path), str(pngs), str(images)))
    if images is None:
        return Found("", "instances", name, (str(path),))
    return Found("COCO_JSON", "COCO instances", name, (str(path), str(images)))


def _is_lvis(content: dict[str, Any]) -> bool:
    rows = content.get("images")
    return isinstance(rows, list) and bool(rows) and "neg_category_ids" in rows[0]


def _find_folder(json_file: Path, names: Iterable[Any]) -> Path | None:
    """Find the folder below which the first image of a JSON file lies, near the file."""
    first = next((name for name in names if isinstance(name, str)), None)
    if first is None:
        return None
    near = [json_file.parent, json_file.parent.parent]
    folders = [*near, *(p for root in near for p in sorted(root.iterdir()) if p.is_dir())]
    return next((folder for folder in folders if (folder / first).is_file()), None)


def _label_folders(folder: Path, hints: Hints) -> list[Found]:
    """Recognise folders of images and of labels: label maps, or YOLO's text files."""
    images = hints.images or next((folder / n for n in _IMAGE_FOLDERS if (folder / n).is_dir()), None)
    labels = next((folder / n for n in _LABEL_FOLDERS if (folder / n).is_dir()), None)
    if images is None or labels is None:
        return []
    maps = next((p for p in labels.rglob("*") if p.suffix.lower() in LABEL_EXTENSIONS), None)
    if maps is None and next(labels.rglob("*.txt"), None) is None:
        return []
    classes = hints.classes or next((folder / n for n in _CLASS_FILES if (folder / n).is_file()), None)
    if classes is None:
        raise DataError(
            f"{folder} has labels in {labels}, but no class names: write a classes.txt there, "
            "with a name on each line, that of class 0 first; or name the file with --classes"
        )
    name, fields = _name(folder.resolve().name), (str(images), str(labels), str(classes))
    if maps is None:
        return [Found("YOLO", "YOLO boxes or polygons", name, fields)]
    return [Found("LABEL_MAPS", "label maps", name, (*fields, *hints.options))]


def _image_folder(folder: Path) -> list[Found]:
    if not any(p.suffix.lower() in EXTENSIONS for p in folder.rglob("*")):
        return []
    return [Found("IMAGES", "images without annotations", _name(folder.resolve().name), (str(folder),))]
