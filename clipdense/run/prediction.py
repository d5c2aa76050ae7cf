"""Result of a prediction on one image: what was found, and its conversion to other formats."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
import torch
from PIL import Image

from clipdense.evaluation.detections import Detections, encode_masks
from clipdense.inference import connected_areas
from clipdense.visualization.pictures import draw_output, save_picture
from clipdense.visualization.segments import class_labels, output_kind, output_segments

from detectron2.structures import BitMasks, Boxes, Instances

if TYPE_CHECKING:
    import fiftyone
    import supervision

__all__ = ["Objects", "Prediction", "complete_output"]

MIN_SIDE, MAX_SIDE = 512, 2048
"""Range of the longer side of a picture, in pixels: small images are enlarged, so that names stay legible."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Objects:
    """N objects of one image: detections, or the segments of its map.

    Attributes:
        boxes: (N, 4) float32, x0, y0, x1, y1 in pixels.
        masks: (N, H, W) bool; None if the model predicts boxes only.
        classes: (N,) int64.
        scores: (N,) float32, 0..1; 1 for segments of a model that gives them no score.
    """

    boxes: npt.NDArray[np.float32]
    masks: npt.NDArray[np.bool_] | None
    classes: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


@dataclass
class Prediction:
    """What a model found in one image.

    A notebook shows it as a picture.

    Attributes:
        image: (H, W, 3) uint8 RGB, upright.
        output: the output of the model, as Detectron2's models return it: ``instances``, ``sem_seg``,
            ``sem_seg_labels``, ``panoptic_seg``.
        metadata: class names (``thing_classes``, ``stuff_classes``).
        kind: "panoptic", "instances" or "semantic": what is drawn and listed.
        source: file of the image; "" if there is none.
        frame: number of the frame of a video, from 0; None for an image.
    """

    image: npt.NDArray[np.uint8]
    output: Mapping[str, Any]
    metadata: Any
    kind: str = ""
    source: str = ""
    frame: int | None = None
    _objects: Objects | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.kind = output_kind(self.output, self.kind or None)

    @property
    def names(self) -> list[str]:
        """Class names, by class."""
        lists = ("thing_classes", "stuff_classes")
        first, second = lists if self.kind == "instances" else lists[::-1]
        return list(self.metadata.get(first) or self.metadata.get(second) or ())

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class of every pixel (H, W), -1 for none. Of instances, the best one covers the others."""
        if self.kind == "semantic":
            return class_labels(self.output)
        labels = np.full(self.image.shape[:2], -1, np.int64)
        found = self.objects
        if found.masks is None:
            raise ValueError("the model predicts boxes and no masks, so that pixels have no class")
        for i in np.argsort(found.scores, kind="stable"):
            labels[found.masks[i]] = found.classes[i]
        return labels

    @property
    def objects(self) -> Objects:
        """The instances; of a semantic or panoptic map, its segments."""
        if self._objects is None:
            self._objects = self._instances() if self.kind == "instances" else self._segments()
        return self._objects

    def describe(self) -> str:
        """Return what was found as text: "2 red star, 1 blue ring", or shares of the area."""
        found, names = self.objects, self.names
        if not len(found.classes):
            return "nothing found"
        if self.kind == "instances":
            counts = Counter(found.classes.tolist()).most_common()
            return ", ".join(f"{count} {_name(names, c)}" for c, count in counts)
        assert found.masks is not None
        shares: Counter[int] = Counter()
        for c, mask in zip(found.classes.tolist(), found.masks, strict=True):
            shares[c] += int(mask.sum())
        total = self.image.shape[0] * self.image.shape[1]
        return ", ".join(f"{_name(names, c)} {_percent(n / total)}" for c, n in shares.most_common())

    @property
    def picture_side(self) -> int:
        """Longer side of the image in the picture, in pixels."""
        return int(np.clip(max(self.image.shape[:2]), MIN_SIDE, MAX_SIDE))

    def plot(self, *, legend: bool = True) -> npt.NDArray[np.uint8]:
        """Draw what was found on the image: (H', W', 3) uint8 RGB, enlarged if the image is small."""
        return draw_output(
            self.image,
            self.output,
            self.metadata,
            score_threshold=0,
            cell=self.picture_side,
            kind=self.kind,
            legend=legend,
        )

    def _repr_png_(self) -> bytes:
        """Return the picture as PNG; notebooks call this."""
        data = io.BytesIO()
        Image.fromarray(self.plot()).save(data, format="PNG", compress_level=3)
        return data.getvalue()

    def save(self, folder: str | os.PathLike[str], formats: tuple[str, ...] = ("pictures", "coco")) -> Path:
        """Write this prediction into a folder; `clipdense.run.outputs.FORMATS` lists the formats.

        Returns:
            The folder.
        """
        from clipdense.run.outputs import OutputFolder

        with OutputFolder(folder, self.metadata, formats) as outputs:
            outputs.add(self)
        return Path(folder)

    def annotations(self, image_id: int = 0) -> list[Row]:
        """Return the instances as COCO annotations with ``score`` and ``category`` (the class name)."""
        if "instances" not in self.output:
            return []
        names = self.metadata.get("thing_classes") or self.metadata.get("stuff_classes") or ()
        rows = Detections.from_instances(self.output["instances"], image_id).to_json()
        return [{**row, "category": _name(names, row["category_id"]), "iscrowd": 0} for row in rows]

    def segments(self, image_id: int = 0) -> list[Row]:
        """Return the segments of a semantic or panoptic map as COCO annotations, largest first."""
        if self.kind == "instances":
            return []
        rows, names = [], self.metadata.get("stuff_classes") or ()
        for segment in output_segments(self.output, self.kind, self.metadata):
            (mask,) = encode_masks(torch.from_numpy(segment.pop("mask"))[None])
            row = {"image_id": image_id, **segment, "segmentation": mask}
            row |= {"bbox": mask_util.toBbox(mask).tolist(), "area": int(mask_util.area(mask))}
            rows.append(row | {"category": _name(names, segment["category_id"])})
        return rows

    def to_coco(self) -> dict[str, Any]:
        """Return a COCO dataset of this image: ``images``, ``categories`` and ``annotations``."""
        height, width = self.image.shape[:2]
        rows = self.annotations() if self.kind == "instances" else self.segments()
        return {
            "images": [{"id": 0, "file_name": self.source, "height": height, "width": width}],
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.names)],
            "annotations": [{"id": i, "iscrowd": 0, **row} for i, row in enumerate(rows)],
        }

    def to_supervision(self) -> supervision.Detections:
        """Return the objects as supervision's Detections, with ``class_name`` in their data.

        Raises:
            ImportError: If supervision is not installed.
        """
        import supervision

        found, names = self.objects, self.names
        return supervision.Detections(
            xyxy=found.boxes,
            mask=found.masks,
            confidence=found.scores,
            class_id=found.classes,
            data={"class_name": np.array([_name(names, c) for c in found.classes.tolist()], dtype=str)},
        )

    def to_fiftyone(self) -> fiftyone.Detections | fiftyone.Segmentation:
        """Return a label of FiftyOne: Detections with masks, or a Segmentation of a semantic map.

        A segmentation has 0 for pixels without a class, and class + 1 for the others. FiftyOne needs other
        versions of some packages than clipdense's lock file: install it into an environment of its own.

        Raises:
            ImportError: If fiftyone is not installed.
        """
        import fiftyone

        if self.kind == "semantic":
            return fiftyone.Segmentation(mask=(self.labels + 1).astype(np.uint16))
        found, names = self.objects, self.names
        height, width = self.image.shape[:2]
        rows = []
        for i, (x0, y0, x1, y1) in enumerate(found.boxes.tolist()):
            mask = None
            if found.masks is not None:
                mask = found.masks[i, round(y0) : round(y1), round(x0) : round(x1)]
            rows.append(
                fiftyone.Detection(
                    label=_name(names, int(found.classes[i])),
                    bounding_box=[x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height],
                    mask=mask if mask is not None and mask.size else None,
                    confidence=float(found.scores[i]),
                )
            )
        return fiftyone.Detections(detections=rows)

    def _instances(self) -> Objects:
        found: Instances = self.output["instances"].to("cpu")
        masks: Any = found.pred_masks if found.has("pred_masks") else None
        if isinstance(masks, BitMasks):
            masks = masks.tensor
        masks = None if masks is None else (masks > 0).numpy()
        boxes = (
            found.pred_boxes
            if found.has("pred_boxes")
            else BitMasks(torch.from_numpy(masks)).get_bounding_boxes()
        )
        return Objects(
            boxes.tensor.detach().numpy().astype(np.float32),
            masks,
            found.pred_classes.numpy().astype(np.int64),
            found.scores.detach().numpy().astype(np.float32),
        )

    def _segments(self) -> Objects:
        rows = output_segments(self.output, self.kind, self.metadata)
        masks = (
            np.stack([row["mask"] for row in rows]) if rows else np.zeros((0, *self.image.shape[:2]), bool)
        )
        classes = np.array([row["category_id"] for row in rows], np.int64)
        scores = np.ones(len(rows), np.float32)
        maps = self.output.get("sem_seg")
        if maps is not None and self.kind == "semantic":
            means = [
                float(maps[c][torch.from_numpy(mask)].mean()) for c, mask in zip(classes, masks, strict=True)
            ]
            scores = np.array(means, np.float32).reshape(-1)
        boxes = BitMasks(torch.from_numpy(masks)).get_bounding_boxes().tensor.numpy()
        return Objects(boxes.astype(np.float32), masks, classes, scores)

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Write the picture of `plot` as JPEG (``.jpg``) or PNG."""
        save_picture(self.plot(), path)


