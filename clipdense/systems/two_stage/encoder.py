"""The CLIP branch of two-stage systems: embeddings of masked crops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipdense.clip import ClipModel
from clipdense.clip.mask_prompts import MaskPrompts
from clipdense.clip.towers import TransformerTower
from clipdense.regions import CropRule, get_crop_rule
from clipdense.regions.crops import crop_masks

from detectron2.config import CfgNode

__all__ = ["RegionEncoder", "cosine_logits", "crop_rule"]


class RegionEncoder(nn.Module):
    """CLIP's embeddings of what masks show, one crop a mask (OVSeg, Liang et al., CVPR 2023, section 3).

    Attributes:
        clip: the CLIP; its text tower is not used.
        mask_prompts: tuned tokens in place of the patches outside a mask; None: CLIP sees the crops alone.
        rule: how masks become crops.
        batch_size: crops a forward.
    """

    def __init__(
        self,
        clip: ClipModel,
        rule: str | CropRule = "ovseg",
        *,
        mask_prompts: MaskPrompts | None = None,
        use_mask_prompts: bool = True,
        batch_size: int = 64,
    ) -> None:
        """
        Args:
            use_mask_prompts: False leaves them out, though they are in the state.

        Raises:
            ValueError: an unknown rule, a CLIP whose images are not square, or mask prompts for a tower that
                is no ViT.
        """
        super().__init__()
        height, width = clip.image_size
        if height != width:
            raise ValueError(f"'{clip.name}' takes images of {height} x {width}; crops are squares")
        if mask_prompts is not None and not isinstance(clip.visual, TransformerTower):
            raise clip.visual.cannot("mask prompts", "only ViTs have tokens")
        self.clip, self.mask_prompts = clip, mask_prompts
        self.rule = get_crop_rule(rule)
        self.use_mask_prompts = use_mask_prompts
        self.batch_size = batch_size

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

    def forward(self, image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Embed one image's masks; a crop goes through CLIP once, however many masks are equal.

        Args:
            image: (3, h, w) RGB, 0 .. 255.
            masks: (Q, H, W) at the image's size, or padded right and below; what the rule's threshold is for.

        Returns:
            (V, D) embeddings of the valid masks in their order, not L2-normalised; (Q,) bool, which are
            valid.
        """
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
            embeddings.append(self.encode(crops.regions(part), inside))
        return torch.cat(embeddings)[crops.index], crops.valid


def crop_rule(cfg: CfgNode) -> CropRule:
    """The rule that ``MODEL.TWO_STAGE.CROP`` describes."""
    return CropRule(**{key.lower(): value for key, value in cfg.MODEL.TWO_STAGE.CROP.items()})


def cosine_logits(embeddings: Tensor, text: Tensor, scale: float | Tensor = 100.0) -> Tensor:
    """scale cos(embeddings (n, D), text (K, D)) -> (n, K), in float32."""
    unit = nn.functional.normalize(embeddings.float(), dim=-1)
    return scale * unit @ nn.functional.normalize(text.float(), dim=-1).T
