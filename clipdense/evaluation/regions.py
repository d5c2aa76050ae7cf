"""How well a CLIP names regions: on image crops, and on its dense features pooled over the same boxes.

The measure of CLIPSelf (Wu et al., ICLR 2024, Sec. 3): ground-truth boxes are classified by the text
embeddings, once from a crop of the image and once from RoIAlign on the dense map. The gap between the
two is what dense CLIP methods work on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clipdense.clip import ClipModel, Want
from clipdense.data.image import read_image, read_labels
from clipdense.regions import pool_boxes

__all__ = ["Region", "RegionAccuracy", "crop_region", "evaluate_regions", "regions_of"]

MIN_STUFF_SIDE = 24
"""Stuff is measured where a square of at least this many pixels holds nothing else."""


@dataclass(frozen=True)
class Region:
    """A labelled box (x0, y0, x1, y1) in pixels; ``label`` counts among the things, or among the stuff
    classes."""

    box: tuple[float, float, float, float]
    label: int
    isthing: bool


def regions_of(
    record: Mapping[str, Any], things: Sequence[int], stuff: Sequence[int], min_visible: float
) -> list[Region]:
    """Regions of a panoptic dataset record.

    Args:
        record: with ``annotations`` (things; crowds are left out) and ``pan_seg_file_name`` and
            ``segments_info`` (stuff).
        things, stuff: contiguous category ids in the order of the labels.
        min_visible: least ``visible`` share of a thing, where the data set has one.

    Returns:
        Thing boxes, and for each stuff segment its largest inscribed square, if that is `MIN_STUFF_SIDE`
        pixels wide.
    """
    regions = []
    for annotation in record.get("annotations", ()):
        x, y, w, h = annotation["bbox"]
        if annotation.get("iscrowd", 0) or annotation.get("visible", 1.0) < min_visible or min(w, h) < 1:
            continue
        regions.append(Region((x, y, x + w, y + h), things.index(annotation["category_id"]), True))
    segments = [s for s in record.get("segments_info", ()) if not s["isthing"] and not s.get("iscrowd", 0)]
    if segments:
        labels = read_labels(record["pan_seg_file_name"])
        for segment in segments:
            square = _inscribed_square(labels == segment["id"])
            if square is not None:
                regions.append(Region(square, stuff.index(segment["category_id"]), False))
    return regions


def _inscribed_square(mask: npt.NDArray[np.bool_]) -> tuple[float, float, float, float] | None:
    """The largest square, by chessboard distance, in a mask: (x0, y0, x1, y1), or None if it is too small."""
    padded = np.pad(mask, 1).astype(np.uint8)
    distance = cv2.distanceTransform(padded, cv2.DIST_C, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    reach = int(distance[y, x]) - 1
    if 2 * reach + 1 < MIN_STUFF_SIDE:
        return None
    return float(x - reach), float(y - reach), float(x + reach + 1), float(y + reach + 1)


def crop_region(
    image: npt.NDArray[np.uint8], region: Region, size: int, enlarge: float = 1.5
) -> npt.NDArray[np.uint8]:
    """The image tower's view of a region alone, as CLIPSelf's teacher sees it (spec 1.3).

    Args:
        image: (H, W, 3) RGB.
        region: a thing's box is enlarged around its centre and clipped to the image, stuff is cut as it is.
        size: side of the result.
        enlarge: factor on a thing's box.

    Returns:
        (size, size, 3): longest side resized to ``size`` (PIL bicubic), centred on black.
    """
    x0, y0, x1, y1 = region.box
    if region.isthing:
        grow = (enlarge - 1) / 2
        x0, x1 = x0 - grow * (x1 - x0), x1 + grow * (x1 - x0)
        y0, y1 = y0 - grow * (y1 - y0), y1 + grow * (y1 - y0)
    height, width = image.shape[:2]
    box = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    crop = Image.fromarray(image).crop(box)  # PIL rounds fractional boxes
    scale = size / max(crop.size)
    sides = max(1, round(crop.width * scale)), max(1, round(crop.height * scale))
    canvas = Image.new("RGB", (size, size))
    canvas.paste(
        crop.resize(sides, Image.Resampling.BICUBIC), ((size - sides[0]) // 2, (size - sides[1]) // 2)
    )
    return np.asarray(canvas)


@dataclass
class RegionAccuracy:
    """Predictions of one kind of region from one source, and their accuracy.

    Args:
        classes: class names.
        groups: name -> classes, e.g. ``{"novel": {...}}``: accuracies of their regions apart.
        attributes: name -> one value a class, e.g. the colour of each: a prediction that has the right
            value counts.
    """

    classes: Sequence[str]
    groups: Mapping[str, frozenset[int]] = field(default_factory=dict)
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)
    ranked: list[list[int]] = field(default_factory=list)

    def add(self, scores: Tensor, labels: Sequence[int]) -> None:
        """Scores (n, K) of regions and their classes."""
        self.ranked.extend(scores.topk(min(5, scores.shape[1])).indices.tolist())
        self.labels.extend(labels)

    def summary(self) -> dict[str, float]:
        """Percentages: ``top1`` over regions; ``macc1`` and ``macc5``, means over the classes that
        occur; ``top1-<attribute>``; ``top1-<group>``; and the number of regions ``n``."""
        labels, ranked = np.array(self.labels, int), np.array(self.ranked, int)
        if not len(labels):
            return {"n": 0.0}
        first, five = ranked[:, 0] == labels, (ranked == labels[:, None]).any(1)
        present = np.unique(labels)
        result = {
            "top1": first.mean(),
            "macc1": np.mean([first[labels == k].mean() for k in present]),
            "macc5": np.mean([five[labels == k].mean() for k in present]),
        }
        for name, values in self.attributes.items():
            table = np.array(values)
            result[f"top1-{name}"] = (table[ranked[:, 0]] == table[labels]).mean()
        for name, members in self.groups.items():
            inside = np.isin(labels, list(members))
            if inside.any():
                result[f"top1-{name}"] = first[inside].mean()
        return {name: 100 * float(value) for name, value in result.items()} | {"n": float(len(labels))}


@torch.inference_mode()
def evaluate_regions(
    clip: ClipModel,
    records: Sequence[Mapping[str, Any]],
    thing_embeddings: Tensor,
    stuff_embeddings: Tensor,
    thing_ids: Sequence[int],
    stuff_ids: Sequence[int],
    accuracy: Mapping[bool, RegionAccuracy],
    *,
    modes: Sequence[str] = ("plain",),
    min_visible: float = 0.0,
    batch_size: int = 64,
) -> dict[str, dict[str, dict[str, float]]]:
    """Classify all regions of a data set from crops and from dense maps of whole images.

    Args:
        clip: the model; crops have its native size, dense maps are computed at image size (cut to whole
            patches).
        records: panoptic dataset records, see `regions_of`.
        thing_embeddings, stuff_embeddings: unit text embeddings (K, D); things compete with things,
            stuff with stuff.
        thing_ids, stuff_ids: contiguous category ids in the order of the embeddings.
        accuracy: by ``isthing``: empty `RegionAccuracy` that say how to summarise.
        modes: dense modes of the image tower.
        min_visible: see `regions_of`.
        batch_size: crops in one forward.

    Returns:
        source ("crop" or "dense/<mode>") -> "things" | "stuff" -> `RegionAccuracy.summary`.
    """
    device = clip.logit_scale.device
    mean = torch.tensor(clip.pixel_mean, device=device).view(3, 1, 1) * 255
    std = torch.tensor(clip.pixel_std, device=device).view(3, 1, 1) * 255
    text = {True: thing_embeddings.to(device), False: stuff_embeddings.to(device)}
    sources = ["crop", *(f"dense/{mode}" for mode in modes)]
    tally = {
        source: {kind: RegionAccuracy(a.classes, a.groups, a.attributes) for kind, a in accuracy.items()}
        for source in sources
    }

    def count(source: str, features: Tensor, regions: Sequence[Region]) -> None:
        unit = F.normalize(features.float(), dim=-1)
        for kind in (True, False):
            chosen = [i for i, r in enumerate(regions) if r.isthing == kind]
            if chosen:
                tally[source][kind].add(unit[chosen] @ text[kind].T, [regions[i].label for i in chosen])

    def crops() -> Iterator[tuple[npt.NDArray[np.uint8], Region]]:
        for record in tqdm(records, desc=clip.name, unit="image", leave=False):
            regions = regions_of(record, thing_ids, stuff_ids, min_visible)
            if not regions:
                continue
            image = read_image(record["file_name"], "RGB")
            pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1).float()
            boxes = torch.tensor([r.box for r in regions], device=device)
            stride = clip.visual.stride
            height, width = (side // stride * stride for side in image.shape[:2])
            whole = (pixels[None, :, :height, :width] - mean) / std
            for mode in modes:
                dense = clip.visual(whole, Want(dense=mode)).dense
                pooled = pool_boxes(dense, [boxes], scale=1 / stride, pooling="clipself")
                count(f"dense/{mode}", pooled, regions)
            yield from ((crop_region(image, r, clip.image_size[0]), r) for r in regions)

    pending: list[tuple[npt.NDArray[np.uint8], Region]] = []

    def flush() -> None:
        if pending:
            batch = torch.from_numpy(np.stack([c for c, _ in pending])).to(device).permute(0, 3, 1, 2).float()
            count("crop", clip.encode_image((batch - mean) / std), [r for _, r in pending])
            pending.clear()

    for item in crops():
        pending.append(item)
        if len(pending) == batch_size:
            flush()
    flush()
    return {
        source: {"things" if kind else "stuff": a.summary() for kind, a in kinds.items()}
        for source, kinds in tally.items()
    }
