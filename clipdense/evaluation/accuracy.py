"""Metrics of classified and retrieved regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["accuracy_by_kind", "recall", "region_accuracy"]


def region_accuracy(
    scores: Tensor,
    labels: Tensor,
    groups: Mapping[str, Sequence[int]] | None = None,
    attributes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """Compute classification accuracies in percent; empty if there are no regions.

    Args:
        scores: (n, K) class scores, higher is better.
        labels: (n,) int64, true classes.
        groups: group name -> classes, e.g. ``{"novel": [...]}``.
        attributes: attribute name -> its value for each class, e.g. the colour; "" for a class without one.

    Returns:
        ``top1``: accuracy over regions. ``macc1`` and ``macc5``: the true class has the best score, or one of
        the five best; mean over the classes that occur. ``top1-<group>``: accuracy over the regions of a
        group, unless it holds none or all of them. ``top1-<attribute>``: the predicted class has the same
        value of the attribute as the true one.
    """
    if not len(labels):
        return {}
    ranked = scores.topk(min(5, scores.shape[1])).indices
    top1, top5 = ranked[:, 0] == labels, (ranked == labels[:, None]).any(1)
    counts = labels.bincount(minlength=scores.shape[1]).double()

    def class_mean(hits: Tensor) -> Tensor:
        return (labels.bincount(hits.double(), minlength=len(counts)) / counts)[counts > 0].mean()

    result = {"top1": top1.double().mean(), "macc1": class_mean(top1), "macc5": class_mean(top5)}
    for name, classes in (groups or {}).items():
        in_group = torch.isin(labels, torch.tensor(classes))
        if in_group.any() and not in_group.all():
            result[f"top1-{name}"] = top1[in_group].double().mean()
    for name, values in (attributes or {}).items():
        table = np.array(values)
        actual, predicted = table[labels.numpy()], table[ranked[:, 0].numpy()]
        if (known := actual != "").any():
            result[f"top1-{name}"] = torch.tensor((actual == predicted)[known].mean())
    return {name: 100 * float(value) for name, value in result.items()}


def accuracy_by_kind(
    scores: Tensor,
    labels: Tensor,
    things: Tensor,
    groups: Mapping[str, Sequence[int]] | None = None,
    attributes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """Compute `region_accuracy` of things and of stuff, as ``thing.<metric>`` and ``stuff.<metric>``.

    Args:
        things: (n,) bool, True for regions of things; the other arguments are those of `region_accuracy`.
    """
    result: dict[str, float] = {}
    for kind, rows in (("thing", things), ("stuff", ~things)):
        accuracy = region_accuracy(scores[rows], labels[rows], groups, attributes)
        result |= {f"{kind}.{name}": value for name, value in accuracy.items()}
    return result


def recall(queries: Tensor, gallery: Tensor, k: int, block: int = 2048) -> float:
    """Compute the percentage of queries whose own row is among the k nearest rows of a gallery.

    Args:
        queries, gallery: (n, D), L2-normalised; row i of the gallery belongs to query i.
        k: number of nearest rows. A tie with the own row counts against the query.
        block: queries compared at a time.
    """
    found = 0
    for start in range(0, len(queries), block):
        similarity = queries[start : start + block] @ gallery.T
        own = similarity.diagonal(start)[:, None]
        found += int(((similarity >= own).sum(1) <= k).sum())
    return 100 * found / len(queries)
