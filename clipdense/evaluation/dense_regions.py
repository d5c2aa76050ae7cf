"""How well a dense map classifies the segments of an image, compared with crops.

The evaluation of CLIPSelf (Wu et al., ICLR 2024, Sec. 3 and 4): the segments of a panoptic dataset are
classified by the text embeddings of all its classes, once from a crop of the image, and once from the dense
map of the whole image, pooled by RoIAlign over their boxes and by the mean over their masks. Dense CLIP
methods aim to close the gap between the crops and the dense map.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from clipdense.clip.tables import TextTable
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.image import read_labels
from clipdense.data.validation import id_order, read_coco
from clipdense.evaluation.accuracy import accuracy_by_kind, recall
from clipdense.evaluation.base import Results, TaskEvaluator, sample_image
from clipdense.evaluation.groups import class_attributes, class_groups
from clipdense.evaluation.probes import DenseProbe
from clipdense.evaluation.regions import Regions, crop_regions, find_regions
from clipdense.regions import pool_boxes, pool_masks, resize_masks

from detectron2.data import MetadataCatalog

__all__ = ["DenseRegionEvaluator", "DenseView", "pixel_hits", "pool_regions"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenseView:
    """How the dense features of an image are computed.

    Attributes:
        mode: last-block mode of the image tower; "" selects the probe's default.
        image_size: side in pixels of the square that the image is letterboxed to, a multiple of the tower's
            stride; 0: the longest side of the image, rounded up to a multiple.
        antialias: whether masks are resized to the map with antialiasing. CLIPSelf's numbers are without;
            torchvision enables it by default, which makes small masks several times larger.
    """

    mode: str = ""
    image_size: int = 0
    antialias: bool = False

    def __str__(self) -> str:
        size = str(self.image_size or "native")
        return ",".join(filter(None, (self.mode, size, "antialias" if self.antialias else "")))


def pool_regions(dense: Tensor, regions: Regions, antialias: bool = False) -> tuple[Tensor, Tensor]:
    """Pool the dense map (1, D, g, g) of an image over the boxes and over the masks of its regions.

    Returns:
        L2-normalised embeddings (n, D) of the boxes, and of the masks.
    """
    side = dense.shape[-1]
    masks = resize_masks(regions.masks, side, antialias=antialias)
    scale = side / max(regions.image.shape[:2])
    return (
        pool_boxes(dense, [regions.boxes.to(dense.device)], scale=scale, pooling="clipself"),
        pool_masks(dense, [masks], pooling="clipself"),
    )


def pixel_hits(dense: Tensor, text: Tensor, regions: Regions) -> Tensor:
    """Count the pixels that the dense map of an image classifies correctly.

    Cosines of map positions and classes are resized bilinearly to the image; the highest one decides
    (MaskCLIP, Zhou et al., ECCV 2022).

    Args:
        dense: (1, D, g, g) map of the letterboxed image.
        text: (K, D) unit class embeddings.
        regions: the segments of the image; pixels outside of them do not count.

    Returns:
        (4,) int64: correct pixels and all pixels of things, then of all segments.
    """
    height, width = regions.image.shape[:2]
    scores = torch.einsum("kd,bdhw->bkhw", text.to(dense.device), F.normalize(dense, dim=1))
    scores = F.interpolate(scores, (max(height, width),) * 2, mode="bilinear", align_corners=False)
    predicted = scores[0, :, :height, :width].argmax(0).cpu()
    correct = regions.masks & (predicted == regions.labels[:, None, None])
    hits, sizes = correct.sum((1, 2)), regions.masks.sum((1, 2))
    things = regions.things
    return torch.stack([hits[things].sum(), sizes[things].sum(), hits.sum(), sizes.sum()])


@dataclass(frozen=True)
class _PanopticTruth:
    """Content of a panoptic annotation file.

    Attributes:
        annotations: image id -> annotation.
        classes: category id -> (label, whether the class is a thing); a label is the rank of the id.
        names: K class names in the order of labels.
        vocabulary: the classes with their synonyms.
    """

    annotations: dict[Any, dict[str, Any]]
    classes: dict[Any, tuple[int, bool]]
    names: list[str]
    vocabulary: Vocabulary

    @classmethod
    def read(cls, path: str) -> _PanopticTruth:
        content, report = read_coco(path, "panoptic", image_names_required=False, image_list_required=False)
        report.raise_errors()
        categories = sorted(content["categories"], key=lambda category: id_order(category["id"]))
        return cls(
            {annotation["image_id"]: annotation for annotation in content["annotations"]},
            {c["id"]: (rank, bool(c["isthing"])) for rank, c in enumerate(categories)},
            [c["name"] for c in categories],
            Vocabulary.from_categories(categories),
        )


class DenseRegionEvaluator(TaskEvaluator):
    """Accuracy of dense features on the segments of a panoptic dataset.

    Features come from a probe; the ground truth comes from the dataset's panoptic files. All classes compete,
    things and stuff together.

    Results are ``{"dense_regions": metrics}``, with several views ``{"dense_regions[<view>]": metrics}``, in
    percent. Things and stuff are separate (see `region_accuracy`; ``class_attributes`` and class groups of
    the metadata are used):

    - ``rois.thing.macc1`` etc.: features of boxes; ``maskpool.*``: features of masks; ``crops.*``: image
      embeddings of crops, the upper bound, which also shows whether image classification still works;
    - ``pixels.thing``, ``pixels.all``: share of the pixels inside things, and inside all segments, that the
      dense map classifies correctly (see `pixel_hits`);
    - ``dense_to_crop_R@1``, ``crop_to_dense_R@1`` and ``@5``: share of box features whose own crop is among
      the nearest of all crops of the dataset, and the reverse;
    - ``thing.n``, ``stuff.n``: numbers of regions.

    Args:
        dataset_name: registered dataset with ``panoptic_json`` and ``panoptic_root`` in its metadata.
        probe: computes the features.
        output_dir: folder for ``dense_regions.json``, the metrics; None writes nothing.
        views: how dense features are computed; each view is measured.
        templates: prompt templates of the class names, see `TextBank`.
        table: file with class embeddings, used instead of the probe's text encoder, see `TextTable.load`;
            rows without names are in the order of category ids.

    Raises:
        FileNotFoundError: If the annotations of the dataset, or the table, are missing.
    """

    def __init__(
        self,
        dataset_name: str,
        probe: DenseProbe,
        output_dir: str | None = None,
        *,
        views: Sequence[DenseView] = (DenseView(),),
        templates: str | Sequence[str] = "single",
        table: str | Path = "",
        distributed: bool = True,
    ) -> None:
        super().__init__(output_dir, distributed=distributed)
        self.views = list(views)
        self._name, self._metadata = dataset_name, MetadataCatalog.get(dataset_name)
        self._probe, self._templates, self._table = probe, templates, table
        self._text: Tensor | None = None

    def reset(self) -> None:
        """Drop all images, and the class embeddings."""
        super().reset()
        self._text = None

    @cached_property
    def _truth(self) -> _PanopticTruth:
        # read at the first image: by then the loader has made sure that the dataset exists
        if not self._metadata.get("panoptic_json"):
            raise ValueError(
                f"dataset '{self._name}' has no panoptic annotations: its metadata lacks panoptic_json"
            )
        return _PanopticTruth.read(self._metadata.panoptic_json)

    def regions(self, sample: Mapping[str, Any]) -> Regions | None:
        """Find the measured segments of an image; None if there are none.

        Args:
            sample: ``image_id``, ``file_name`` and ``image`` (3, H, W) uint8 RGB, at the size of the file.

        Raises:
            ValueError: If the dataset has no panoptic annotations, or none of this image, or if the image
                and its segments differ in size.
        """
        annotation = self._truth.annotations.get(sample["image_id"])
        if annotation is None:
            raise ValueError(
                f"image {sample['image_id']!r} is not in the panoptic annotations of '{self._name}'"
            )
        ids = read_labels(os.path.join(self._metadata.panoptic_root, annotation["file_name"]))
        image = sample_image(sample, ids.shape).permute(1, 2, 0).numpy()
        return find_regions(
            np.ascontiguousarray(image), ids, annotation["segments_info"], self._truth.classes
        )

    def process_image(self, sample: dict[str, Any], output: dict[str, Any]) -> dict[str, Tensor] | None:
        """Compute labels and features of one image's regions; None if it has none."""
        regions = self.regions(sample)
        if self._text is None:
            self._text = self._embed_classes()
        if regions is None:
            return None
        settings = {(view.mode, view.image_size) for view in self.views}
        maps = {setting: self._probe.dense_map(regions.image, *setting) for setting in settings}
        pooled = [pool_regions(maps[v.mode, v.image_size], regions, v.antialias) for v in self.views]
        crops = self._probe.embed_crops(crop_regions(regions, self._probe.crop_size))
        return {
            "pixels": torch.stack(
                [pixel_hits(maps[v.mode, v.image_size], self._text, regions) for v in self.views]
            )[None],
            "labels": regions.labels,
            "things": regions.things,
            "crops": F.normalize(crops.float(), dim=1).cpu(),
            "rois": torch.stack([rois for rois, _ in pooled], 1).cpu(),
            "maskpool": torch.stack([masks for _, masks in pooled], 1).cpu(),
        }

    def score(self, records: list[dict[str, Tensor] | None]) -> Results:
        """Compute all metrics of each view."""
        found = [record for record in records if record is not None]
        if not found:
            logger.warning("%s: no segment has a box of 8 x 8 to 1024 x 1024 pixels", self._name)
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
            hits = merged["pixels"][:, i].sum(0).double()
            if hits[1]:
                metrics["pixels.thing"] = 100 * float(hits[0] / hits[1])
            metrics["pixels.all"] = 100 * float(hits[2] / hits[3])
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
        accuracies = accuracy_by_kind(
            features @ self._text.T,
            labels,
            things,
            class_groups(self._metadata, self._truth.names),
            class_attributes(self._metadata, self._truth.names),
        )
        return {f"{source}.{name}": value for name, value in accuracies.items()}

    def _embed_classes(self) -> Tensor:
        """Embed the classes as L2-normalised vectors (K, D) on the CPU."""
        vocabulary = self._truth.vocabulary
        if self._table:
            return TextTable.load(self._table, vocabulary, dim=self._probe.embed_dim)(vocabulary)
        return self._probe.embed_classes(vocabulary, self._templates)


def _table(metrics: Mapping[str, float]) -> str:
    """Format the main metrics for the log."""
    columns = ("macc1", "macc5", "top1")
    rows = [
        [f"{source}, {kind}", *(metrics.get(f"{source}.{kind}.{name}") for name in columns)]
        for source in ("rois", "maskpool", "crops")
        for kind in ("thing", "stuff")
    ]
    return str(tabulate(rows, ["", *columns], "pipe", floatfmt=".2f"))
