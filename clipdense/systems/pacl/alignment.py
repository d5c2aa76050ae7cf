"""PACL's compatibility of images and texts, and its contrastive loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fvcore.nn.distributed import differentiable_all_gather
from torch import Tensor

from detectron2.utils import comm

__all__ = ["patch_alignment", "patch_contrastive_loss"]


def patch_alignment(patches: Tensor, text: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute phi(x, y) = sum_t a_t s_t of every image with every text.

    s_t is the cosine of patch t with the text, and a = softmax_t(s / temperature): the patches of an image
    are pooled anew for each text. As the pooled vector is not normalised again, its inner product with the
    text is this sum, and no pooled vector is computed.

    Args:
        patches: embedded patches (B, T, D), L2-normalised.
        text: (K, D), L2-normalised.
        temperature: of the weights, above 0.

    Returns:
        (B, K), in -1..1.

    Source: Mukhoti et al., PACL, CVPR 2023, section 4, equations 3 to 5.
    """
    s = torch.einsum("btd,kd->bkt", patches, text)
    a = (s / temperature).softmax(2)
    return (a * s).sum(2)


def patch_contrastive_loss(patches: Tensor, text: Tensor, scale: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the symmetric InfoNCE loss of the compatibilities, over all processes.

    Args:
        patches: (B, T, D) of this process's images, L2-normalised.
        text: (B, D) of their captions, L2-normalised, without gradients.
        scale: inverse temperature of the loss.
        temperature: see `patch_alignment`.

    Returns:
        Scalar. Its mean over processes is the loss of the global batch, if B is equal on every process.
    """
    texts = torch.cat(differentiable_all_gather(text))
    phi = scale * patch_alignment(patches, texts, temperature)  # (B, all texts)
    every = torch.cat(differentiable_all_gather(phi))  # (all images, all texts)
    first = len(text) * comm.get_rank()
    target = torch.arange(first, first + len(text), device=phi.device)
    to_text = F.cross_entropy(phi, target)
    to_image = F.cross_entropy(every[:, target].T, target)
    return 0.5 * (to_text + to_image)
