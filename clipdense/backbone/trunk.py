"""Base class of trunks: named output maps, frozen stages, frozen norms."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from detectron2.config import CfgNode as CN
from detectron2.config.defaults import _C as DETECTRON2_DEFAULTS
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone

logger = logging.getLogger(__name__)

NUM_STAGES = 5
SCORE = "score"
"""Name of the score map among a backbone's outputs; pyramids pass it on."""
JOINT = "joint"
"""Name of the map in CLIP's joint space, or of the input of its region pooling; evaluation only."""


def feature_name(stride: int) -> str:
    """Return Detectron2's name of a map: stride 4 -> "res2", 16 -> "res4"; others: nearest power of two."""
    return f"res{max(round(math.log2(stride)), 0)}"


class Trunk(Backbone):
    """A backbone whose first stages can be frozen.

    Stages are counted as in Detectron2's ResNet: 1 is the stem (patch embedding and position table of a ViT),
    2 to 5 are the stages that end in res2 to res5 (of a ViT: the four quarters of its blocks). Frozen stages
    have no trainable parameters, stay in evaluation mode and have constant norms. A completely frozen trunk
    runs without autograd: it keeps no activations, and its outputs are constants even if the input requires
    a gradient.

    Subclasses create their modules, implement :meth:`stages` and :meth:`features`, and call :meth:`_freeze`
    last.

    Attributes:
        pixels: conversion of the input to the RGB pixels that the modules take.
    """

    def __init__(self, outputs: Mapping[str, ShapeSpec], pixels: PixelConversion | None = None) -> None:
        """
        Args:
            outputs: channels and stride of every map, by name, from fine to coarse.
            pixels: conversion of the input; None: images are RGB and normalised as the trunk needs them.
        """
        super().__init__()
        self.pixels = pixels if pixels is not None else PixelConversion()
        self._outputs = dict(outputs)
        self._freeze_at = 0

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        """Return the modules and parameters of each of the five stages, all that :meth:`features` uses."""
        raise NotImplementedError

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Map RGB images (B, 3, H, W), normalised for the trunk, to maps (B, C, h, w) by name."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (B, 3, H, W) to maps (B, C, h, w) by name, from fine to coarse."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.features(self.pixels(images))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every map, by name."""
        return dict(self._outputs)

    @property
    def frozen(self) -> bool:
        """Whether the trunk has no trainable parameter."""
        return not any(p.requires_grad for p in self.parameters())

    def train(self, mode: bool = True) -> Trunk:
        super().train(mode and not self.frozen)
        for stage in self.stages()[: self._freeze_at]:
            for part in stage:
                if isinstance(part, nn.Module):
                    part.eval()
        return self

    def _freeze(self, freeze_at: int, norm: str) -> None:
        """Freeze the first stages and what belongs to no stage.

        Args:
            freeze_at: number of stages, in 0..5.
            norm: "BN", or "FrozenBN": every batch norm of the trunk becomes constant.

        Raises:
            ValueError: If ``freeze_at`` or ``norm`` is out of range.
        """
        if not 0 <= freeze_at <= NUM_STAGES:
            raise ValueError(f"MODEL.BACKBONE.FREEZE_AT must lie in 0..{NUM_STAGES}, not {freeze_at}")
        if norm not in ("BN", "FrozenBN"):
            raise ValueError(f"MODEL.TRUNK.NORM must be BN or FrozenBN, not {norm!r}")
        if norm == "FrozenBN":
            freeze_batch_norm_2d(self)
        trainable = {
            id(p)
            for stage in self.stages()[freeze_at:]
            for part in stage
            for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())
        }
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trainable and parameter.requires_grad)
        self._freeze_at = freeze_at
        self.train(self.training)


class PixelConversion(nn.Module):
    """Conversion of the pixels that a meta-architecture has normalised to those that a trunk was trained on.

    Meta-architectures normalise images in the channel order of INPUT.FORMAT, while CLIP and timm models take
    RGB.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self, *, input_format: str = "RGB", scale: Sequence[float] = (), shift: Sequence[float] = ()
    ) -> None:
        """
        Args:
            input_format: order of the channels of the input, "RGB" or "BGR".
            scale, shift: factor and summand of each channel, RGB, which are applied after the channels are in
                order; empty: pixels are normalised already.

        Raises:
            ValueError: If the format is neither RGB nor BGR.
        """
        super().__init__()
        if input_format not in ("RGB", "BGR"):
            raise ValueError(
                f"INPUT.FORMAT is {input_format!r}, but CLIP and timm backbones take colour images: set it "
                "to RGB or BGR"
            )
        self.input_format = input_format
        for name, values in (("scale", scale), ("shift", shift)):
            self.register_buffer(
                name, torch.tensor(values).view(1, 3, 1, 1) if len(values) else None, persistent=False
            )

    @classmethod
    def from_config(cls, cfg: CN, name: str, mean: Sequence[float], std: Sequence[float]) -> PixelConversion:
        """Build the conversion for a config; warn of pixel statistics that are not the trunk's.

        Detectron2's default MODEL.PIXEL_MEAN and PIXEL_STD belong to its own ResNets. A config that still has
        them is converted to the trunk's statistics; any other values count as set by the user.

        Args:
            cfg: a config with MODEL.PIXEL_MEAN, MODEL.PIXEL_STD (0..255) and INPUT.FORMAT.
            name: name of the trunk in log lines.
            mean, std: the trunk's statistics, RGB, for pixels in 0..1.
        """
        fmt, keys, default = cfg.INPUT.FORMAT, cfg.MODEL, DETECTRON2_DEFAULTS.MODEL
        unset = all(list(keys[key]) == list(default[key]) for key in ("PIXEL_MEAN", "PIXEL_STD"))
        if not unset or fmt not in ("RGB", "BGR"):
            check_pixel_statistics(cfg, name, mean, std)
            return cls(input_format=fmt)
        order = slice(None, None, -1 if fmt == "BGR" else 1)
        given_mean, given_std = keys.PIXEL_MEAN[order], keys.PIXEL_STD[order]
        scale = [given / (255 * own) for given, own in zip(given_std, std, strict=True)]
        shift = [(x - 255 * m) / (255 * s) for x, m, s in zip(given_mean, mean, std, strict=True)]
        logger.info("%s: pixels are normalised again, as MODEL.PIXEL_MEAN and PIXEL_STD are not set.", name)
        return cls(input_format=fmt, scale=scale, shift=shift)

    def forward(self, images: Tensor) -> Tensor:
        """Convert normalised images (B, 3, H, W)."""
        if self.input_format == "BGR":
            images = images.flip(1)
        if self.scale is None or self.shift is None:
            return images
        return images * self.scale + self.shift


