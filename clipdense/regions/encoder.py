"""The CLIP branch of two-stage systems: embeddings of masked crops."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from clipdense.clip import ClipModel
from clipdense.clip.mask_prompts import MaskPrompts
from clipdense.clip.model import PRECISIONS
from clipdense.clip.towers import TransformerTower
from clipdense.regions import CropRule, get_crop_rule
from clipdense.regions.crops import crop_masks

__all__ = ["RegionEncoder", "cosine_logits"]


class RegionEncoder(nn.Module):
    """CLIP's embeddings of what masks show, one crop a mask (OVSeg, Liang et al., CVPR 2023, section 3).

    Attributes:
        clip: the CLIP; its text tower is not used.
        mask_prompts: tuned tokens in place of the patches outside a mask; None: CLIP sees the crops alone.
        rule: how masks become crops.
        batch_size: crops a forward.
        precision: "fp32", or "fp16" or "bf16", in which autocast runs CLIP; embeddings are float32.
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
            use_mask_prompts: False leaves them out, though they are in the state.
            compile: let `torch.compile` fuse CLIP's operations, once for all numbers of crops.

        Raises:
            ValueError: an unknown rule or precision, a CLIP whose images are not square, or mask prompts for
                a tower that is no ViT.
        """
        super().__init__()
        height, width = clip.image_size
        if height != width:
            raise ValueError(f"'{clip.name}' takes images of {height} x {width}; crops are squares")
        if mask_prompts is not None and not isinstance(clip.visual, TransformerTower):
            raise clip.visual.cannot("mask prompts", "only ViTs have tokens")
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
        """Whether there are mask prompts that are used."""
        return self.mask_prompts is not None and self.use_mask_prompts

    def encode(self, regions: Tensor, region_masks: Tensor | None) -> Tensor:
        """Normalised crops (n, 3, S, S) and, where mask prompts are used, their masks (n, 1, S, S) ->
        embeddings (n, D), not L2-normalised.
        """
        if not self.prompted:
            return self.clip.encode_image(regions)
        assert self.mask_prompts is not None and region_masks is not None
        embeddings: Tensor = self.mask_prompts(self.clip.visual, regions, region_masks)
        return embeddings

    def forward(
        self, image: Tensor, masks: Tensor, query_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed one image's masks; a crop goes through CLIP once, however many masks are equal.

        Args:
            image: (3, h, w) RGB, 0 .. 255.
            masks: (Q, H, W) at the image's size, or padded right and below; what the rule's threshold is for.
            query_mask: (Q,) bool, the masks to embed; None: all.

        Returns:
            (V, D) embeddings of the valid masks in their order, not L2-normalised; (Q,) bool, which are
            valid and in `query_mask`.
        """
        crops = crop_masks(
            image,
            masks if query_mask is None else masks[query_mask],
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
        valid = crops.valid if query_mask is None else query_mask.masked_scatter(query_mask, crops.valid)
        return torch.cat(embeddings)[crops.index], valid

    def _autocast(self, device: str) -> AbstractContextManager[object]:
        return (
            nullcontext() if self.precision == "fp32" else torch.autocast(device, PRECISIONS[self.precision])
        )


def cosine_logits(embeddings: Tensor, text: Tensor, scale: float | Tensor = 100.0) -> Tensor:
    """scale cos(embeddings (n, D), text (K, D)) -> (n, K), in float32."""
    unit = nn.functional.normalize(embeddings.float(), dim=-1)
    return scale * unit @ nn.functional.normalize(text.float(), dim=-1).T
