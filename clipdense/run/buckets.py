"""Batches of images of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["AHEAD", "predict_buckets", "size_buckets"]

AHEAD = 8
"""Batches that are read ahead, so that images of one size come together."""


def size_buckets(sizes: Sequence[tuple[int, int]], divisibility: int, batch_size: int) -> Iterator[list[int]]:
    """Divide images into batches in which the model pads none to the size of another.

    The output of an image then does not depend on the batch, except for rounding.

    Args:
        sizes: height and width of each image, as the model gets it.
        divisibility: the model pads images to multiples of it; 0 or 1: to the largest of a batch alone.
        batch_size: largest number of images in a batch.

    Yields:
        Positions of the images of a batch.
    """
    step = max(1, divisibility)
    buckets: dict[tuple[int, int], list[int]] = {}
    for i, (height, width) in enumerate(sizes):
        padded = -(-height // step) * step, -(-width // step) * step
        buckets.setdefault(padded, []).append(i)
    for bucket in buckets.values():
        for start in range(0, len(bucket), batch_size):
            yield bucket[start : start + batch_size]


def predict_buckets(
    model: Any,
    samples: Sequence[dict[str, Any]],
    batch_size: int,
    predict: Callable[[list[dict[str, Any]]], Sequence[Any]],
) -> list[Any]:
    """Predict on images of any sizes, in batches of one padded size; return the outputs in their order.

    Args:
        model: Detectron2's model; its ``size_divisibility``, or that of its backbone, determines the padding.
        samples: Detectron2's input dicts, with ``image`` (3, h, w).
        batch_size: largest number of images in a batch.
        predict: from the samples of a batch to their outputs.
    """
    owners = model, getattr(model, "backbone", None)
    divisibility = max(int(getattr(owner, "size_divisibility", 0) or 0) for owner in owners)
    sizes = [(int(sample["image"].shape[-2]), int(sample["image"].shape[-1])) for sample in samples]
    outputs: list[Any] = [None] * len(samples)
    for bucket in size_buckets(sizes, divisibility, batch_size):
        for i, output in zip(bucket, predict([samples[i] for i in bucket]), strict=True):
            outputs[i] = output
    return outputs