def check_pixel_statistics(cfg: CN, name: str, mean: Sequence[float], std: Sequence[float]) -> bool:
    """Compare the pixel statistics of a config with the trunk's; log a warning if they differ.

    Args:
        cfg: a config with MODEL.PIXEL_MEAN, MODEL.PIXEL_STD (0..255) and INPUT.FORMAT.
        name: name of the trunk in the warning.
        mean, std: the trunk's statistics, RGB, for pixels in 0..1.

    Returns:
        Whether they agree.
    """
    fmt: str = cfg.INPUT.FORMAT
    order = slice(None, None, -1) if fmt == "BGR" else slice(None)
    expected = {"PIXEL_MEAN": [255 * x for x in mean][order], "PIXEL_STD": [255 * x for x in std][order]}
    fits = fmt in ("RGB", "BGR") and all(
        len(cfg.MODEL[key]) == len(value)
        and all(abs(a - b) < 0.5 for a, b in zip(cfg.MODEL[key], value, strict=True))
        for key, value in expected.items()
    )
    if not fits:
        advice: dict[str, Any] = {key: [round(x, 3) for x in value] for key, value in expected.items()}
        logger.warning(
            "Pixel statistics differ from the trunk's: set MODEL.PIXEL_MEAN %s and MODEL.PIXEL_STD %s, on "
            "which %s was trained, in the order of INPUT.FORMAT %s; the config has %s and %s. Ignore this if "
            "intentional.",
            advice["PIXEL_MEAN"],
            advice["PIXEL_STD"],
            name,
            fmt,
            list(cfg.MODEL.PIXEL_MEAN),
            list(cfg.MODEL.PIXEL_STD),
        )
    return fits
