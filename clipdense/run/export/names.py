"""Export of dense CLIP towers and training-free methods: one map of logits per class name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.clip import ClipModel, TowerRequest
from clipdense.clip.attention import get_mode
from clipdense.clip.towers import Tower, TransformerTower
from clipdense.inference import text_cosines
from clipdense.run.export.file_metadata import FileMetadata
from clipdense.run.export.graph import ExportError, Graph, Inputs
from clipdense.systems.training_free.encoder import DenseEncoder
from clipdense.systems.training_free.meta_arch import ScoreSettings, ZeroShotSegmentor

__all__ = ["tower_graph", "zero_shot_graph"]

_KINDS = {
    "resclip": "its second pass follows the paths between all patches of a first segmentation, one by one",
    "trident": "it runs SAM on the image, whose size decides how its windows are spliced",
    "corrclip": "it reads region ids that are not computed from the tensors of the model",
    "lposs": "it solves a sparse linear system over the patches of all windows",
}


class TowerCosines(nn.Module):
    """Cosines of a tower's dense map with class names."""

    def __init__(self, tower: Tower, mode: str, options: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            tower: the image tower.
            mode: mode of its dense map.
            options: of the mode.
        """
        super().__init__()
        self.tower = tower
        self.request = TowerRequest(dense=mode, options=dict(options or {}))

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Compare positions with names.

        Args:
            images: normalised (B, 3, H, W).
            text: (S, D), unit length.

        Returns:
            (B, S, h, w).
        """
        return text_cosines(self.tower(images, self.request).dense, text)


class MethodCosines(nn.Module):
    """Cosines of a training-free method with class names."""

    def __init__(self, encoder: DenseEncoder, scale: float) -> None:
        super().__init__()
        self.encoder, self.scale = encoder, scale

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Compare positions with names; arguments and result as `TowerCosines`."""
        return self.encoder.window_cosines(images, text, self.scale)


def tower_graph(
    clip: ClipModel, mode: str = "plain", *, fixed_size: tuple[int, int] | None = None, templates: str = ""
) -> Graph:
    """Prepare the dense map of a CLIP for export.

    Args:
        clip: the CLIP, with or without its text tower, which stays outside.
        mode: last-block mode of the dense map.
        fixed_size: height and width of the images in pixels; None: any.
        templates: name of the prompt templates that the text is made with, for the metadata.

    Raises:
        ExportError: If the tower has no such mode, or the mode needs more than the image.
    """
    tower = clip.visual
    if mode not in tower.dense_modes:
        why = tower.why_no_dense or f"its modes are {', '.join(tower.dense_modes)}"
        raise ExportError(f"'{clip.name}' has no dense map of mode {mode!r}: {why}")
    if isinstance(tower, TransformerTower) and get_mode(tower.block_mode(mode)).guidance:
        raise ExportError(
            f"mode {mode!r} reads {get_mode(mode).guidance}, which the image alone does not give: choose "
            f"another of {', '.join(name for name in tower.dense_modes if not get_mode(name).guidance)}"
        )
    _check_positions(tower, fixed_size)
    scale = float(clip.logit_scale.detach().exp())
    return _graph(
        TowerCosines(tower, mode),
        clip,
        "ClipModel",
        scale,
        mode,
        templates,
        fixed_size=fixed_size,
        multiple=tower.stride if isinstance(tower, TransformerTower) else 0,
    )


def zero_shot_graph(model: ZeroShotSegmentor, *, fixed_size: tuple[int, int] | None = None) -> Graph:
    """Prepare a training-free segmentor for export: the logits of one window, or of the whole image.

    Windows, softmax and thresholds are left to the caller (`clipdense.run.export.runner`).

    Args:
        model: the segmentor.
        fixed_size: see `tower_graph`; not needed for windows, which all have one size.

    Raises:
        ExportError: If the method or a refinement needs more than the tensors of the image, or has steps that
            depend on their values.
    """
    encoder, settings = model.encoder, model.scores
    clip, windows = encoder.clip, encoder.windows
    if encoder.method.kind in _KINDS:
        raise ExportError(f"method {encoder.name!r} cannot be exported: {_KINDS[encoder.method.kind]}")
    if encoder.features is not None:
        raise ExportError(
            f"method {encoder.name!r} runs a second model on each window (MODEL.ZERO_SHOT.FEATURES), whose "
            "position table treats its native grid unlike all others, so that no single graph serves every "
            "size: choose a method that reads CLIP alone, e.g. MODEL.ZERO_SHOT.METHOD naclip"
        )
    _check_scores(settings)
    _check_positions(clip.visual, fixed_size)
    scale = settings.logit_scale or float(clip.logit_scale.detach().exp())
    return _graph(
        MethodCosines(encoder, scale),
        clip,
        type(model).__name__,
        scale,
        encoder.method.mode,
        "" if model.bank is None else model.bank.templates.name,
        fixed_size=fixed_size,
        score_threshold=settings.prob_threshold,
        window=windows.window,
        window_stride=windows.stride if windows.window else 0,
        multiple=encoder.multiple if encoder.multiple > 1 else 0,
        centred_padding=True,
    )


def _check_scores(settings: ScoreSettings) -> None:
    """Raise ExportError if scores are refined by steps that only the model has."""
    refinements = {
        "PAMR_STEPS": settings.pamr_steps,
        "PIXEL_PROPAGATION": settings.pixel_propagation,
        "SAM.REFINE": settings.sam_refinement,
        "AREA_THRESHOLD": settings.area_threshold,
        "CLASS_THRESHOLD": settings.class_threshold,
    }
    if used := [f"MODEL.ZERO_SHOT.{key}" for key, value in refinements.items() if value]:
        raise ExportError(
            f"{', '.join(used)}: these steps follow the windows and are not part of an exported file; set "
            "them to 0 or False, and apply them to its scores"
        )


def _check_positions(tower: Tower, fixed_size: tuple[int, int] | None) -> None:
    if tower.position_rule == "dino_scale" and fixed_size is None:
        raise ExportError(
            "MODEL.CLIP.POSITION_RULE dino_scale treats the native grid unlike all others, so that no single "
            "graph serves every size: give a fixed size (--size HEIGHT WIDTH)"
        )
    if tower.position_rule == "crop" and fixed_size is None:
        raise ExportError(
            "MODEL.CLIP.POSITION_RULE crop has a largest size: give a fixed size (--size HEIGHT WIDTH)"
        )


def _graph(
    module: nn.Module,
    clip: ClipModel,
    system: str,
    scale: float,
    mode: str,
    templates: str,
    *,
    fixed_size: tuple[int, int] | None,
    **fields: Any,
) -> Graph:
    tower, dim = clip.visual, clip.embed_dim
    metadata = FileMetadata(
        system=system,
        task="semantic",
        pixel_mean=tuple(255 * value for value in clip.pixel_mean),
        pixel_std=tuple(255 * value for value in clip.pixel_std),
        min_size=tower.stride,
        fixed_size=fixed_size or (),
        dynamic_batch=True,
        dense_mode=mode,
        text="names",
        embed_dim=dim,
        clip=clip.name,
        templates=templates,
        logit_scale=scale,
        activation="softmax",
        **fields,
    )

    def example(height: int, width: int, classes: int) -> Inputs:
        generator = torch.Generator().manual_seed(height * width + classes)
        return {
            "images": torch.randn(2, 3, height, width, generator=generator),
            "text": F.normalize(torch.randn(classes, dim, generator=generator), dim=1),
        }

    stride = tower.stride
    # more patches than the neighbours that mode "scclip" compares, whose number then is a constant
    free = max(tower.grid[0] - 1, 5) * stride, max(tower.grid[1] + 1, 7) * stride
    return Graph(
        module.eval(),
        metadata,
        example,
        outputs=("logits",),
        dynamic={"images": (0,) if fixed_size else (0, 2, 3), "text": (0,)},
        size=fixed_size or free,
    )
