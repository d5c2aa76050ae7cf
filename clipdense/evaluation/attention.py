"""How much the attentions of a ViT's last block stay inside the segment of a patch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip import ClipModel
from clipdense.clip.attention.correlation import ATTENTIONS, attend
from clipdense.clip.towers import TransformerTower
from clipdense.evaluation.base import Results
from clipdense.evaluation.patches import LabelledPatchEvaluator, patch_labels

from detectron2.utils.logger import create_small_table

__all__ = ["AttentionEvaluator", "attention_shares"]

logger = logging.getLogger(__name__)

MEASURED = tuple(name for name in ATTENTIONS if name != "value")
"""Attentions of several tokens; "value" attends to the patch alone."""


def attention_shares(tower: TransformerTower, images: Tensor, cells: Tensor) -> Tensor:
    """Compute the share of the attention of each patch that falls on patches of its class.

    Args:
        tower: image tower, a ViT.
        images: (B, 3, H, W), normalised.
        cells: (B, h, w) class of each patch, -1 for none.

    Returns:
        (A + 1, B, h, w) of the attentions of `MEASURED` in turn, means over the heads, 0 to 1; the last is
        chance, the share of the patches that have the class. Tokens before the patches count for no class.
    """
    history = tower.history(images)
    flat = cells.flatten(1)
    labels = F.one_hot(flat + 1).float()  # (B, N, K + 1)
    own = (flat + 1)[..., None]
    prefix = history.stream.x.shape[1] - flat.shape[1]
    values = F.pad(labels, (0, 0, prefix, 0))[:, None].to(history.stream.x)
    shares = []
    for name in MEASURED:
        weights = attend(history.block, history.stream, name, values).mean(1)[:, prefix:]
        shares.append(weights.gather(2, own)[..., 0] / len(name.replace("+gauss", "").split("+")))
    chance = labels.mean(1, keepdim=True).expand_as(labels).gather(2, own)[..., 0]
    return torch.stack([*shares, chance.to(shares[0])]).unflatten(2, cells.shape[1:])


class AttentionEvaluator(LabelledPatchEvaluator):
    """Share of the attention that falls on the class of the patch, for each attention of the last block.

    Training-free methods choose among these attentions: SCLIP qq+kk, ClearCLIP qq, NACLIP kk+gauss. Results
    are ``{"attention": {"qk", "qq", "kk", "vv", "qq+kk", "kk+gauss", "gauss", "chance"}}`` in percent, means
    over the classes of the means over their labelled patches.

    Args:
        dataset_name: registered dataset whose dicts have ``sem_seg_file_name``.
        clip: CLIP with a ViT, in evaluation mode.
        output_dir: see `TaskEvaluator`.
        window: side in pixels of the windows that are encoded on their own; 0: whole images, resized to
            multiples of the patch size.
        min_share: see `patch_labels`.
        distributed: see `TaskEvaluator`.

    Raises:
        ValueError: If the CLIP has no ViT, or the patch size does not divide the window.
    """

    def __init__(
        self,
        dataset_name: str,
        clip: ClipModel,
        output_dir: str | None = None,
        *,
        window: int = 0,
        min_share: float = 0.9,
        distributed: bool = True,
    ) -> None:
        super().__init__(dataset_name, output_dir, distributed=distributed)
        if not isinstance(clip.visual, TransformerTower):
            raise ValueError(
                f"the attention of a ViT is measured, and this CLIP has a {type(clip.visual).__name__}"
            )
        if window % clip.visual.stride:
            raise ValueError(f"window {window} is not a multiple of the patch size {clip.visual.stride}")
        self._clip, self._tower = clip, clip.visual
        self.window, self.min_share = window, min_share

    @torch.no_grad()
    def process_image(
        self, sample: Mapping[str, Any], output: Mapping[str, Any]
    ) -> tuple[npt.NDArray[np.int64], Tensor]:
        """Return the classes (n,) of the labelled patches of one image, and their shares (A + 1, n)."""
        image, labels = self._read(sample)
        pixels = self._clip.normalize(torch.from_numpy(image).permute(2, 0, 1)[None])
        stride = self._tower.stride
        step = self.window or stride
        height, width = (max(1, round(length / step)) * step for length in labels.shape)
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
        grid = height // stride, width // stride
        cells = torch.from_numpy(patch_labels(labels, grid, self._ignore, self.min_share))
        if self.window:
            pixels, cells = cut(pixels[0], self.window), cut(cells[None], self.window // stride)[:, 0]
        else:
            cells = cells[None]
        kept = cells >= 0
        shares = attention_shares(self._tower, pixels, cells.to(pixels.device))
        return cells[kept].numpy(), shares.float().cpu()[:, kept]

    def score(self, records: list[tuple[npt.NDArray[np.int64], Tensor]]) -> Results:
        """Compute the means over the classes."""
        labels = np.concatenate([labels for labels, _ in records])
        shares = torch.cat([shares for _, shares in records], 1).double().numpy()
        classes, at = np.unique(labels, return_inverse=True)
        means = np.stack([np.bincount(at, row) / np.bincount(at) for row in shares]).reshape(-1, len(classes))
        metrics = dict(zip((*MEASURED, "chance"), (100 * means.mean(1)).tolist(), strict=True))
        logger.info("%s, attention within the class:\n%s", self._name, create_small_table(metrics))
        return Results(attention=metrics)


def cut(image: Tensor, side: int) -> Tensor:
    """Cut an image (C, H, W), a multiple of the side, into windows (n, C, side, side), row-major."""
    windows = image.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return windows.permute(1, 3, 0, 2, 4).flatten(0, 1)
