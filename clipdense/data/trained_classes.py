"""Classes of closed-vocabulary weights against those of a dataset, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from clipdense.clip.vocabulary import canonical
from clipdense.data.checks import dataset_classes
from clipdense.data.heads import config_value, head_classes

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

__all__ = ["class_mapping", "map_classes", "trained_classes"]

_MAPPED_BY = {"thing": ("coco", "lvis"), "stuff": ("sem_seg",)}


def trained_classes(metadata: Mapping[str, Any], kind: str) -> list[str] | None:
    """Return the class names that a weight file was trained on; None if it does not list them.

    Args:
        metadata: of the file: ``thing_classes`` and ``stuff_classes``, as training checkpoints have them, or
            ``options.classes``, as older converted files have them.
        kind: "thing" or "stuff".
    """
    names = metadata.get(f"{kind}_classes") or metadata.get("options", {}).get("classes")
    return list(names) if names else None


def class_mapping(cfg: CfgNode, metadata: Mapping[str, Any], dataset: str, source: str) -> list[int] | None:
    """Compare the classes of closed-vocabulary heads with those of a dataset.

    Args:
        cfg: config of the model.
        metadata: of the weight file, see `trained_classes`; empty if it is not known.
        dataset: name of a registered dataset.
        source: the weight file, for the message.

    Returns:
        Class of the model -> class of the dataset, if the dataset has the same names in another order; None
        if the order is the same, or the classes are not known.

    Raises:
        ValueError: If the names differ, a head has another number of classes, or the order differs in a task
            for which outputs cannot be mapped.
    """
    heads = head_classes(cfg)
    mapping: list[int] | None = None
    for head in heads:
        found, trained = dataset_classes(dataset, head.kind), trained_classes(metadata, head.kind)
        count = config_value(cfg, head.key)
        if found is None:
            continue
        if trained is None or len(trained) != count:
            if len(found) != count:
                raise ValueError(
                    f"{head.key} = {count}, but dataset {dataset} has {len(found)} {head.kind} classes "
                    f"({_shown(found)}). Use the dataset that the model was trained on, or train on this one"
                )
            continue
        ours, theirs = [canonical(n) for n in trained], [canonical(n) for n in found]
        if ours == theirs:
            continue
        kind = MetadataCatalog.get(dataset).get("evaluator_type")
        unique = len(set(ours)) == len(ours)
        if (
            sorted(ours) != sorted(theirs)
            or not unique
            or len(heads) > 1
            or kind not in _MAPPED_BY[head.kind]
        ):
            raise ValueError(
                f"{source} was trained for {_shown(trained)}; dataset {dataset} has {_shown(found)}. Use a "
                "dataset with the same classes in the same order, or train on this one"
            )
        mapping = [theirs.index(name) for name in ours]
    return mapping


def map_classes(output: Mapping[str, Any], mapping: Sequence[int]) -> dict[str, Any]:
    """Return a model's output for one image with the class ids of a dataset.

    Args:
        output: ``instances``, ``sem_seg`` (K, h, w) or ``sem_seg_labels`` (h, w; -1: none) are mapped.
        mapping: class of the model -> class of the dataset. Where several classes of the model belong to one
            of the dataset, its map is their maximum.
    """
    result = dict(output)
    table = torch.tensor(mapping)
    if "instances" in result:
        instances = result["instances"]
        instances.pred_classes = table.to(instances.pred_classes.device)[instances.pred_classes]
    if "sem_seg" in result:
        scores = result["sem_seg"]
        merged = scores.new_full((max(mapping) + 1, *scores.shape[1:]), -torch.inf)
        result["sem_seg"] = merged.index_reduce_(0, table.to(scores.device), scores, "amax")
    if "sem_seg_labels" in result:
        labels = result["sem_seg_labels"]
        mapped = table.to(labels.device)[labels.clamp(min=0).long()].to(labels.dtype)
        result["sem_seg_labels"] = torch.where(labels >= 0, mapped, labels)
    return result


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} classes)" if len(names) > 8 else "")
