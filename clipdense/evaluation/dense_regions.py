"""How well a CLIP names the segments of an image: from crops, and from its dense features pooled over them.

The measure of CLIPSelf (Wu et al., ICLR 2024, Sec. 3 and 4; specs/clipself_fvlm_catseg_odise_fcclip.md 1.5):
the segments of a panoptic data set are classified by the text embeddings of all its classes, from a crop of
the image, and from the dense map of the whole image by RoIAlign over their boxes and by the mean over their
masks. The gap between the crops and the rest is what dense CLIP methods work on.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from clipdense.clip import ClipModel, TowerRequest
from clipdense.clip.tables import TextTable
from clipdense.clip.text import TextBank
from clipdense.clip.towers import Tower
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.image import read_image, read_labels
from clipdense.data.letterbox import crop_box, enlarge_box, letterbox
from clipdense.evaluation.base import Results, TaskEvaluator
from clipdense.evaluation.groups import class_attributes, class_groups
from clipdense.regions import pool_boxes, pool_masks, resize_masks

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

__all__ = [
    "DenseRegionEvaluator",
    "DenseView",
    "Regions",
    "best_dense_mode",
    "crop_features",
    "dense_map",
    "find_regions",
    "normalize_pixels",
    "pool_regions",
    "recall",
    "region_accuracy",
]

MAX_SEGMENTS = 100
"""Segments of an image that count, the first ones."""
MIN_AREA, MAX_AREA = 8**2, 1024**2
"""Of a segment's box in square pixels, both included."""
CROP_FACTOR = 1.5
"""By which the box of a thing is enlarged for its crop."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenseView:
    """How dense features of an image are made.

    Attributes:
        mode: last-block mode of the image tower; "" for `best_dense_mode`.
        image_size: side in pixels of the square that the image is letterboxed to, a multiple of the tower's
            stride; 0: the image's own longest side, rounded up to one.
        antialias: whether masks are resized to the map with antialiasing. CLIPSelf's numbers are without;
            torchvision has it on by default, which swells small masks several-fold.
    """

    mode: str = ""
    image_size: int = 0
    antialias: bool = False

    def __str__(self) -> str:
        size = str(self.image_size or "native")
        return ",".join(filter(None, (self.mode, size, "antialias" if self.antialias else "")))


@dataclass(frozen=True)
class Regions:
    """The segments of an image that count.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        labels: (n,) int64, classes.
        things: (n,) bool.
        boxes: (n, 4) float32, xyxy in pixels: the annotated box of a thing, of stuff the extreme pixels of
            its mask.
        masks: (n, H, W) bool.
    """

    image: npt.NDArray[np.uint8]
    labels: Tensor
    things: Tensor
    boxes: Tensor
    masks: Tensor


def find_regions(
    image: npt.NDArray[np.uint8],
    ids: npt.NDArray[np.int64],
    segments: Sequence[Mapping[str, Any]],
    classes: Mapping[int, tuple[int, bool]],
) -> Regions | None:
    """The segments of an image that count; None if there are none.

    Args:
        image: (H, W, 3) uint8 RGB.
        ids: (H, W) segment ids.
        segments: COCO panoptic ``segments_info``: ``id``, ``category_id`` and ``bbox`` (x, y, w, h).
        classes: category id -> (label, whether it is a thing).
    """
    labels, things, boxes, masks = [], [], [], []
    for segment in segments[:MAX_SEGMENTS]:
        label, thing = classes[segment["category_id"]]
        mask = ids == segment["id"]
        if thing:
            x, y, w, h = segment["bbox"]
            box = (x, y, x + w, y + h)
        elif mask.any():
            (rows,), (columns,) = mask.any(1).nonzero(), mask.any(0).nonzero()
            box = (columns[0], rows[0], columns[-1], rows[-1])  # as published, without + 1
        else:
            continue
        if MIN_AREA <= (box[2] - box[0]) * (box[3] - box[1]) <= MAX_AREA:
            labels.append(label)
            things.append(thing)
            boxes.append([float(side) for side in box])
            masks.append(mask)
    if not labels:
        return None
    return Regions(
        image,
        torch.tensor(labels),
        torch.tensor(things),
        torch.tensor(boxes),
        torch.from_numpy(np.stack(masks)),
    )


def best_dense_mode(tower: Tower) -> str:
    """The mode in which a tower that was trained on whole images names regions best: without attention in
    the last block where the tower can do without."""
    return next((mode for mode in ("clipself", "value") if mode in tower.dense_modes), "plain")


def normalize_pixels(clip: ClipModel, images: npt.NDArray[np.uint8]) -> Tensor:
    """Images (B, H, W, 3) uint8 RGB -> (B, 3, H, W) as the model takes them, on its device."""
    device = clip.logit_scale.device
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (clip.pixel_mean, clip.pixel_std))
    return (pixels - mean) / std


@torch.no_grad()
def crop_features(clip: ClipModel, regions: Regions, batch_size: int = 64) -> Tensor:
    """Unit image embeddings (n, D) of crops: a thing's box enlarged by `CROP_FACTOR`, a stuff box as it is,
    letterboxed to the model's native size."""
    boxes = regions.boxes.tolist()
    factors = [CROP_FACTOR if thing else 1.0 for thing in regions.things]
    image, size = regions.image, clip.image_size[0]
    crops = [
        crop_box(image, enlarge_box(box, factor, image.shape[:2]), size)
        for box, factor in zip(boxes, factors, strict=True)
    ]
    batches = [np.stack(crops[i : i + batch_size]) for i in range(0, len(crops), batch_size)]
    features = torch.cat([clip.encode_image(normalize_pixels(clip, batch)) for batch in batches])
    return F.normalize(features.float(), dim=1)


