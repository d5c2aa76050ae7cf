"""Detections of a whole dataset, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco.mask
import numpy as np
import numpy.typing as npt
import torch

from detectron2.structures import BitMasks, Instances

__all__ = ["Detections", "encode_masks"]

RLE = dict[str, Any]


def encode_masks(masks: torch.Tensor) -> list[RLE]:
    """Encode masks (N, H, W) as COCO run lengths; values above zero are foreground."""
    if masks.shape[0] == 0:
        return []
    rles: list[Any] = []
    for part in masks.split(max(1, 2**26 // max(1, masks[0].numel()))):  # copies of 64 MiB at a time
        rles += hotcoco.mask.encode((part > 0).cpu().numpy().transpose(1, 2, 0))
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles]


def _id_array(ids: Sequence[int | str]) -> npt.NDArray[Any]:
    """Return ids as int64, or as objects if one is text or does not fit into 64 bits."""
    if all(isinstance(i, int) and -(2**63) <= i < 2**63 for i in ids):
        return np.array(ids, np.int64)
    array = np.empty(len(ids), object)
    array[:] = ids
    return array


@dataclass
class Detections:
    """N detections as columns, which need little memory and no conversion for the metric.

    Attributes:
        image_ids, category_ids: (N,) ids of the dataset: int64, or objects if an id is text or does not fit.
        boxes: (N, 4) float64, x, y, width, height in pixels of the original image.
        scores: (N,) float64, finite.
        masks: N run-length encodings with text ``counts``; None if the model predicts boxes only.
    """

    image_ids: npt.NDArray[Any]
    category_ids: npt.NDArray[Any]
    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    masks: list[RLE] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls, *, masks: bool = False) -> Detections:
        """Return no detections."""
        ids = np.zeros(0, np.int64)
        return cls(ids, ids, np.zeros((0, 4)), np.zeros(0), [] if masks else None)

    @classmethod
    def from_instances(
        cls, instances: Instances, image_id: int | str, category_id: Callable[[int], int | str] = int
    ) -> Detections:
        """Convert the detections of one image.

        Args:
            instances: with `scores`, `pred_classes` and `pred_boxes` or `pred_masks` ((N, H, W) or BitMasks);
                without boxes, they are computed from the masks.
            image_id: id of the image in the dataset.
            category_id: maps a predicted class to a category id of the dataset.

        Raises:
            ValueError: If a score or a box is not finite.
        """
        masks: Any = instances.pred_masks if instances.has("pred_masks") else None
        if isinstance(masks, BitMasks):
            masks = masks.tensor
        if instances.has("pred_boxes"):
            boxes = instances.pred_boxes
        else:
            boxes = BitMasks(masks > 0).get_bounding_boxes()
        corners = boxes.tensor.detach().cpu()
        corners = (corners if corners.dtype == torch.float64 else corners.float()).numpy()
        scores = instances.scores.detach().cpu().double().numpy()
        if not (np.isfinite(corners).all() and np.isfinite(scores).all()):
            raise ValueError(f"image {image_id!r}: a detection has a score or a box that is NaN or infinite")
        classes = [category_id(c) for c in instances.pred_classes.tolist()]
        return cls(
            _id_array([image_id] * len(scores)),
            _id_array(classes),
            # subtracted in the boxes' own precision, as Detectron2 does
            np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float64),
            scores,
            None if masks is None else encode_masks(masks.detach()),
        )

    @classmethod
    def from_json(cls, results: Sequence[dict[str, Any]]) -> Detections:
        """Convert a list in COCO's result format (all with boxes; masks, if any, as run-length encodings)."""
        if not results:
            return cls.empty()
        return cls(
            _id_array([r["image_id"] for r in results]),
            _id_array([r["category_id"] for r in results]),
            np.array([r["bbox"] for r in results], np.float64),
            np.array([r["score"] for r in results], np.float64),
            [r["segmentation"] for r in results] if "segmentation" in results[0] else None,
        )

    @classmethod
    def concatenate(cls, parts: Iterable[Detections]) -> Detections:
        """Concatenate parts in order; empty parts decide about masks only if all parts are empty."""
        parts = list(parts)
        filled = [part for part in parts if len(part)]
        if not filled:
            return cls.empty(masks=any(part.masks is not None for part in parts))
        masked = [part.masks for part in filled if part.masks is not None]
        if masked and len(masked) < len(filled):
            raise ValueError(
                "some images have pred_masks and others do not; a model must give them for all images"
            )
        return cls(
            np.concatenate([part.image_ids for part in filled]),
            np.concatenate([part.category_ids for part in filled]),
            np.concatenate([part.boxes for part in filled]),
            np.concatenate([part.scores for part in filled]),
            [mask for masks in masked for mask in masks] if masked else None,
        )

    def __getitem__(self, keep: npt.NDArray[np.bool_]) -> Detections:
        """Select the detections where ``keep`` (N,) is True."""
        masks = None if self.masks is None else [self.masks[i] for i in np.flatnonzero(keep)]
        return Detections(
            self.image_ids[keep], self.category_ids[keep], self.boxes[keep], self.scores[keep], masks
        )

    def top_per_image(self, k: int) -> Detections:
        """Keep the ``k`` best scores of each image over all classes, order kept; ties keep the first."""
        numbers: dict[int | str, int] = {}
        images = np.array([numbers.setdefault(i, len(numbers)) for i in self.image_ids.tolist()], np.int64)
        order = np.lexsort((-self.scores, images))
        _, start, count = np.unique(images[order], return_index=True, return_counts=True)
        keep = np.zeros(len(self), bool)
        keep[order] = np.arange(len(self)) - np.repeat(start, count) < k
        return self[keep]

    def areas(self, iou_type: str) -> npt.NDArray[np.float64]:
        """Compute areas (N,) in pixels: of the masks for "segm", else of the boxes."""
        if iou_type != "segm":
            return self.boxes[:, 2] * self.boxes[:, 3]
        if not self.masks:
            return np.zeros(0)
        return np.asarray(hotcoco.mask.area(self.masks), np.float64)

    def to_json(self, *, boxes: bool = True) -> list[dict[str, Any]]:
        """Convert to a list in COCO's result format; ``boxes`` False leaves the boxes out."""
        columns = zip(
            self.image_ids.tolist(),
            self.category_ids.tolist(),
            self.boxes.tolist(),
            self.scores.tolist(),
            strict=True,
        )
        results: list[dict[str, Any]] = []
        for image_id, category_id, box, score in columns:
            results.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})
            if not boxes:
                del results[-1]["bbox"]
        for result, mask in zip(results, self.masks or (), strict=self.masks is not None):
            result["segmentation"] = mask
        return results
