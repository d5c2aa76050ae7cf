"""Losses: cosine distillation (Wu et al., CLIPSelf, ICLR 2024, Sec. 3) and RegionCLIP's region-noun loss."""

import torch
import torch.nn.functional as F
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor

from detectron2.utils import comm

__all__ = ["concept_loss", "cosine_loss", "sample_concepts"]


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - cosine, averaged over the regions of all processes.

    Args:
        student, teacher: (n, D), of any length; n may differ between processes.

    Returns:
        Scalar: the sum over this process's regions, divided by the mean number of regions per process. Its
        average over processes, which DistributedDataParallel takes, is the mean over the global batch. (The
        released code averages the means of the processes.)
    """
    cosine = F.cosine_similarity(student.float(), teacher.float(), dim=1)
    return (1 - cosine).sum() / _regions_per_process(student)


def concept_loss(features: Tensor, concepts: Tensor, embeddings: Tensor, scale: Tensor) -> Tensor:
    """Compute the binary cross-entropy of regions and concepts: sum over concepts, mean over regions.

    The baseline of CLIPSelf's released code after RegionCLIP (Zhong et al., CVPR 2022).

    Args:
        features: (n, D) L2-normalised region features; n may differ between processes.
        concepts: (n,) int64, the row of each region's concept in ``embeddings``.
        embeddings: (K, D) L2-normalised embeddings of the sampled concepts.
        scale: temperature exp(logit_scale); no gradient flows into it.

    Returns:
        Scalar, averaged over processes as `cosine_loss`.
    """
    logits = scale.detach() * (features.float() @ embeddings.float().T)
    targets = F.one_hot(concepts, len(embeddings)).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return loss / _regions_per_process(features)


def sample_concepts(present: Tensor, total: int, count: int) -> Tensor:
    """Sample the concepts of a federated loss: those of the batch, filled up at random.

    Args:
        present: (n,) int64, the concept of each region.
        total: number of concepts that exist.
        count: number of concepts to return; more if more are present, fewer if fewer exist.

    Returns:
        Distinct ids (K,): those present in ascending order, then the others in random order.
    """
    found = present.unique()
    is_free = torch.ones(total, dtype=torch.bool, device=present.device)
    is_free[found] = False
    others = is_free.nonzero().flatten()
    order = torch.randperm(len(others))[: max(0, count - len(found))].to(present.device)
    return torch.cat([found, others[order]])


def _regions_per_process(rows: Tensor) -> Tensor | int:
    """Return the mean number of rows over processes, at least 1."""
    if comm.get_world_size() == 1:
        return max(1, len(rows))
    total = differentiable_all_reduce(torch.tensor(float(len(rows)), device=rows.device))
    return (total / comm.get_world_size()).clamp(min=1)
