"""Probes: how an evaluator gets features from a model.

Some evaluators measure features and not predictions. They get them from a probe: images in, features out. A
system provides a probe through a method (`ProvidesDenseProbe`, `ProvidesRegionProbe`), the engine collects
the probes of a model (`model_probes`) and `build_evaluator` hands them to the evaluators that need them. An
evaluator never sees the model, and a model never returns itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip import ClipModel
from clipdense.clip.text import TextBank
from clipdense.clip.towers import Tower
from clipdense.clip.vocabulary import Vocabulary
from clipdense.clip.windows import dense_map, tile_map
from clipdense.data.letterbox import letterbox
from clipdense.regions import RegionEncoder

__all__ = [
    "CLIPProbe",
    "DenseProbe",
    "MapProbe",
    "PatchProbe",
    "Probes",
    "ProvidesDenseProbe",
    "ProvidesPatchProbe",
    "ProvidesRegionProbe",
    "RegionEncoderProbe",
    "RegionProbe",
    "best_dense_mode",
    "model_probes",
]

Uint8 = npt.NDArray[np.uint8]


class DenseProbe(Protocol):
    """Dense map, crop embeddings and class embeddings in one embedding space of D channels."""

    @property
    def crop_size(self) -> int:
        """Side of the square crops in pixels."""

    @property
    def embed_dim(self) -> int:
        """Channels D of the embedding space."""

    def dense_map(self, image: Uint8, mode: str = "", image_size: int = 0) -> Tensor:
        """Compute the dense map of an image that is letterboxed to a square (padded right or bottom).

        Args:
            image: (H, W, 3) uint8 RGB.
            mode: name of the dense mode; "" selects the probe's default.
            image_size: side of the square in pixels; 0: the longest side of the image, rounded up.

        Returns:
            (1, D, g, g) float32, not L2-normalised.
        """

    def embed_crops(self, crops: Uint8) -> Tensor:
        """Embed square crops (n, crop_size, crop_size, 3), uint8 RGB, as (n, D) vectors, not normalised."""

    def embed_classes(self, vocabulary: Vocabulary, templates: str | Sequence[str]) -> Tensor:
        """Embed the class names as L2-normalised vectors (K, D) on the CPU, in the order of the classes."""


class RegionProbe(Protocol):
    """Embeddings of masks and of class names in one embedding space of D channels."""

    def embed_masks(self, image: Tensor, masks: Tensor) -> Tensor:
        """Embed masks of one image.

        Args:
            image: (3, H, W) RGB, range 0 to 255.
            masks: (n, H, W) bool, each with at least one pixel.

        Returns:
            (n, D) in the order of the masks, not L2-normalised, on any device.
        """

    def embed_classes(self, vocabulary: Vocabulary, templates: str | Sequence[str]) -> Tensor:
        """Embed the class names as L2-normalised vectors (K, D) on the CPU, in the order of the classes."""


class PatchProbe(Protocol):
    """Features of the patches of an image, in a space of their own: no class embeddings are needed."""

    def patch_features(self, image: Uint8) -> Tensor:
        """Compute the features of an image (H, W, 3), uint8 RGB.

        Returns:
            (C, h, w) float32 on the CPU, not L2-normalised; its cells divide the image evenly.
        """


@runtime_checkable
class ProvidesPatchProbe(Protocol):
    """A model that `CoherenceEvaluator` and `GroupingEvaluator` can measure."""

    def patch_probe(self) -> PatchProbe:
        """Return a probe of the current weights; it is used in evaluation mode, without gradients."""


@runtime_checkable
class ProvidesDenseProbe(Protocol):
    """A model that `DenseRegionEvaluator` can measure."""

    def dense_probe(self) -> DenseProbe:
        """Return a probe of the current weights; it is used in evaluation mode, without gradients."""


@runtime_checkable
class ProvidesRegionProbe(Protocol):
    """A model that `MaskClassificationEvaluator` can measure."""

    def region_probe(self) -> RegionProbe:
        """Return a probe of the current weights; it is used in evaluation mode, without gradients."""


@dataclass(frozen=True)
class Probes:
    """The probes of one model; None for those that it does not provide."""

    dense: DenseProbe | None = None
    regions: RegionProbe | None = None
    patches: PatchProbe | None = None


def model_probes(model: Any) -> Probes:
    """Collect the probes that a model provides; all are None for a model without any."""
    return Probes(
        dense=model.dense_probe() if isinstance(model, ProvidesDenseProbe) else None,
        regions=model.region_probe() if isinstance(model, ProvidesRegionProbe) else None,
        patches=model.patch_probe() if isinstance(model, ProvidesPatchProbe) else None,
    )


def best_dense_mode(tower: Tower) -> str:
    """Choose the dense mode that suits a tower trained on whole images: without attention in the last block
    if the tower has such a mode, else "plain"."""
    return next((mode for mode in ("clipself", "value") if mode in tower.dense_modes), "plain")


class CLIPProbe:
    """The `DenseProbe` of a CLIP.

    Args:
        clip: in evaluation mode; its text tower is needed for `embed_classes` only.
        batch_size: crops in one forward.
        window: side in pixels of the windows of the dense map, see `clipdense.clip.windows.dense_map`; 0:
            the whole image.
    """

    def __init__(self, clip: ClipModel, batch_size: int = 64, window: int = 0) -> None:
        self.clip = clip
        self.batch_size, self.window = batch_size, window

    @property
    def crop_size(self) -> int:
        """Native image size of the CLIP in pixels."""
        return self.clip.image_size[0]

    @property
    def embed_dim(self) -> int:
        """Channels of the joint image-text space."""
        return self.clip.embed_dim

    @torch.no_grad()
    def dense_map(self, image: Uint8, mode: str = "", image_size: int = 0) -> Tensor:
        """See `DenseProbe.dense_map`; the default mode is `best_dense_mode`.

        Raises:
            ValueError: If the tower's stride does not divide the image size, or the tower lacks the mode.
        """
        tower = self.clip.visual
        size = image_size or math.ceil(max(image.shape[:2]) / tower.stride) * tower.stride
        if size % tower.stride:
            raise ValueError(
                f"image size {size} is not a multiple of the stride {tower.stride} of '{self.clip.name}'"
            )
        pixels = self._normalize(letterbox(image, size)[0][None])
        return dense_map(tower, pixels, mode or best_dense_mode(tower), self.window).float()

    @torch.no_grad()
    def embed_crops(self, crops: Uint8) -> Tensor:
        """See `DenseProbe.embed_crops`."""
        batches = [crops[i : i + self.batch_size] for i in range(0, len(crops), self.batch_size)]
        return torch.cat([self.clip.encode_image(self._normalize(batch)).float() for batch in batches])

    @torch.no_grad()
    def embed_classes(self, vocabulary: Vocabulary, templates: str | Sequence[str]) -> Tensor:
        """See `DenseProbe.embed_classes`."""
        return TextBank(self.clip, templates)(vocabulary).cpu()

    def _normalize(self, images: Uint8) -> Tensor:
        """Convert (B, H, W, 3) uint8 RGB to the (B, 3, H, W) input of the CLIP, on its device."""
        return self.clip.normalize(torch.from_numpy(images).permute(0, 3, 1, 2))


class MapProbe:
    """The `PatchProbe` of a function from normalised images to maps.

    Args:
        encode: from (1, 3, H, W), normalised, to (1, C, H // stride, W // stride).
        normalize: from RGB images (1, 3, H, W), 0..255, to normalised ones on the model's device.
        stride: of the maps, in pixels; images are resized bilinearly to multiples of it.
        window: side in pixels of the windows that are encoded on their own, see `tile_map`; 0: whole images.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        normalize: Callable[[Tensor], Tensor],
        stride: int,
        *,
        window: int = 0,
    ) -> None:
        self.encode, self.normalize = encode, normalize
        self.stride, self.window = stride, window

    @torch.no_grad()
    def patch_features(self, image: Uint8) -> Tensor:
        """See `PatchProbe.patch_features`."""
        pixels = self.normalize(torch.from_numpy(image).permute(2, 0, 1)[None])
        size = [max(1, round(side / self.stride)) * self.stride for side in pixels.shape[-2:]]
        if size != list(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        return tile_map(self.encode, pixels, self.stride, self.window)[0].float().cpu()


class RegionEncoderProbe:
    """The `RegionProbe` of a `RegionEncoder`, which embeds masked crops.

    Args:
        encoder: in evaluation mode; its CLIP needs a text tower.
    """

    def __init__(self, encoder: RegionEncoder) -> None:
        self.encoder = encoder

    @torch.no_grad()
    def embed_masks(self, image: Tensor, masks: Tensor) -> Tensor:
        """See `RegionProbe.embed_masks`."""
        device = self.encoder.clip.logit_scale.device
        embeddings: Tensor = self.encoder(image.to(device), masks.to(device))[0]
        return embeddings

    @torch.no_grad()
    def embed_classes(self, vocabulary: Vocabulary, templates: str | Sequence[str]) -> Tensor:
        """See `RegionProbe.embed_classes`."""
        return TextBank(self.encoder.clip, templates)(vocabulary).cpu()
