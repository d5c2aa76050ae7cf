"""Contrastive losses over all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["contrastive_loss", "gather_rows", "inner_products", "sigmoid_loss"]

Similarity = Callable[[Tensor, Tensor], Tensor]
"""(n images, m texts) -> (n, m)."""

LogitChunk = Callable[[slice], tuple[Tensor, Tensor | None]]
"""Range of columns -> logits (B, c) and, if there are several positives per row, positives (B, c)."""


class _GatherRows(torch.autograd.Function):
    """Concatenation of the rows of all processes; its gradient is the sum over processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        size, rank = len(gradient) // dist.get_world_size(), dist.get_rank()
        if dist.get_backend() == "nccl":
            own = gradient.new_empty(size, *gradient.shape[1:])
            dist.reduce_scatter_tensor(own, gradient)
            return own
        dist.all_reduce(gradient)
        return gradient[rank * size : (rank + 1) * size]


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows (B, ...) of all processes: (processes * B, ...), in the order of their ranks.

    Args:
        rows: with the same shape in every process.

    Returns:
        The same values in every process. In the backward pass, each process receives the sum of all
        processes' gradients of its rows. ``rows`` themselves if there is one process.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


def inner_products(images: Tensor, texts: Tensor) -> Tensor:
    """Multiply image embeddings (n, D) by text embeddings (m, D): (n, m)."""
    return images @ texts.T


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    similarity: Similarity = inner_products,
    labels: Tensor | None = None,
    matches: Similarity | None = None,
    chunk_size: int = 8192,
) -> Tensor:
    """Compute the symmetric contrastive loss of images and texts over the batches of all processes.

    A process compares its B images with all N texts and its B texts with all N images, in chunks of columns.
    If N exceeds ``chunk_size``, the logits of a chunk are freed after use and computed again in the backward
    pass. Logits are computed in float32, also under autocast.

    Args:
        image: (B, D) unit embeddings of this process's images, or another tensor (B, ...) that ``similarity``
            takes, e.g. the patches of each image. B is equal in all processes.
        text: (B, D) unit embeddings of this process's texts; by default, text i belongs to image i alone.
        scale: factor of the similarities, exp(logit_scale).
        similarity: (images (n, ...), texts (m, ...)) -> similarities (n, m). It must not depend on the other
            rows.
        labels: (B, ...) descriptions of this process's pairs, for ``matches``.
        matches: (labels of n images, labels of m texts) -> (n, m), 1 where an image and a text match, else 0.
            The target of a row is uniform over its matches. None: each row matches its own pair.
        chunk_size: maximum number of columns for which logits are in memory.

    Returns:
        Scalar. Its mean over processes, whose gradient DistributedDataParallel and FSDP compute, is the loss
        of the global batch.

    Raises:
        ValueError: If images and texts differ in number, or only one of ``labels`` and ``matches`` is given.

    Source: Radford et al., CLIP, ICML 2021, Fig. 3; the comparison with all processes' embeddings is
        open_clip's local loss with gradients through the gathered tensors.
    """
    if len(image) != len(text):
        raise ValueError(f"a contrastive loss needs one text per image, got {len(image)} and {len(text)}")
    if (labels is None) != (matches is None):
        raise ValueError("a contrastive loss with several positives takes labels and matches: give both")
    image, text, scale = image.float(), text.float(), scale.float()
    images, texts = gather_rows(image), gather_rows(text)
    all_labels = None if labels is None else gather_rows(labels)

    def to_text(columns: slice) -> tuple[Tensor, Tensor | None]:
        positives = None
        if matches is not None and labels is not None and all_labels is not None:
            positives = matches(labels, all_labels[columns])
        return scale * similarity(image, texts[columns]), positives

    def to_image(columns: slice) -> tuple[Tensor, Tensor | None]:
        positives = None
        if matches is not None and labels is not None and all_labels is not None:
            positives = matches(all_labels[columns], labels).T
        return scale * similarity(images[columns], text).T, positives

    first = dist.get_rank() * len(image) if images is not image else 0
    own = torch.arange(first, first + len(image), device=image.device)
    with torch.autocast(image.device.type, enabled=False):
        losses = [_cross_entropy(part, own, len(images), chunk_size) for part in (to_text, to_image)]
        return 0.5 * (losses[0] + losses[1])


def sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, labels: Tensor, matches: Similarity
) -> Tensor:
    """Compute the sigmoid loss of images and texts over the batches of all processes.

    Each pair is a binary classification, whether image and text match. A process compares its B images with
    all texts.

    Args:
        image: (B, D) unit embeddings of this process's images. B is equal in all processes.
        text: (B, D) unit embeddings of this process's texts.
        scale: factor of the inner products, exp(logit_scale).
        bias: added to the scaled inner products.
        labels: (B, ...) descriptions of this process's pairs, for ``matches``.
        matches: (labels of n images, labels of m texts) -> (n, m), 1 where an image and a text match, else 0.

    Returns:
        Scalar: the sum over texts, averaged over images. Its mean over processes is the loss of the global
        batch.

    Source: Zhai et al., SigLIP, ICCV 2023, section 3.2.
    """
    targets = matches(labels, gather_rows(labels))
    with torch.autocast(image.device.type, enabled=False):
        logits = scale.float() * image.float() @ gather_rows(text.float()).T + bias.float()
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.sum(1).mean()


def _cross_entropy(logits: LogitChunk, own: Tensor, count: int, chunk_size: int) -> Tensor:
    """Compute the mean cross-entropy of rows of logits (B, count) that are available in chunks.

    Args:
        logits: logits and positives of a range of columns.
        own: (B,) the positive column of each row, if ``logits`` returns no positives.
        count: number of columns.
        chunk_size: number of columns to compute at a time.
    """

    def part(start: int) -> Tensor:
        """Return log-sum-exp, sum of positive logits and number of positives of each row: (3, B)."""
        values, positives = logits(slice(start, start + chunk_size))
        if positives is None:
            column = own - start
            inside = (column >= 0) & (column < values.shape[1])
            picked = values.gather(1, column.clamp(0, values.shape[1] - 1)[:, None])[:, 0]
            chosen, number = picked.where(inside, 0.0), inside.to(values.dtype)
        else:
            chosen, number = (positives * values).sum(1), positives.sum(1).to(values.dtype)
        return torch.stack([values.logsumexp(1), chosen, number])

    starts = range(0, count, chunk_size)
    if len(starts) > 1 and torch.is_grad_enabled():
        parts = [checkpoint(part, start, use_reentrant=False, preserve_rng_state=False) for start in starts]
    else:
        parts = [part(start) for start in starts]
    sums = torch.stack(parts)  # (chunks, 3, B)
    normalizer, chosen, number = sums[:, 0].logsumexp(0), sums[:, 1].sum(0), sums[:, 2].sum(0)
    return (normalizer - chosen / number).mean()
