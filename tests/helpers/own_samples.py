"""Samples of real photographs in the formats of a user's own data, converted from COCO and Pascal VOC."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import yaml
from PIL import Image

SIDE = 160
"""Longer side of the photographs in pixels."""


class CocoSample:
    """Photographs of COCO's training sample with objects of its three most frequent classes, made small.

    Attributes:
        rows: (file name, image, objects: class, box x y w h, polygons) of each photograph.
        names: the classes.
    """

    def __init__(self, data: Path, count: int = 8) -> None:
        content = json.loads((data / "coco/annotations/instances_train2017.json").read_text())
        usable = [
            a for a in content["annotations"] if isinstance(a["segmentation"], list) and a["area"] > 3000
        ]
        frequent = Counter(a["category_id"] for a in usable).most_common(3)
        ids = [category for category, _ in frequent]
        names = {c["id"]: c["name"] for c in content["categories"]}
        self.names = [names[i] for i in ids]
        self.rows: list[tuple[str, Image.Image, list[tuple[int, list[float], list[list[float]]]]]] = []
        for row in content["images"]:
            found = [a for a in usable if a["image_id"] == row["id"] and a["category_id"] in ids]
            if not found or len(self.rows) == count:
                continue
            image = Image.open(data / "coco/train2017" / row["file_name"]).convert("RGB")
            image.thumbnail((SIDE, SIDE))
            sx, sy = image.width / row["width"], image.height / row["height"]
            objects = []
            for a in found:
                x, y, w, h = a["bbox"]
                polygons = [
                    [v * (sx, sy)[k % 2] for k, v in enumerate(points)] for points in a["segmentation"]
                ]
                objects.append((ids.index(a["category_id"]), [x * sx, y * sy, w * sx, h * sy], polygons))
            self.rows.append((row["file_name"], image, objects))

    def save_images(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, image, _ in self.rows:
            image.save(folder / name)

    def masks(self, row: Any) -> list[tuple[int, np.ndarray]]:
        """Class and mask (H, W) of each object."""
        _, image, objects = row
        size = image.height, image.width
        return [
            (k, mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, *size))).astype(bool))
            for k, _, polygons in objects
        ]

    def coco(self, root: Path) -> None:
        """``all.json`` and ``images``."""
        self.save_images(root / "images")
        images, annotations = [], []
        for i, (name, image, objects) in enumerate(self.rows):
            images.append({"id": i, "file_name": name, "height": image.height, "width": image.width})
            for k, box, polygons in objects:
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": k, "bbox": box}
                    | {"area": box[2] * box[3], "iscrowd": 0, "segmentation": polygons}
                )
        categories = [{"id": k, "name": name} for k, name in enumerate(self.names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "all.json").write_text(json.dumps(content))

    def yolo(self, root: Path, polygons: bool, parts: tuple[str, ...]) -> None:
        """``data.yaml``, ``images/<part>`` and ``labels/<part>``."""
        for i, (name, image, objects) in enumerate(self.rows):
            part = parts[i % len(parts)]
            for folder in ("images", "labels"):
                (root / folder / part).mkdir(parents=True, exist_ok=True)
            image.save(root / "images" / part / name)
            size, lines = np.array([image.width, image.height]), []
            for k, (x, y, w, h), outlines in objects:
                values = [x + w / 2, y + h / 2, w, h] if not polygons else max(outlines, key=len)
                shares = (np.array(values).reshape(-1, 2) / size).ravel()
                lines.append(" ".join([str(k), *(f"{v:.6f}" for v in shares)]))
            (root / "labels" / part / name).with_suffix(".txt").write_text("\n".join(lines) + "\n")
        content = {"names": self.names, **{part: f"images/{part}" for part in parts}}
        (root / "data.yaml").write_text(yaml.safe_dump(content))

    def voc_boxes(self, root: Path) -> None:
        """``Annotations``, ``JPEGImages`` and ``ImageSets/Main``, in pixels counted from 1."""
        self.save_images(root / "JPEGImages")
        for folder in ("Annotations", "ImageSets/Main"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        stems = []
        for name, image, objects in self.rows:
            stems.append(Path(name).stem)
            text = f"<annotation><filename>{name}</filename><size><width>{image.width}</width>"
            text += f"<height>{image.height}</height><depth>3</depth></size>"
            for k, (x, y, w, h) in ((k, box) for k, box, _ in objects):
                corners = [round(x) + 1, round(y) + 1, round(x + w), round(y + h)]
                tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
                box = "".join(f"<{tag}>{max(v, 1)}</{tag}>" for tag, v in tags)
                text += f"<object><name>{self.names[k]}</name><difficult>0</difficult>"
                text += f"<bndbox>{box}</bndbox></object>"
            (root / "Annotations" / f"{stems[-1]}.xml").write_text(text + "</annotation>")
        write_lists(root / "ImageSets/Main", stems)

    def coloured_maps(self, root: Path) -> None:
        """``images``, ``labels`` in colours and ``label_colors.txt``; what is no object is Void."""
        self.save_images(root / "images")
        (root / "labels").mkdir(parents=True)
        colours = {name: (60 * k + 40, 255 - 60 * k, 30) for k, name in enumerate([*self.names, "Void"])}
        for row in self.rows:
            picture = np.full((row[1].height, row[1].width, 3), colours["Void"], np.uint8)
            for k, mask in self.masks(row):
                picture[mask] = colours[self.names[k]]
            Image.fromarray(picture).save((root / "labels" / row[0]).with_suffix(".png"))
        lines = [f"{r} {g} {b}\t{name}" for name, (r, g, b) in colours.items()]
        (root / "label_colors.txt").write_text("\n".join(lines) + "\n")


def write_lists(folder: Path, stems: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n".join(stems[:-2]) + "\n")
    (folder / "val.txt").write_text("\n".join(stems[-2:]) + "\n")


def panoptic(data: Path, root: Path, count: int = 6) -> int:
    """COCO's panoptic sample, made small; returns its number of classes.

    Writes ``panoptic.json``, ``pngs`` and ``images``.
    """
    content = json.loads((data / "coco/annotations/panoptic_train2017.json").read_text())
    for folder in ("images", "pngs"):
        (root / folder).mkdir(parents=True)
    content["annotations"] = content["annotations"][:count]
    images = {row["id"]: row for row in content["images"]}
    kept = []
    for row in content["annotations"]:
        image = images[row["image_id"]]
        picture = Image.open(data / "coco/train2017" / image["file_name"]).convert("RGB")
        picture.thumbnail((SIDE, SIDE))
        picture.save(root / "images" / image["file_name"])
        png = Image.open(data / "coco/panoptic_train2017" / row["file_name"]).convert("RGB")
        png = png.resize(picture.size, Image.Resampling.NEAREST)
        png.save(root / "pngs" / row["file_name"])
        ids = np.asarray(png).astype(np.int64) @ [1, 256, 65536]
        row["segments_info"] = [
            {key: s[key] for key in ("id", "category_id", "iscrowd")}
            for s in row["segments_info"]
            if (ids == s["id"]).any()
        ]
        kept.append(image | {"height": picture.height, "width": picture.width})
    (root / "panoptic.json").write_text(json.dumps({**content, "images": kept}))
    return len(content["categories"])


def voc_maps(data: Path, root: Path, count: int = 6) -> list[str]:
    """VOC's label maps, made small, with objects where the sample has single ones; returns the stems.

    Writes ``JPEGImages``, ``SegmentationClass``, ``SegmentationObject`` and ``ImageSets/Segmentation``.
    """
    source = data / "voc2012"
    content = json.loads((source / "annotations/voc2012_segval_single_instance_DERIVED.json").read_text())
    names = {row["id"]: row["file_name"] for row in content["images"]}
    stems = list(dict.fromkeys(Path(names[a["image_id"]]).stem for a in content["annotations"]))[:count]
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for stem in stems:
        image = Image.open(source / "JPEGImages" / f"{stem}.jpg").convert("RGB")
        image.thumbnail((SIDE, SIDE))
        image.save(root / "JPEGImages" / f"{stem}.jpg")
        labels = Image.open(source / "SegmentationClass" / f"{stem}.png")
        labels.resize(image.size, Image.Resampling.NEAREST).save(root / "SegmentationClass" / f"{stem}.png")
        objects = np.zeros((*Image.open(source / "JPEGImages" / f"{stem}.jpg").size[::-1],), np.uint8)
        for k, a in enumerate(a for a in content["annotations"] if Path(names[a["image_id"]]).stem == stem):
            objects[mask_util.decode(a["segmentation"]) > 0] = k + 1
        small = Image.fromarray(objects).resize(image.size, Image.Resampling.NEAREST)
        small.save(root / "SegmentationObject" / f"{stem}.png")
    write_lists(root / "ImageSets/Segmentation", stems)
    return stems


def indexed_maps(data: Path, root: Path) -> None:
    """VOC's palette label maps as ``images``, ``labels`` and ``classes.txt`` of all 21 classes."""
    from clipdense.data.datasets.standard import VOC_CLASSES

    voc_maps(data, root)
    (root / "JPEGImages").rename(root / "images")
    (root / "SegmentationClass").rename(root / "labels")
    for path in sorted((root / "SegmentationObject").iterdir()):
        path.unlink()
    (root / "SegmentationObject").rmdir()
    (root / "classes.txt").write_text("\n".join(["background", *VOC_CLASSES]) + "\n")
