"""CLIP embeddings of masked crops, the second stage of two-stage systems."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from clipdense.clip import ClipModel
from clipdense.clip.mask_prompts import MaskPrompts
from clipdense.clip.model import PRECISIONS
from clipdense.regions import CropRule, get_crop_rule
from clipdense.regions.crops import MaskCrops, crop_masks
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
        """Embed the masks of one image; see `embed_images`.

        Args:
            image: (3, h, w) RGB, 0 .. 255.
            masks: (Q, H, W) at the image's size or padded right and below, values that the rule's threshold
                applies to.
            query_mask: (Q,) bool, the masks to embed; None: all.

        Returns:
            Embeddings (V, D) of the valid masks in their order, not L2-normalised; valid (Q,) bool, the masks
            that have a crop and are in `query_mask`.
        """
        return self.embed_images([image], [masks], [query_mask])[0]

    def embed_images(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | LazyMaps],
        query_masks: Sequence[Tensor | None] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Embed the masks of several images, whose crops share the forwards of CLIP.

        Equal masks of an image share one crop. Masks of large images are cropped a few at a time, and only
        equal masks among these share a crop.

        Args:
            images: B images, each (3, h, w) RGB, 0 .. 255.
            masks: (Q, H, W) of each image, see `forward`.
            query_masks: (Q,) of each image, see `forward`; None: all masks.

        Returns:
            The results of `forward` for each image.
        """
        chosen = [None] * len(images) if query_masks is None else list(query_masks)
        crops: list[list[tuple[Tensor, Tensor]]] = [[] for _ in images]  # index and valid of the parts

        def parts() -> Iterator[MaskCrops]:
            for b, (values, query_mask) in enumerate(zip(masks, chosen, strict=True)):
                lazy = LazyMaps.of(values)
                lazy = lazy if query_mask is None else lazy[query_mask]
                for part in lazy.parts(part=_PART):
                    found = self._crop(images[b], lazy[part].compute())
                    crops[b].append((found.index, found.valid))
                    yield found

        rows = iter(self._encode_crops(parts()))
        results = []
        for query_mask, found in zip(chosen, crops, strict=True):
            embeddings = torch.cat([next(rows)[index] for index, _ in found])
            valid = torch.cat([valid for _, valid in found])
            if query_mask is not None:
                valid = query_mask.masked_scatter(query_mask, valid)
            results.append((embeddings, valid))
        return results

    def _crop(self, image: Tensor, masks: Tensor) -> MaskCrops:
        return crop_masks(
            image,
            masks,
            self.rule,
            size=self.clip.image_size[0],
            pixel_mean=self.clip.pixel_mean,
            pixel_std=self.clip.pixel_std,
        )

    def _encode_crops(self, parts: Iterable[MaskCrops]) -> list[Tensor]:
        """Embed crops in full batches, which may hold crops of several parts -> (n, D) of each part."""
        counts: list[int] = []
        embeddings: list[Tensor] = []
        waiting: list[tuple[Tensor, Tensor | None]] = []
        space = self.batch_size
        for crops in parts:
            counts.append(len(crops))
            start = 0
            while start < len(crops):
                part = slice(start, start + space)
                regions = crops.regions(part)
                waiting.append((regions, crops.region_masks(part) if self.prompted else None))
                start, space = start + len(regions), space - len(regions)
                if not space:
                    embeddings.append(self._encode_batch(waiting))
                    waiting, space = [], self.batch_size
        if waiting:
            embeddings.append(self._encode_batch(waiting))
        if not embeddings:
            device = self.clip.logit_scale.device
            embeddings.append(torch.zeros(0, self.clip.embed_dim, device=device))
        return list(torch.split(torch.cat(embeddings), counts))

    def _encode_batch(self, pieces: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Run CLIP on one batch -> (n, D) float32."""
        regions = torch.cat([regions for regions, _ in pieces])
        masks = [inside for _, inside in pieces if inside is not None]
        with self._autocast(regions.device.type):
            return self._encode(regions, torch.cat(masks) if masks else None).float()

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
