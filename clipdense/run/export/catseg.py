"""Export of CAT-Seg and SED."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.run.export.file_metadata import FileMetadata
from clipdense.run.export.graph import ExportError, Graph, Inputs
from clipdense.systems.catseg import CATSeg
from clipdense.systems.catseg.views import resize

__all__ = ["catseg_graph"]


class CostLogitMaps(nn.Module):
    """Logits of CAT-Seg for whole images, which it resizes to its square."""

    def __init__(self, model: CATSeg) -> None:
        super().__init__()
        self.model = model
        # all classes at once: chunks of a number of classes would fix that number
        self.settings = replace(model.evaluation, max_maps=0)

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) and prompts (K, P, D) to logits (B, K, h, w)."""
        squares = resize(images, self.model.resolution)
        return self.model.aggregate(squares, text, self.settings).logits


def catseg_graph(model: CATSeg, *, fixed_size: tuple[int, int] | None = None) -> Graph:
    """Prepare CAT-Seg or SED for export: logits of whole images, for any classes.

    Args:
        model: the segmentor.
        fixed_size: height and width of the images in pixels; None: any.

    Raises:
        ExportError: If windows or category early rejection are on.
    """
    if model.windows.enabled:
        raise ExportError(
            "windows and the global view of an image are several runs of the file: set "
            "MODEL.CAT_SEG.TEST.WINDOWS.ENABLED False, and average the views yourself"
        )
    if model.evaluation.rejection_topk:
        raise ExportError(
            "category early rejection keeps a number of classes that depends on the image: set "
            "MODEL.CAT_SEG.REJECTION.TOPK 0"
        )
    clip, prompts = model.clip, len(model.prompts)
    dim, limit = clip.embed_dim, getattr(model.aggregator, "max_classes", 0)
    metadata = FileMetadata(
        system=type(model).__name__,
        task="semantic",
        pixel_mean=tuple(255 * value for value in clip.pixel_mean),
        pixel_std=tuple(255 * value for value in clip.pixel_std),
        multiple=model.padding_multiple,
        crop_padding=False,
        min_size=2,
        fixed_size=fixed_size or (),
        dynamic_batch=True,
        dense_mode=model.request.dense or "",
        text="prompts",
        embed_dim=dim,
        prompts=prompts,
        own_text=prompts > 1,
        clip=clip.name,
        templates=model.prompts.templates.name,
        max_classes=limit,
        activation="sigmoid",
        resize_to_input=False,
    )

    def example(height: int, width: int, classes: int) -> Inputs:
        generator = torch.Generator().manual_seed(height * width + classes)
        text = torch.randn(classes, prompts, dim, generator=generator)
        return {
            "images": torch.randn(2, 3, height, width, generator=generator),
            "text": F.normalize(text, dim=2),
        }

    return Graph(
        CostLogitMaps(model).eval(),
        metadata,
        example,
        outputs=("logits",),
        dynamic={"images": (0,) if fixed_size else (0, 2, 3), "text": (0,)},
        size=fixed_size or (96, 128),
    )
