"""MaskCLIP's maps of cosines, with its two refinements."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip import ClipModel, TowerRequest
from clipdense.clip.attention import History
from clipdense.clip.towers import TransformerTower
from clipdense.inference.zero_shot import denoise_prompts, smooth_by_keys, text_cosines

__all__ = [
    "DenseMap",
    "Refinements",
    "dense_map",
    "map_cosines",
    "maskclip_cosines",
    "projected_keys",
    "refine_cosines",
]


@dataclass(frozen=True)
class Refinements:
    """MaskCLIP's refinements of the cosines; 0 leaves one out.

    Attributes:
        prompt_denoising: threshold of `denoise_prompts`.
        key_smoothing: threshold of `smooth_by_keys`.
        normalize_tokens: see `smooth_by_keys`.
    """

    prompt_denoising: float = 0.0
    key_smoothing: float = 0.0
    normalize_tokens: bool = False


def refine_cosines(cosines: Tensor, keys: Tensor, settings: Refinements) -> Tensor:
    """Denoise prompts, then smooth by keys, as MaskCLIP does.

    Args:
        cosines: (B, K, h, w).
        keys: (B, C, h, w) of the last attention, see `smooth_by_keys`.
        settings: what is left out.

    Returns:
        (B, K, h, w): cosines, or sums of probabilities after smoothing.
    """
    if settings.prompt_denoising:
        cosines = denoise_prompts(cosines, settings.prompt_denoising)
    if settings.key_smoothing:
        cosines = smooth_by_keys(
            cosines, keys, settings.key_smoothing, normalize_tokens=settings.normalize_tokens
        )
    return cosines


def projected_keys(history: History) -> Tensor:
    """Return the patches' keys (B, C, h, w) of a ViT's last attention, through its output projection."""
    block, stream = history.block, history.stream
    keys = block.out(block.key(block.normed(stream.patches)))
    return keys.transpose(1, 2).unflatten(2, stream.grid)


@dataclass(frozen=True)
class DenseMap:
    """A CLIP's map of a batch of whole images.

    Attributes:
        features: (B, D, h, w) in the joint space, over the padded images; not normalised.
        keys: (B, C, h, w) of the last attention, or None if no refinement needs them.
        size: (H, W) of the images in pixels.
        padded: (H, W) with the padding, right and below.
    """

    features: Tensor
    keys: Tensor | None
    size: tuple[int, int]
    padded: tuple[int, int]

    def resize(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize maps (B, C, h, w) over the padded images bilinearly to maps over the images alone."""
        height, width = self.size
        if self.padded != self.size:
            maps = F.interpolate(maps, self.padded, mode="bilinear", align_corners=False)
            maps = maps[..., :height, :width]
        return F.interpolate(maps, size, mode="bilinear", align_corners=False)


@torch.no_grad()
def dense_map(
    clip: ClipModel, pixels: Tensor, *, mode: str = "value", refinements: Refinements | None = None
) -> DenseMap:
    """Compute a CLIP's map of whole images.

    Args:
        clip: the CLIP, in evaluation mode.
        pixels: (B, 3, H, W), normalised with the CLIP's statistics; they are padded with zeros, right and
            below, to whole patches.
        mode: last-block mode of the dense map.
        refinements: tells whether keys are needed; None: they are not.
    """
    tower, stride = clip.visual, clip.visual.stride
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (0, -width % stride, 0, -height % stride))
    keys: Tensor | None
    if refinements is None or not (refinements.key_smoothing or refinements.prompt_denoising):
        dense, keys = tower(padded, TowerRequest(dense=mode)).dense, None
    elif isinstance(tower, TransformerTower):
        history = tower.history(padded)
        dense, keys = tower.dense(history, mode), projected_keys(history)
    else:
        output = tower(padded, TowerRequest(dense=mode, keys=True))
        dense, keys = output.dense, output.keys
    return DenseMap(dense, keys, (height, width), (padded.shape[2], padded.shape[3]))


@torch.no_grad()
def map_cosines(
    found: DenseMap, text: Tensor, size: tuple[int, int], refinements: Refinements | None = None
) -> Tensor:
    """Compare a map with class names.

    Args:
        found: see `dense_map`.
        text: (K, D), L2-normalised.
        size: (H', W') of the result.
        refinements: those that the map was computed for.

    Returns:
        (B, K, H', W'), resized bilinearly.
    """
    maps = text_cosines(found.features, text)
    if refinements is not None and found.keys is not None:
        maps = refine_cosines(maps, found.keys, refinements)
    return found.resize(maps, size)


def maskclip_cosines(
    clip: ClipModel,
    pixels: Tensor,
    text: Tensor,
    size: tuple[int, int],
    *,
    mode: str = "value",
    refinements: Refinements | None = None,
) -> Tensor:
    """Compare the pixels of whole images with class names.

    Args:
        clip: the CLIP, in evaluation mode.
        pixels: (B, 3, H, W), see `dense_map`.
        text: (K, D), L2-normalised.
        size: (H', W') of the result.
        mode: last-block mode of the dense map.
        refinements: None leaves both out.

    Returns:
        (B, K, H', W'), resized bilinearly.

    Source: MaskCLIP (Zhou et al., ECCV 2022), section 3.2.
    """
    found = dense_map(clip, pixels, mode=mode, refinements=refinements)
    return map_cosines(found, text, size, refinements)
