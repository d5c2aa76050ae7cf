"""Export of semantic segmentors with a decoder: Semantic FPN, UPerNet, DenseCLIP and score maps alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clipdense.backbone.score_map import find_language_trunk
from clipdense.run.export.file_metadata import FileMetadata
from clipdense.run.export.graph import ExportError, Graph, Inputs
from clipdense.run.export.language import without_text_tower
from clipdense.systems.denseclip import ScoreMapSegmentor, WindowedSemanticSegmentor

__all__ = ["semantic_graph"]


class DecoderLogits(nn.Module):
    """Logits of a segmentor whose classes are constants."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised and padded images (B, 3, H, W) to logits (B, K, h, w)."""
        head: Any = self.head
        logits: Tensor = head.layers(self.backbone(images))
        return logits


class LanguageLogits(nn.Module):
    """Logits of a segmentor on a language backbone, whose class embeddings are an input."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        """
        Args:
            backbone: contains a `LanguageTrunk` with a text tower or a table, which is not copied.
            head: the decoder.
        """
        super().__init__()
        copied, table = without_text_tower(backbone)
        self.model = DecoderLogits(copied, head)
        self.table = f"backbone.{table}"

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Map normalised and padded images (B, 3, H, W) and classes (K, D) to logits (B, K, h, w)."""
        logits: Tensor = functional_call(self.model, {self.table: text}, (images,))
        return logits


def semantic_graph(
    model: WindowedSemanticSegmentor,
    *,
    fixed_size: tuple[int, int] | None = None,
    classes: tuple[str, ...] = (),
    channels: str = "RGB",
) -> Graph:
    """Prepare a segmentor for export: the logits of a window, or of the whole image.

    Args:
        model: the segmentor.
        fixed_size: height and width of the padded images in pixels; None: any.
        classes: names of its classes, if they are constants.
        channels: order of the channels of its images (INPUT.FORMAT), "RGB" or "BGR".

    Raises:
        ExportError: If test-time views are set, windows are not squares, or the prompts depend on the image.
    """
    settings = model.inference
    if settings.flip or tuple(settings.scales) != (1.0,):
        raise ExportError(
            "test-time views are several runs of the file: set MODEL.SEMANTIC_SEGMENTOR.SCALES [1.0] and "
            "FLIP False, and average its results yourself"
        )
    if len(set(settings.window)) > 1 or len(set(settings.stride)) > 1:
        raise ExportError(
            f"windows of {list(settings.window)} px: an exported file has square windows; set "
            "MODEL.SEMANTIC_SEGMENTOR.WINDOW and STRIDE to two equal numbers each"
        )
    language = find_language_trunk(model)
    dim = 0 if language is None else language.text.embed_dim
    head: Any = model.sem_seg_head
    module: nn.Module
    if language is None:
        module = DecoderLogits(model.backbone, head)
    else:
        module = LanguageLogits(model.backbone, head)
        classes = classes or tuple(language.text.classes)
    any_words = isinstance(model, ScoreMapSegmentor)
    fixed_classes = 0 if language is None or any_words else len(language.text.classes)
    divisor = model.backbone.size_divisibility if settings.pad else 0
    metadata = FileMetadata(
        system=type(model).__name__,
        task="semantic",
        channels=channels,
        pixel_mean=tuple(model.pixel_mean.flatten().tolist()),
        pixel_std=tuple(model.pixel_std.flatten().tolist()),
        multiple=divisor if divisor > 1 else 0,
        min_size=32,
        fixed_size=fixed_size or (),
        dynamic_batch=True,
        text="none" if language is None else "classes",
        embed_dim=dim,
        own_text=language is not None,
        num_classes=fixed_classes,
        classes=classes,
        window=settings.window[0] if settings.window else 0,
        window_stride=settings.stride[0] if settings.window else 0,
    )

    def example(height: int, width: int, count: int) -> Inputs:
        generator = torch.Generator().manual_seed(height * width + count)
        inputs = {"images": torch.randn(2, 3, height, width, generator=generator)}
        if language is not None:
            inputs["text"] = torch.randn(fixed_classes or count, dim, generator=generator)
        return inputs

    side = max(divisor, 32)
    return Graph(
        module.eval(),
        metadata,
        example,
        outputs=("logits",),
        dynamic={"images": (0,) if fixed_size else (0, 2, 3), "text": () if fixed_classes else (0,)},
        size=fixed_size or (3 * side, 4 * side),
    )