@torch.no_grad()
def dense_map(clip: ClipModel, image: npt.NDArray[np.uint8], mode: str = "", image_size: int = 0) -> Tensor:
    """Dense map (1, D, g, g), float32, of an image letterboxed to a square, padded right or bottom.

    Args:
        image: (H, W, 3) uint8 RGB.
        mode, image_size: see `DenseView`.

    Raises:
        ValueError: an image size that is no multiple of the tower's stride, or a mode that it does not have.
    """
    stride = clip.visual.stride
    size = image_size or math.ceil(max(image.shape[:2]) / stride) * stride
    if size % stride:
        raise ValueError(f"image size {size} is no multiple of the stride {stride} of '{clip.name}'")
    pixels = normalize_pixels(clip, letterbox(image, size)[0][None])
    dense: Tensor = clip.visual(pixels, TowerRequest(dense=mode or best_dense_mode(clip.visual))).dense
    return dense.float()


def pool_regions(dense: Tensor, regions: Regions, antialias: bool = False) -> tuple[Tensor, Tensor]:
    """Unit embeddings (n, D) of boxes and of masks from the dense map (1, D, g, g) of their image."""
    side = dense.shape[-1]
    masks = resize_masks(regions.masks, side, antialias=antialias)
    scale = side / max(regions.image.shape[:2])
    return (
        pool_boxes(dense, [regions.boxes.to(dense.device)], scale=scale, pooling="clipself"),
        pool_masks(dense, [masks], pooling="clipself"),
    )


