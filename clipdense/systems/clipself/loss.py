"""The losses: cosine distillation (Wu et al., CLIPSelf, Sec. 3) and RegionCLIP's region-noun loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.engine.distributed import share_rows

from detectron2.utils import comm

__all__ = ["concept_loss", "cosine_loss", "sample_concepts"]


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine, mean over the regions of all processes.

    Args:
        student, teacher: (n, D), of any length; n may differ between processes.

    Returns:
        Scalar: the sum over this process's regions, divided by the mean number of regions a process, so that
        its average over processes is the mean over the global batch. (The released code averages the means of
        processes.)
    """
    cosine = F.cosine_similarity(student.float(), teacher.float(), dim=1)
    return (1 - cosine).sum() / _regions_per_process(student)


def concept_loss(features: Tensor, concepts: Tensor, embeddings: Tensor, scale: Tensor) -> Tensor:
    """Binary cross-entropy of every region with every concept, summed over concepts, mean over regions.

    The released baseline of CLIPSelf after RegionCLIP (Zhong et al., CVPR 2022).

    Args:
        features: (n, D) unit region features.
        concepts: (n,) row of each region's concept in ``embeddings``.
        embeddings: (K, D) unit embeddings of the sampled concepts.
        scale: temperature exp(logit_scale); gets no gradient.
    """
    logits = scale.detach() * (features.float() @ embeddings.float().T)
    targets = F.one_hot(concepts, len(embeddings)).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return loss / _regions_per_process(features)


def sample_concepts(present: Tensor, total: int, count: int) -> Tensor:
    """Federated sampling: all concepts of a batch, and others at random, up to ``count`` together.

    Args:
        present: (n,) concept of each region.
        total: number of concepts that there are.
        count: at least this many are returned, if there are; all of ``present`` in any case.

    Returns:
        Distinct ids: those that are present, sorted, then the others.
    """
    found = present.unique()
    free = torch.ones(total, dtype=torch.bool, device=present.device)
    free[found] = False
    others = free.nonzero().flatten()
    order = torch.randperm(len(others))[: max(0, count - len(found))].to(present.device)
    return torch.cat([found, others[order]])


def _regions_per_process(rows: Tensor) -> Tensor | int:
    """The mean number of rows over processes, at least 1."""
    if comm.get_world_size() == 1:
        return max(1, len(rows))
    counts = share_rows(torch.tensor([float(len(rows))], device=rows.device))
    return counts.mean().clamp(min=1)
