"""CLIP embeddings of masked crops, the second stage of two-stage systems."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from clipdense.clip import ClipModel
from clipdense.clip.mask_prompts import MaskPrompts
from clipdense.clip.model import PRECISIONS
from clipdense.regions import CropRule, get_crop_rule
from clipdense.regions.crops import crop_masks
from clipdense.regions.lazy_maps import LazyMaps

__all__ = ["RegionEncoder", "cosine_logits"]

_PART = 2**28  # bytes of the masks of a large image that are cropped at a time


class RegionEncoder(nn.Module):
    """CLIP image tower over the crops of mask proposals (OVSeg, Liang et al., CVPR 2023, section 3).

    Attributes:
        clip: The CLIP, whose text tower is not used.
        mask_prompts: Learned tokens that replace the patches outside a mask; None: CLIP sees plain crops.
        rule: How masks become crops.
        batch_size: Crops per forward.
        precision: Autocast dtype of CLIP's forward: "fp32" (no autocast), "fp16" or "bf16". Embeddings are
            float32.
    """

    def __init__(
        self,
        clip: ClipModel,
        rule: str | CropRule = "ovseg",
        *,
        mask_prompts: MaskPrompts | None = None,
        use_mask_prompts: bool = True,
        batch_size: int = 64,
        precision: str = "fp32",
        compile: bool = False,
    ) -> None:
        """
        Args:
            clip: See the class.
            rule: A `CropRule` or its name.
            mask_prompts: See the class.
            use_mask_prompts: False ignores the mask prompts but keeps them in the state.
            batch_size: See the class.
            precision: See the class.
            compile: Run CLIP through `torch.compile`, once for all numbers of crops.

        Raises:
            ValueError: If the rule or precision is unknown, CLIP's images are not square, or mask prompts are
                given for a tower that is not a ViT.
        """
        super().__init__()
        height, width = clip.image_size
        if height != width:
            raise ValueError(f"'{clip.name}' takes images of {height} x {width}; crops are squares")
        if mask_prompts is not None:
            mask_prompts.check(clip.visual)
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision '{precision}'; known: {', '.join(PRECISIONS)}")
        self.clip, self.mask_prompts = clip, mask_prompts
        self.rule = get_crop_rule(rule)
        self.use_mask_prompts = use_mask_prompts
        self.batch_size = batch_size
        self.precision = precision
        self._encode = torch.compile(self.encode, dynamic=True) if compile else self.encode

    @property
    def prompted(self) -> bool:
        """Whether mask prompts are present and enabled."""
        return self.mask_prompts is not None and self.use_mask_prompts

    def encode(self, regions: Tensor, region_masks: Tensor | None) -> Tensor:
        """Embed normalised crops.

        Args:
            regions: (n, 3, S, S).
            region_masks: (n, 1, S, S), 0 or 1; used by mask prompts only.

        Returns:
            (n, D), not L2-normalised.
        """
        if not self.prompted:
            return self.clip.encode_image(regions)
        assert self.mask_prompts is not None and region_masks is not None
        embeddings: Tensor = self.mask_prompts(self.clip.visual, regions, region_masks)
        return embeddings

    def forward(
        self, image: Tensor, masks: Tensor | LazyMaps, query_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed the masks of one image; equal masks share one CLIP forward.

        Masks of large images are cropped a few at a time, and only equal masks among these share a forward.

        Args:
            image: (3, h, w) RGB, 0 .. 255.
            masks: (Q, H, W) at the image's size or padded right and below, values that the rule's threshold
                applies to.
            query_mask: (Q,) bool, the masks to embed; None: all.

        Returns:
            Embeddings (V, D) of the valid masks in their order, not L2-normalised; valid (Q,) bool, the masks
            that have a crop and are in `query_mask`.
        """
        lazy = LazyMaps.of(masks)
        chosen = lazy if query_mask is None else lazy[query_mask]
        parts = [self._embed(image, chosen[part].compute()) for part in chosen.parts(part=_PART)]
        embeddings, valid = (torch.cat(results) for results in zip(*parts, strict=True))
        return embeddings, valid if query_mask is None else query_mask.masked_scatter(query_mask, valid)

    def _embed(self, image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the valid ones of a few masks -> embeddings (V, D), valid (Q,)."""
        crops = crop_masks(
            image,
            masks,
            self.rule,
            size=self.clip.image_size[0],
            pixel_mean=self.clip.pixel_mean,
            pixel_std=self.clip.pixel_std,
        )
        embeddings = [image.new_zeros(0, self.clip.embed_dim, dtype=crops.image.dtype)]
        for part in crops.parts(self.batch_size):
            inside = crops.region_masks(part) if self.prompted else None
            regions = crops.regions(part)
            with self._autocast(regions.device.type):
                embeddings.append(self._encode(regions, inside).float())
        return torch.cat(embeddings)[crops.index], crops.valid

    def _autocast(self, device: str) -> AbstractContextManager[object]:
        return (
            nullcontext() if self.precision == "fp32" else torch.autocast(device, PRECISIONS[self.precision])
        )


def cosine_logits(embeddings: Tensor, text: Tensor, scale: float | Tensor = 100.0) -> Tensor:
    """Compute scaled cosine similarities.

    Args:
        embeddings: (n, D), any length.
        text: (K, D), any length.
        scale: Factor of the cosines, CLIP's exp(logit_scale).

    Returns:
        (n, K) float32.
    """
    unit = nn.functional.normalize(embeddings.float(), dim=-1)
    return scale * unit @ nn.functional.normalize(text.float(), dim=-1).T