def region_accuracy(
    scores: Tensor,
    labels: Tensor,
    groups: Mapping[str, Sequence[int]] | None = None,
    attributes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """Accuracies in percent; empty without regions.

    Args:
        scores: (n, K).
        labels: (n,) int64.
        groups: name -> classes, e.g. ``{"novel": [...]}``: their regions also apart.
        attributes: name -> one value a class, e.g. its colour; "" where a class has none.

    Returns:
        ``top1`` over regions; ``macc1`` and ``macc5``, means over the classes that occur of the share of
        their regions whose class has the highest score, or one of the five highest; ``top1-<group>``;
        ``top1-<attribute>``: the predicted class has the value of the true one.
    """
    if not len(labels):
        return {}
    ranked = scores.topk(min(5, scores.shape[1])).indices
    first, five = ranked[:, 0] == labels, (ranked == labels[:, None]).any(1)
    counts = labels.bincount(minlength=scores.shape[1]).double()

    def by_class(hits: Tensor) -> Tensor:
        return (labels.bincount(hits.double(), minlength=len(counts)) / counts)[counts > 0].mean()

    result = {"top1": first.double().mean(), "macc1": by_class(first), "macc5": by_class(five)}
    for name, members in (groups or {}).items():
        inside = torch.isin(labels, torch.tensor(members))
        if inside.any() and not inside.all():
            result[f"top1-{name}"] = first[inside].double().mean()
    for name, values in (attributes or {}).items():
        table = np.array(values)
        truth, predicted = table[labels.numpy()], table[ranked[:, 0].numpy()]
        if (known := truth != "").any():
            result[f"top1-{name}"] = torch.tensor((truth == predicted)[known].mean())
    return {name: 100 * float(value) for name, value in result.items()}


def recall(queries: Tensor, gallery: Tensor, k: int, block: int = 2048) -> float:
    """Percentage of unit queries (n, D) whose own row is among the k nearest of a gallery (n, D); a tie
    counts against it."""
    found = 0
    for start in range(0, len(queries), block):
        similarity = queries[start : start + block] @ gallery.T
        own = similarity.diagonal(start)[:, None]
        found += int(((similarity >= own).sum(1) <= k).sum())
    return 100 * found / len(queries)


class DenseRegionEvaluator(TaskEvaluator):
    """Accuracy of a CLIP on the segments of a panoptic data set.

    A model is evaluated on what it gives as output ``clip``, a `ClipModel` in evaluation mode, the same for
    every image; images and segments are read from the data set's own files. A text tower that is there gives
    the class embeddings. All classes compete, things and stuff alike; a label is the rank of the category id.

    Results are ``{"dense_regions": metrics}``, with several views ``{"dense_regions[<view>]": metrics}``,
    in percent, for things and stuff apart (see `region_accuracy`; the metadata's ``class_attributes`` and
    groups of classes count):

    - ``rois.thing.macc1`` etc.: boxes; ``maskpool.*``: masks; ``crops.*``: the image embedding of crops,
      which says what the model knows (the upper bound) and whether its class token still does;
    - ``dense_to_crop_R@1``, ``crop_to_dense_R@1`` and ``@5``: how many box features have their own crop
      among the nearest of all crops of the data set, and the reverse;
    - ``thing.n``, ``stuff.n``: numbers of regions.

    Args:
        dataset_name: registered data set with ``panoptic_json`` and ``panoptic_root`` in its metadata.
        output_dir: folder for ``dense_regions.json``, the metrics; None writes nothing.
        views: how dense features are made, each measured.
        templates: prompt templates of the class names, see `TextBank`.
        table: file with the class embeddings instead, see `TextTable.load`; rows without names are in the
            order of category ids.

    Raises:
        FileNotFoundError: the data set's annotations, or the table, are not there.
    """

    outputs = ("clip",)

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        views: Sequence[DenseView] = (DenseView(),),
        templates: str | Sequence[str] = "single",
        table: str | Path = "",
        distributed: bool = True,
        optional: bool = False,
    ) -> None:
        super().__init__(output_dir, distributed=distributed, optional=optional)
        self._name, self._metadata = dataset_name, MetadataCatalog.get(dataset_name)
        self.views = list(views)
        self._templates, self._table = templates, table
        self._text: Tensor | None = None
        self._annotations: dict[Any, dict[str, Any]] = {}
        self._classes: dict[int, tuple[int, bool]] = {}
        self._names: list[str] = []
        self._vocabulary: Vocabulary | None = None

    def reset(self) -> None:
        """Forget all images, and the class embeddings of the last model."""
        super().reset()
        self._text = None

    def regions(self, sample: Mapping[str, Any]) -> Regions | None:
        """Read the segments of an image.

        Args:
            sample: with ``image_id`` and ``file_name``.

        Raises:
            ValueError: the data set has no panoptic annotations, or none of the image.
        """
        self._read_annotations()
        if sample["image_id"] not in self._annotations:
            raise ValueError(
                f"image {sample['image_id']!r} is not in the panoptic annotations of '{self._name}'"
            )
        annotation = self._annotations[sample["image_id"]]
        ids = read_labels(os.path.join(self._metadata.panoptic_root, annotation["file_name"]))
        return find_regions(
            read_image(sample["file_name"], "RGB"), ids, annotation["segments_info"], self._classes
        )

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Any] | None:
        """Labels and features of one image's regions; None if it has none."""
        clip, regions = output["clip"], self.regions(sample)
        if self._text is None:
            self._text = self._embed_classes(clip)
        if regions is None:
            return None
        settings = {(view.mode, view.image_size) for view in self.views}
        maps = {setting: dense_map(clip, regions.image, *setting) for setting in settings}
        pooled = [pool_regions(maps[v.mode, v.image_size], regions, v.antialias) for v in self.views]
        return {
            "labels": regions.labels,
            "things": regions.things,
            "crops": crop_features(clip, regions).cpu(),
            "rois": torch.stack([rois for rois, _ in pooled], 1).cpu(),
            "maskpool": torch.stack([masks for _, masks in pooled], 1).cpu(),
        }

    def score(self, records: list[dict[str, Any] | None]) -> Results:
        """All metrics, by view."""
        found = [record for record in records if record is not None]
        if not found:
            logger.warning("%s: no image has a region that counts", self._name)
            return Results()
        merged = {key: torch.cat([record[key] for record in found]) for key in found[0]}
        things, crops = merged["things"], merged["crops"]
        shared = {"thing.n": float(things.sum()), "stuff.n": float((~things).sum())}
        shared |= self._accuracies("crops", crops, merged["labels"], things)
        results = Results()
        for i, view in enumerate(self.views):
            rois, masks = merged["rois"][:, i], merged["maskpool"][:, i]
            metrics = shared | self._accuracies("rois", rois, merged["labels"], things)
            metrics |= self._accuracies("maskpool", masks, merged["labels"], things)
            for k in (1, 5):
                metrics[f"dense_to_crop_R@{k}"] = recall(rois, crops, k)
                metrics[f"crop_to_dense_R@{k}"] = recall(crops, rois, k)
            task = "dense_regions" if len(self.views) == 1 else f"dense_regions[{view}]"
            results[task] = metrics
            logger.info("%s, %s:\n%s", self._name, task, _table(metrics))
        self.save("dense_regions.json", results)
        return results

    def _accuracies(self, source: str, features: Tensor, labels: Tensor, things: Tensor) -> dict[str, float]:
        assert self._text is not None
        groups = class_groups(self._metadata, self._names)
        attributes = class_attributes(self._metadata, self._names)
        result: dict[str, float] = {}
        for kind, chosen in (("thing", things), ("stuff", ~things)):
            scores = features[chosen] @ self._text.T
            accuracy = region_accuracy(scores, labels[chosen], groups, attributes)
            result |= {f"{source}.{kind}.{name}": value for name, value in accuracy.items()}
        return result

    def _read_annotations(self) -> None:
        # at the first image, when the loader has seen to it that the data set is there
        if self._annotations:
            return
        if not self._metadata.get("panoptic_json"):
            raise ValueError(f"data set '{self._name}' has no panoptic annotations (metadata panoptic_json)")
        with PathManager.open(self._metadata.panoptic_json, "r") as file:
            content = json.load(file)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self._classes = {c["id"]: (rank, bool(c["isthing"])) for rank, c in enumerate(categories)}
        self._names = [c["name"] for c in categories]
        self._vocabulary = Vocabulary.from_categories(categories)
        self._annotations = {annotation["image_id"]: annotation for annotation in content["annotations"]}

    def _embed_classes(self, clip: ClipModel) -> Tensor:
        """Unit class embeddings (K, D) on the CPU."""
        assert self._vocabulary is not None
        if self._table:
            table = TextTable.load(self._table, self._vocabulary, dim=clip.embed_dim)
            return table(self._vocabulary)
        return TextBank(clip, self._templates)(self._vocabulary).cpu()


def _table(metrics: Mapping[str, float]) -> str:
    """The main figures, for the log."""
    columns = ("macc1", "macc5", "top1")
    rows = [
        [f"{source}, {kind}", *(metrics.get(f"{source}.{kind}.{name}") for name in columns)]
        for source in ("rois", "maskpool", "crops")
        for kind in ("thing", "stuff")
    ]
    return str(tabulate(rows, ["", *columns], "pipe", floatfmt=".2f"))
