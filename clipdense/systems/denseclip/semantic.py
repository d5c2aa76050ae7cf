"""DenseCLIP's semantic segmentation, and its baselines without language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clipdense.backbone import SCORE
from clipdense.data.heads import register_head_classes
from clipdense.inference import average_views, semantic_output, slide_windows
from clipdense.regions.lazy_maps import LazyMaps
from clipdense.systems.denseclip.heads import ScoreMapHead
from clipdense.systems.denseclip.meta_arch import (
    LOSS,
    Export,
    PixelTextModel,
    export_without_text_tower,
)

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor
from detectron2.structures import ImageList

__all__ = [
    "DenseCLIPSemanticSegmentor",
    "ScoreMapSegmentor",
    "SemanticInference",
    "WindowedSemanticSegmentor",
]


@dataclass(frozen=True)
class SemanticInference:
    """Settings of semantic inference, ``MODEL.SEMANTIC_SEGMENTOR`` in the config.

    Attributes:
        window: height and width of the sliding windows in pixels; empty: the whole image.
        stride: vertical and horizontal distance of neighbouring windows in pixels, in 1..window.
        batch_size: windows per forward pass.
        memory_limit: MiB of class maps above which they are accumulated in the memory of the CPU.
        scales: factors of the test-time views of an image.
        flip: whether each view is also mirrored.
        pad: whether windows are padded to the divisor of the backbone, instead of losing what is left over.
        max_dense_classes: number of classes above which the output is labels; 0: no limit.
        max_dense_megabytes: the same as the size of the class maps in MiB; 0: no limit.
    """

    window: Sequence[int] = ()
    stride: Sequence[int] = ()
    batch_size: int = 8
    memory_limit: int = 4096
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    pad: bool = True
    max_dense_classes: int = 0
    max_dense_megabytes: int = 0

    def __post_init__(self) -> None:
        if len(self.window) not in (0, 2):
            raise ValueError(
                f"MODEL.SEMANTIC_SEGMENTOR.WINDOW is {list(self.window)}: give height and width, or [] for "
                "the whole image"
            )
        covered = len(self.stride) == len(self.window) and all(
            0 < step <= side for step, side in zip(self.stride, self.window, strict=True)
        )
        if self.window and not covered:
            raise ValueError(
                f"MODEL.SEMANTIC_SEGMENTOR.STRIDE is {list(self.stride)}: give two numbers from 1 to WINDOW "
                f"{list(self.window)}, so that windows leave no gap"
            )
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(
                f"MODEL.SEMANTIC_SEGMENTOR.SCALES must be factors above 0, not {list(self.scales)}"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SemanticInference:
        """Read the settings from ``MODEL.SEMANTIC_SEGMENTOR`` and the limits from ``TEST``."""
        keys = cfg.MODEL.SEMANTIC_SEGMENTOR
        return cls(
            window=tuple(keys.WINDOW),
            stride=tuple(keys.STRIDE),
            batch_size=keys.BATCH_SIZE,
            memory_limit=keys.MEMORY_LIMIT,
            scales=tuple(keys.SCALES),
            flip=keys.FLIP,
            pad=keys.PAD,
            max_dense_classes=cfg.TEST.MAX_DENSE_CLASSES,
            max_dense_megabytes=cfg.TEST.MAX_DENSE_MEGABYTES,
        )


@META_ARCH_REGISTRY.register()
class WindowedSemanticSegmentor(SemanticSegmentor):
    """Detectron2's `SemanticSegmentor` with sliding windows and test-time views.

    With a Semantic FPN on a CLIP or ImageNet trunk, this is the baseline of DenseCLIP.
    """

    @configurable
    def __init__(self, *, inference: SemanticInference | None = None, **kwargs: Any) -> None:
        """
        Args:
            inference: settings of inference; None: the whole image at once.
            kwargs: arguments of `SemanticSegmentor`; the head is a `SemanticHead`.

        Raises:
            ValueError: If the head is not a `SemanticHead`.
        """
        super().__init__(**kwargs)
        if not hasattr(self.sem_seg_head, "layers"):
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.NAME: a {type(self.sem_seg_head).__name__} has no `layers`, which "
                "sliding windows need: use SemanticFPNHead, UPerNetHead, DeepLabHead or ScoreMapHead"
            )
        self.inference = inference or SemanticInference()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments: dict[str, Any] = super().from_config(cfg)
        return arguments | {"inference": SemanticInference.from_config(cfg)}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Return losses in training, else for each image its semantic segmentation.

        Args:
            batched_inputs: Detectron2's inputs, with "sem_seg" (H, W) in training.

        Returns:
            In evaluation a dict for each image: "sem_seg" (K, H, W) at the size "height" x "width" of the
            input, logits, or the mean of probabilities if there are several views; or "sem_seg_labels"
            (H, W) above the limits of `SemanticInference`.
        """
        if not self.training:
            return [self._segment_input(x) for x in batched_inputs]
        images, targets = self.training_batch(batched_inputs)
        features = self.backbone(images)
        _, losses = self.sem_seg_head(features, targets)
        return losses | self.auxiliary_losses(features, batched_inputs, (images.shape[2], images.shape[3]))

    def training_batch(self, batched_inputs: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Normalise, pad and stack training inputs.

        Returns:
            Images (B, 3, H, W), and labels (B, H, W) whose padding is ignored.

        Raises:
            KeyError: If an input has no "sem_seg".
        """
        divisor = self.backbone.size_divisibility
        images = ImageList.from_tensors([self._normalize(x) for x in batched_inputs], divisor).tensor
        for x in batched_inputs:
            if "sem_seg" not in x:
                raise KeyError(
                    f"{x.get('file_name', 'an image')} has no 'sem_seg': train on a dataset of label maps"
                )
        labels = [x["sem_seg"].to(self.device) for x in batched_inputs]
        targets = ImageList.from_tensors(labels, divisor, self.sem_seg_head.ignore_value).tensor
        return images, targets

    def auxiliary_losses(
        self, features: dict[str, Tensor], batched_inputs: list[dict[str, Any]], padded_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Compute further losses from the backbone's maps; none by default.

        Args:
            features: maps by name.
            batched_inputs: Detectron2's inputs.
            padded_size: (H, W) of the batch in pixels.
        """
        return {}

    def backbone_input(self, sample: dict[str, Any]) -> Tensor:
        """Normalise and pad the image of an input, see `WholeImageModel`: (1, 3, H, W)."""
        return self._pad(self._normalize(sample)[None])

    def predict(self, images: Tensor) -> Tensor:
        """Compute the logits of images or windows in one forward pass.

        Args:
            images: normalised (B, 3, H, W).

        Returns:
            (B, K, h, w) over the images, of any size.
        """
        height, width = images.shape[-2:]
        padded = self._pad(images)
        logits: Tensor = self.sem_seg_head.layers(self.backbone(padded))
        if padded.shape == images.shape:
            return logits
        logits = F.interpolate(logits, padded.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def segment(self, image: Tensor) -> Tensor:
        """Segment an image by windows, or whole.

        Args:
            image: normalised (1, 3, H, W).

        Returns:
            Logits (1, K, h, w): at the size of the image for windows, of any size for a whole image. Windows
            are averaged where they overlap.
        """
        settings = self.inference
        if not settings.window:
            return self.predict(image)
        return slide_windows(
            self.predict,
            image,
            (settings.window[0], settings.window[1]),
            (settings.stride[0], settings.stride[1]),
            batch_size=settings.batch_size,
            memory_limit=settings.memory_limit * 2**20,
        )

    def _normalize(self, sample: dict[str, Any]) -> Tensor:
        image: Tensor = (sample["image"].to(self.device) - self.pixel_mean) / self.pixel_std
        return image

    def _pad(self, images: Tensor) -> Tensor:
        """Pad images (B, 3, H, W) with zeros, right and below, to the divisor of the backbone."""
        divisor = max(self.backbone.size_divisibility if self.inference.pad else 0, 1)
        return F.pad(images, (0, -images.shape[3] % divisor, 0, -images.shape[2] % divisor))

    def _segment_input(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        """Segment the image of an input at the size that the input states."""
        settings, image = self.inference, self._normalize(sample)[None]
        height, width = image.shape[-2:]
        size = int(sample.get("height", height)), int(sample.get("width", width))
        if settings.flip or tuple(settings.scales) != (1.0,):

            def probabilities(view: Tensor) -> Tensor:
                logits = self.segment(view)
                return F.interpolate(logits, size, mode="bilinear", align_corners=False).softmax(1)

            views = average_views(probabilities, image, scales=settings.scales, flip=settings.flip, size=size)
            maps = LazyMaps.of(views[0])
        else:  # first to the size of the image, as windows are
            maps = LazyMaps.of(self.segment(image)[0]).resize((height, width)).resize(size)
        return semantic_output(
            maps, max_classes=settings.max_dense_classes, max_bytes=settings.max_dense_megabytes * 2**20
        )


@META_ARCH_REGISTRY.register()
class DenseCLIPSemanticSegmentor(PixelTextModel, WindowedSemanticSegmentor):
    """Semantic segmentation on a language backbone, with the auxiliary pixel-text loss.

    Source: Rao et al., DenseCLIP, CVPR 2022, section 3.4.
    """

    def auxiliary_losses(
        self, features: dict[str, Tensor], batched_inputs: list[dict[str, Any]], padded_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Return "loss_pixel_text"."""
        return {LOSS: self.pixel_text_loss(features[SCORE], batched_inputs, padded_size)}


@META_ARCH_REGISTRY.register()
class ScoreMapSegmentor(WindowedSemanticSegmentor):
    """Segmentation by the score map alone, for any class names.

    No weight depends on the number of classes: a model that was trained on the classes of one dataset
    segments those of another, which the config names.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """
        Args:
            kwargs: arguments of `WindowedSemanticSegmentor`; the head is a `ScoreMapHead`.

        Raises:
            ValueError: If the model has another head.
        """
        super().__init__(**kwargs)
        if not isinstance(self.sem_seg_head, ScoreMapHead):
            raise ValueError(
                "ScoreMapSegmentor has no decoder: set MODEL.SEM_SEG_HEAD.NAME ScoreMapHead, or "
                "MODEL.META_ARCHITECTURE DenseCLIPSemanticSegmentor"
            )

    def export_state(self) -> Export:
        """See `export_without_text_tower`; the exported model has the classes of this one."""
        return export_without_text_tower(self)


register_head_classes("WindowedSemanticSegmentor", base="SemanticSegmentor")
register_head_classes("DenseCLIPSemanticSegmentor", base="SemanticSegmentor")