def complete_output(
    output: Mapping[str, Any], kind: str, metadata: Any, *, minimal_share: float = 0.001
) -> Mapping[str, Any]:
    """Add instances or a panoptic map to an output that only has a semantic one.

    The instances are the connected areas of the label map; objects of one class that touch are one instance.

    Args:
        output: output of a model for one image. It is not changed.
        kind: "instances" or "panoptic"; for any other, and if the output has it, the output is returned.
        metadata: class names; ``thing_dataset_id_to_contiguous_id`` lists the things.
        minimal_share: areas of less than this share of the image, 0..1, are left out.
    """
    semantic = "sem_seg" in output or "sem_seg_labels" in output
    key = {"instances": "instances", "panoptic": "panoptic_seg"}.get(kind)
    if key is None or key in output or not semantic:
        return output
    labels = torch.from_numpy(class_labels(output))
    masks, classes, scores = connected_areas(labels, output.get("sem_seg"), minimal_share=minimal_share)
    if kind == "instances":
        found = Instances(tuple(labels.shape), pred_masks=masks, pred_classes=classes, scores=scores)
        found.pred_boxes = BitMasks(masks).get_bounding_boxes() if len(masks) else Boxes(torch.zeros(0, 4))
        return {**output, "instances": found}
    things = metadata.get("thing_dataset_id_to_contiguous_id")
    things = set(range(1 + int(labels.max()))) if things is None else set(things.values())
    ids, segments = torch.zeros_like(labels, dtype=torch.int32), []
    stuff = [c for c in labels.unique().tolist() if c >= 0 and c not in things]
    parts = [(labels == c, c, False) for c in stuff]
    parts += [(m, c, True) for m, c in zip(masks, classes.tolist(), strict=True) if c in things]
    for number, (mask, c, thing) in enumerate(parts, 1):
        ids[mask] = number
        segments.append({"id": number, "category_id": c, "isthing": thing})
    return {**output, "panoptic_seg": (ids, segments)}


def _name(names: Any, category: int) -> str:
    return names[category] if category < len(names) else str(category)


def _percent(share: float) -> str:
    return "<1%" if share < 0.005 else f"{100 * share:.0f}%"
