"""A user's own data in Pascal VOC's format: XML boxes, and label maps of classes and objects."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args
from xml.etree import ElementTree

import numpy as np
import pycocotools.mask as mask_util

from clipdense.data.datasets.coco import register_instances
from clipdense.data.datasets.converted import converted_json
from clipdense.data.datasets.images import EXTENSIONS
from clipdense.data.datasets.label_maps import register_paired_maps
from clipdense.data.datasets.label_tables import ClassTable, read_class_table
from clipdense.data.datasets.registration import is_registered
from clipdense.data.datasets.standard import VOC_CLASSES
from clipdense.data.image import header_size, read_labels
from clipdense.data.validation.report import DataError, Report
from clipdense.files import read_text

__all__ = ["VocKind", "read_voc_boxes", "register_voc", "voc_splits", "voc_stems"]

VocKind = Literal["boxes", "masks", "semantic"]

_SETS: dict[str, tuple[str, ...]] = {
    "boxes": ("Main", "Layout", ""),
    "masks": ("Segmentation", "Main", ""),
    "semantic": ("Segmentation", "Main", ""),
}
"""Folders of ImageSets with the lists of a kind, first choice first."""

_VOID = (0, 255)


def register_voc(name: str, root: str, split: str, kind: str = "boxes") -> None:
    """Register a folder in Pascal VOC's layout.

    ``boxes`` reads the XML files of ``Annotations`` (or of the folder itself, as labelling tools write
    them). ``masks`` reads objects from ``SegmentationObject``, with the classes of ``SegmentationClass``;
    ``semantic`` reads ``SegmentationClass`` alone. Images lie in ``JPEGImages``, ``images`` or beside the XML
    files. The classes are those of ``labelmap.txt`` (CVAT's list with colours) or ``classes.txt`` in the
    folder; without these, for boxes the names in all XML files in alphabetical order, else VOC's own.

    Args:
        name: of the dataset.
        root: the folder.
        split: name of a list in ``ImageSets/Main`` or ``ImageSets/Segmentation``; ``all`` for every image.
        kind: ``boxes``, ``masks`` or ``semantic``.

    Raises:
        FileNotFoundError: If the folder or the list does not exist.
        DataError: If a file has a fault; names it.
        ValueError: If the kind is unknown, or the name is in use.
    """
    if kind not in get_args(VocKind):
        raise ValueError(f"dataset {name}: {kind!r} is not a kind; expected boxes, masks or semantic")
    identity = {"voc": f"{root}:{split}:{kind}"}
    if is_registered(name, identity):
        return
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"dataset {name}: no folder {root}")
    identity["source"] = f"{root} ({split})"
    if kind == "semantic":
        _register_semantic(name, folder, split, identity)
        return
    json_file = _convert_boxes(folder, split) if kind == "boxes" else _convert_masks(folder, split)
    register_instances(name, json_file, folder, identity)


def _register_semantic(name: str, root: Path, split: str, identity: dict[str, str]) -> None:
    images, maps = _images(root), _label_maps(root / "SegmentationClass")
    stems = _stems(root, split, "semantic", list(maps))
    pairs = {stem: (_image(images, stem, root), _required(maps, stem, root)) for stem in stems}
    folders = {"image_root": str(root), "sem_seg_root": str(root / "SegmentationClass")}
    register_paired_maps(name, pairs, _table(root), identity | folders)


def _convert_boxes(root: Path, split: str) -> Path:
    """Convert the XML files of a split to a COCO file."""
    files, images = _xml_files(root), _images(root)
    stems = _stems(root, split, "boxes", list(files))
    if missing := [stem for stem in stems if stem not in files]:
        raise FileNotFoundError(f"{root}: {len(missing)} XML files are missing, first {missing[0]}.xml")

    @cache
    def trees() -> dict[str, ElementTree.Element]:
        return {stem: _parse(path) for stem, path in files.items()}

    names = _object_classes(root)
    if _class_file(root) is None:  # the same names for every split
        names = sorted({found for tree in trees().values() for found in _names(tree)})
    return converted_json(
        "voc_boxes",
        [*names, *stems],
        [*files.values(), *images.values()],
        lambda: read_voc_boxes({stem: trees()[stem] for stem in stems}, images, names, root),
    )


def _convert_masks(root: Path, split: str) -> Path:
    """Convert the label maps of objects of a split to a COCO file."""
    objects, classes = _label_maps(root / "SegmentationObject"), _label_maps(root / "SegmentationClass")
    stems = _stems(root, split, "masks", list(objects))
    return converted_json(
        "voc_masks",
        [*_object_classes(root), *stems],
        [*objects.values(), *classes.values()],
        lambda: _read_masks(stems, objects, classes, _images(root), root),
    )


def voc_splits(root: Path, kind: str) -> list[str]:
    """Return the names of the lists of a kind in ``ImageSets``, or ``all`` if there is none."""
    for folder in _SETS[kind]:
        found = sorted(p.stem for p in (root / "ImageSets" / folder).glob("*.txt") if "_" not in p.stem)
        if found:
            return found
    return ["all"]


def voc_stems(root: Path, split: str, kind: str) -> list[str]:
    """Return the stems of the images of a split.

    Args:
        root: folder in Pascal VOC's layout.
        split: name of a list, or ``all``.
        kind: ``boxes``, ``masks`` or ``semantic``.

    Raises:
        FileNotFoundError: If there is no such list.
        DataError: If there are no annotations of the kind.
    """
    folders = {"masks": "SegmentationObject", "semantic": "SegmentationClass"}
    files = _xml_files(root) if kind == "boxes" else _label_maps(root / folders[kind])
    return _stems(root, split, kind, list(files))


def _stems(root: Path, split: str, kind: str, available: list[str]) -> list[str]:
    """Return the stems of the images of a split."""
    for folder in _SETS[kind]:
        path = root / "ImageSets" / folder / f"{split}.txt"
        if path.is_file():
            if not (stems := [line.split()[0] for line in read_text(path).splitlines() if line.strip()]):
                raise DataError(f"{path} lists no image")
            return stems
    if split != "all":
        raise FileNotFoundError(
            f"{root}: no list ImageSets/*/{split}.txt; the folder has {', '.join(voc_splits(root, kind))}"
        )
    if not available:
        raise DataError(f"{root}: no annotations of the kind {kind}")
    return sorted(available)


def _images(root: Path) -> dict[str, Path]:
    """Find the images by their stems."""
    for folder in (root / "JPEGImages", root / "images", root):
        if folder.is_dir():
            return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in EXTENSIONS}
    return {}


def _image(images: Mapping[str, Path], stem: str, root: Path) -> Path:
    if stem not in images:
        raise FileNotFoundError(f"{root}: no image {stem} ({', '.join(EXTENSIONS)}) in JPEGImages or images")
    return images[stem]


def _label_maps(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}, which holds the label maps of Pascal VOC's layout")
    return {p.stem: p for p in sorted(folder.glob("*.png"))}


def _required(maps: Mapping[str, Path], stem: str, root: Path) -> Path:
    if stem not in maps:
        raise FileNotFoundError(f"{root}: no label map {stem}.png in SegmentationClass")
    return maps[stem]


def _xml_files(root: Path) -> dict[str, Path]:
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    return {p.stem: p for p in sorted(folder.glob("*.xml"))}


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not an XML file ({error})") from error


def _names(tree: ElementTree.Element) -> list[str]:
    return [(found.findtext("name") or "").strip() for found in tree.iter("object")]


def _class_file(root: Path) -> Path | None:
    return next((root / name for name in ("labelmap.txt", "classes.txt") if (root / name).is_file()), None)


def _table(root: Path) -> ClassTable:
    path = _class_file(root)
    return ClassTable(("background", *VOC_CLASSES)) if path is None else read_class_table(path)


def _object_classes(root: Path) -> list[str]:
    return [name for name in _table(root).names if name.casefold() != "background"]


def read_voc_boxes(
    trees: Mapping[str, ElementTree.Element], images: Mapping[str, Path], names: Sequence[str], root: Path
) -> tuple[dict[str, Any], Report]:
    """Read VOC's XML files as the content of a COCO file.

    Pixels are counted from 1 and both corners belong to the box, as in VOC's own files. If any box has a
    corner below 1 or a fraction, all are taken as plain coordinates, as other tools write them. An object
    that is ``difficult`` becomes a crowd: it is not trained, and detections on it do not count.

    Args:
        trees: stem of an image -> its XML file.
        images: stem -> image.
        names: of the classes.
        root: folder to which file names are relative.
    """
    report = Report(str(root))
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    boxes = {stem: [_box(o) for o in tree.iter("object")] for stem, tree in trees.items()}
    usable = [box for found in boxes.values() for box in found if box is not None]
    from_1 = all(min(box[:2]) >= 1 and all(v.is_integer() for v in box) for box in usable)
    for number, (stem, tree) in enumerate(trees.items(), 1):
        row = _image_row(number, stem, tree, images, root, report)
        if row is None:
            continue
        rows.append(row)
        for found, box in zip(tree.iter("object"), boxes[stem], strict=True):
            name, place = (found.findtext("name") or "").strip(), f"{stem}.xml"
            if name not in names:
                report.add("error", "classes that are not listed", f"{place}: {name!r}", "Add the name.")
            elif box is None:
                report.add("error", "objects without a usable bndbox", f"{place}: {name}", "Mend the file.")
            else:
                x, y = box[0] - from_1, box[1] - from_1
                size = [box[2] - x, box[3] - y]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": number, "category_id": names.index(name)}
                    | {"bbox": [x, y, *size], "area": size[0] * size[1]}
                    | {"iscrowd": int((found.findtext("difficult") or "0").strip() == "1")}
                )
    return _content(rows, annotations, names, report), report


def _box(found: ElementTree.Element) -> list[float] | None:
    try:
        return [float(found.findtext(f"bndbox/{k}") or "") for k in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        return None


def _image_row(
    number: int, stem: str, tree: ElementTree.Element, images: Mapping[str, Path], root: Path, report: Report
) -> dict[str, Any] | None:
    image = images.get(stem) or images.get(Path(tree.findtext("filename") or "").stem)
    if image is None:
        report.add("error", "XML files without an image", f"{stem}.xml", "Add the image, or remove the file.")
        return None
    stated = [tree.findtext(f"size/{side}") or "" for side in ("height", "width")]
    size = tuple(map(int, stated)) if all(s.isdecimal() and int(s) for s in stated) else header_size(image)
    if size is None:
        report.add("error", "files that are not images", str(image), "Replace or remove the file.")
        return None
    return {"id": number, "file_name": os.path.relpath(image, root), "height": size[0], "width": size[1]}


def _content(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], names: Sequence[str], report: Report
) -> dict[str, Any]:
    report.counts = {"images": len(images), "annotations": len(annotations), "classes": len(names)}
    categories = [{"id": k, "name": name} for k, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _read_masks(
    stems: Sequence[str],
    objects: Mapping[str, Path],
    classes: Mapping[str, Path],
    images: Mapping[str, Path],
    root: Path,
) -> tuple[dict[str, Any], Report]:
    """Read one object for each value of ``SegmentationObject``, with its most frequent class."""
    report, table = Report(str(root)), _table(root)
    names = _object_classes(root)
    rows: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, stem in enumerate(stems, 1):
        image = _image(images, stem, root)
        if stem not in objects or stem not in classes:
            report.add(
                "error", "images without label maps", stem, "Expected one in each Segmentation folder."
            )
            continue
        ids, labels = read_labels(objects[stem]), table.read(classes[stem])
        if ids.shape != labels.shape:
            report.add("error", "label maps of different sizes", f"{stem}.png", "Give those of one image.")
            continue
        rows.append({"id": number, "file_name": os.path.relpath(image, root)})
        rows[-1] |= {"height": ids.shape[0], "width": ids.shape[1]}
        for value in np.unique(ids[~np.isin(ids, _VOID)]).tolist():
            mask = ids == value
            found = [c for c in labels[mask].tolist() if 0 <= c < len(table.names)]
            found = [c for c in found if table.names[c] in names]
            if not found:
                report.add("error", "objects without a class", f"{stem}.png: {value}", "Mend the label maps.")
                continue
            category = names.index(table.names[int(np.bincount(found).argmax())])
            rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                | {"bbox": mask_util.toBbox(rle).tolist(), "area": int(mask.sum())}
                | {"segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}}
            )
    return _content(rows, annotations, names, report), report
