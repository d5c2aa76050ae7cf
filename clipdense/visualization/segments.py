"""Convert model outputs to labelled segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["KINDS", "class_labels", "output_kind", "output_segments", "panoptic_segments", "to_array"]

KINDS = {"panoptic": "panoptic_seg", "instances": "instances", "semantic": "sem_seg"}
"""Kind of output -> its key in a model's output. By default the first kind that an output has is shown."""

Output = Mapping[str, Any]


def output_kind(output: Output, kind: str | None = None) -> str:
    """Return the kind of an output to show, a key of `KINDS`.

    Args:
        output: output of a model for one image.
        kind: "panoptic", "instances" or "semantic"; None for the first kind that the output has.

    Raises:
        ValueError: If the output does not have that kind, or none at all.
    """
    available = [name for name, key in KINDS.items() if key in output or f"{key}_labels" in output]
    if not available:
        keys = ", ".join(sorted(output)) or "no key"
        raise ValueError(f"an output with {keys} cannot be drawn; expected {', '.join(KINDS.values())}")
    if kind is not None and kind not in available:
        raise ValueError(f"the model has no {kind} output; available: {', '.join(available)}")
    return kind or available[0]


def class_labels(output: Output) -> npt.NDArray[np.int64]:
    """Return the class of every pixel (H, W) of a semantic output; -1 where all scores are 0."""
    if "sem_seg_labels" in output:
        return np.asarray(to_array(output["sem_seg_labels"]), np.int64)
    scores = torch.as_tensor(output["sem_seg"])
    labels = torch.where((scores != 0).any(dim=0), scores.argmax(dim=0), -1)
    return np.asarray(to_array(labels), np.int64)


def panoptic_segments(
    ids: npt.NDArray[Any], segments: Sequence[Mapping[str, Any]] | None, metadata: Any
) -> list[Mapping[str, Any]]:
    """Return the segments of an id map, as listed or, for None, as Detectron2 encodes them in the ids."""
    if segments is not None:
        return list(segments)
    divisor = metadata.label_divisor
    things = set(metadata.thing_dataset_id_to_contiguous_id.values())
    labels = [label for label in np.unique(ids).tolist() if label >= 0]
    return [{"id": v, "category_id": v // divisor, "isthing": v // divisor in things} for v in labels]


def output_segments(output: Output, kind: str, metadata: Any) -> list[dict[str, Any]]:
    """List the labelled segments of a semantic or panoptic output, largest first.

    Args:
        output: output of a model for one image.
        kind: "panoptic" or "semantic".
        metadata: metadata of the dataset.

    Returns:
        For each segment ``category_id``, ``mask`` (H, W) bool and, if panoptic, ``isthing``.
    """
    if kind == "panoptic":
        ids = to_array(output["panoptic_seg"][0])
        listed = panoptic_segments(ids, output["panoptic_seg"][1], metadata)
        found = [
            {"category_id": s["category_id"], "isthing": bool(s["isthing"]), "mask": ids == s["id"]}
            for s in listed
        ]
    else:
        labels = class_labels(output)
        found = [{"category_id": c, "mask": labels == c} for c in np.unique(labels).tolist() if c >= 0]
    return sorted((s for s in found if s["mask"].any()), key=lambda s: -int(s["mask"].sum()))


def to_array(values: Any) -> npt.NDArray[Any]:
    """Convert a tensor on any device, or any array-like, to an array."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
