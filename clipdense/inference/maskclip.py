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

__all__ = ["Refinements", "maskclip_cosines", "projected_keys", "refine_cosines"]


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


@torch.no_grad()
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
        pixels: (B, 3, H, W), normalised with the CLIP's statistics; they are padded with zeros, right and
            below, to whole patches.
        text: (K, D), L2-normalised.
        size: (H', W') of the result.
        mode: last-block mode of the dense map.
        refinements: None leaves both out.

    Returns:
        (B, K, H', W'), resized bilinearly.

    Source: MaskCLIP (Zhou et al., ECCV 2022), section 3.2.
    """
    tower, stride = clip.visual, clip.visual.stride
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (0, -width % stride, 0, -height % stride))
    if refinements is None or not (refinements.key_smoothing or refinements.prompt_denoising):
        maps = text_cosines(tower(padded, TowerRequest(dense=mode)).dense, text)
    else:
        if isinstance(tower, TransformerTower):
            history = tower.history(padded)
            dense, keys = tower.dense(history, mode), projected_keys(history)
        else:
            output = tower(padded, TowerRequest(dense=mode, keys=True))
            dense, keys = output.dense, output.keys
        maps = refine_cosines(text_cosines(dense, text), keys, refinements)
    if padded.shape != pixels.shape:
        maps = F.interpolate(maps, padded.shape[-2:], mode="bilinear", align_corners=False)
        maps = maps[..., :height, :width]
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
