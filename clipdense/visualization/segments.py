"""What a model's output says is where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["KINDS", "class_labels", "output_kind", "output_segments", "panoptic_segments", "to_array"]

KINDS = {"panoptic": "panoptic_seg", "instances": "instances", "semantic": "sem_seg"}
"""What can be shown of an output -> its key; the first that is there by default."""

Output = Mapping[str, Any]


def output_kind(output: Output, wanted: str | None = None) -> str:
    """The key in `KINDS` of what is shown of an output.

    Args:
        wanted: "panoptic", "instances" or "semantic"; None for the first that is there.

    Raises:
        ValueError: it is not there, or nothing is.
    """
    given = [kind for kind, key in KINDS.items() if key in output or f"{key}_labels" in output]
    if not given:
        raise ValueError(f"nothing to draw in an output of {', '.join(sorted(output)) or 'nothing'}")
    if wanted is not None and wanted not in given:
        raise ValueError(f"the model gives nothing {wanted} to show, but: {', '.join(given)}")
    return wanted or given[0]


def class_labels(output: Output) -> npt.NDArray[np.int64]:
    """The class of every pixel (H, W) of a semantic output; -1 where it has none: all its scores are 0."""
    if "sem_seg_labels" in output:
        return np.asarray(to_array(output["sem_seg_labels"]), np.int64)
    scores = torch.as_tensor(output["sem_seg"])
    labels = torch.where((scores != 0).any(dim=0), scores.argmax(dim=0), -1)
    return np.asarray(to_array(labels), np.int64)


def panoptic_segments(
    ids: npt.NDArray[Any], segments: Sequence[Mapping[str, Any]] | None, metadata: Any
) -> list[Mapping[str, Any]]:
    """The segments of an id map: as they are listed, or else as Detectron2 codes them in the ids."""
    if segments is not None:
        return list(segments)
    divisor = metadata.label_divisor
    things = set(metadata.thing_dataset_id_to_contiguous_id.values())
    labels = [label for label in np.unique(ids).tolist() if label >= 0]
    return [{"id": v, "category_id": v // divisor, "isthing": v // divisor in things} for v in labels]


def output_segments(output: Output, kind: str, metadata: Any) -> list[dict[str, Any]]:
    """Parts of the image that a semantic or panoptic output names, the largest first.

    Returns:
        For each ``category_id``, ``mask`` (H, W) bool and, if panoptic, ``isthing``.
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
    """A tensor on any device, or what NumPy takes, as an array."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
