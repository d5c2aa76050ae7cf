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
    """

    def __init__(self, outputs: Mapping[str, ShapeSpec]) -> None:
        super().__init__()
        self._outputs = dict(outputs)
        self._freeze_at = 0

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        """Return the modules and parameters of each of the five stages, all that :meth:`features` uses."""
        raise NotImplementedError

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (B, 3, H, W) to maps (B, C, h, w) by name."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (B, 3, H, W) to maps (B, C, h, w) by name, from fine to coarse."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.features(images)

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
            "Pixel statistics differ from the trunk's: %s was trained with MODEL.PIXEL_MEAN %s and "
            "PIXEL_STD %s for INPUT.FORMAT %s; the config has %s and %s for %s. Ignore this if intentional.",
            name,
            advice["PIXEL_MEAN"],
            advice["PIXEL_STD"],
            "BGR" if fmt == "BGR" else "RGB",
            list(cfg.MODEL.PIXEL_MEAN),
            list(cfg.MODEL.PIXEL_STD),
            fmt,
        )
    return fits
