"""Export of mask classification: MaskFormer and Mask2Former, FC-CLIP and ODISE, OVSeg's first stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone import JOINT, find_frozen_clip
from clipdense.clip.vocabulary import Vocabulary, canonical
from clipdense.maskformer import MaskFormer, MaskPrediction
from clipdense.run.export.file_metadata import FileMetadata
from clipdense.run.export.graph import ExportError, Graph, Inputs
from clipdense.systems.mask_pooling import FCCLIP
from clipdense.systems.mask_pooling.ensemble import with_objectness
from clipdense.systems.mask_pooling.region_heads import embed_dense_regions

__all__ = ["base_names", "fcclip_graph", "mask_metadata", "maskformer_graph", "max_over_names"]


def max_over_names(logits: Tensor, synonyms: Tensor) -> Tensor:
    """Reduce the logits of names to those of classes by their maximum, without reading values of indices.

    Args:
        logits: (..., N).
        synonyms: (K, M) int64, the names of each class; a class with fewer names repeats one of them.

    Returns:
        (..., K).
    """
    return logits[..., synonyms.flatten()].unflatten(-1, synonyms.shape).amax(-1)


class ClosedMasks(nn.Module):
    """Masks and class scores of a MaskFormer or Mask2Former, whose classes are constants."""

    def __init__(self, model: MaskFormer) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predict masks.

        Args:
            images: normalised and padded (B, 3, H, W).

        Returns:
            Mask logits (B, Q, h, w) and class probabilities (B, Q, K + 1), "no object" last.
        """
        prediction: MaskPrediction = self.head(self.backbone(images))
        return prediction.mask_logits, prediction.require_class_logits().softmax(-1)


class PooledMasks(nn.Module):
    """Masks and fused class scores of FC-CLIP for one image."""

    def __init__(self, model: FCCLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, text: Tensor, synonyms: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """Predict masks and classify them.

        Args:
            images: normalised and padded (1, 3, H, W).
            text: (N, D), unit length, a row per name.
            synonyms: (K, M) int64, see `max_over_names`.
            base: (K,) bool, the classes that were trained.

        Returns:
            Mask logits (1, Q, h, w) and class probabilities (1, Q, K + 1), void last.
        """
        model = self.model
        features = model.backbone(images)
        prediction: MaskPrediction = model.head(features)
        masks = prediction.mask_logits
        names = model.classifier.name_logits(prediction.require_query_embeddings(), text)
        inside = torch.cat([max_over_names(names[..., :-1], synonyms), names[..., -1:]], dim=-1)
        if prediction.class_logits is not None:
            inside = with_objectness(inside[..., :-1], prediction.class_logits)
        outside = None
        valid = torch.ones_like(masks[0, :, 0, 0], dtype=torch.bool)
        if model.region_head == "dense":
            trunk = find_frozen_clip(model.backbone)
            regions = embed_dense_regions(trunk, features[JOINT], masks, model.masks)
            logits = model.region_name_logits(regions.embeddings, text)
            outside, valid = max_over_names(logits, synonyms)[0], regions.valid[0]
        scores = model.ensemble(inside[0], outside, valid, base)
        return masks, scores[None]


def maskformer_graph(
    model: MaskFormer, *, fixed_size: tuple[int, int] | None = None, classes: tuple[str, ...] = ()
) -> Graph:
    """Prepare a MaskFormer or Mask2Former for export; masks are merged by the caller.

    Args:
        model: the model.
        fixed_size: height and width of the padded images in pixels; None: any.
        classes: names of its classes.
    """
    metadata = mask_metadata(model, fixed_size, dynamic_batch=True, classes=classes)

    def example(height: int, width: int, count: int) -> Inputs:
        return {"images": _images(2, height, width)}

    return Graph(
        ClosedMasks(model).eval(),
        metadata,
        example,
        outputs=("mask_logits", "scores"),
        dynamic={"images": (0,) if fixed_size else (0, 2, 3)},
        size=fixed_size or _traced_size(model),
    )


def fcclip_graph(model: FCCLIP, *, fixed_size: tuple[int, int] | None = None) -> Graph:
    """Prepare FC-CLIP or ODISE for export; masks are merged by the caller.

    Args:
        model: the model.
        fixed_size: height and width of the padded images in pixels; None: any.

    Raises:
        ExportError: If masks come from elsewhere, or are embedded by a second forward of CLIP.
    """
    if model.mask_source is not None:
        raise ExportError(
            "masks that come from a file or another model are no part of the network: set "
            "MODEL.MASK_FORMER.TEST.MASK_SOURCE ''"
        )
    if model.region_head == "mask_tokens":
        raise ExportError(
            "mask tokens run a second CLIP at its own size, whose masks depend on the padding of the batch: "
            "set MODEL.MASK_POOLING.OUT_OF_VOCABULARY.HEAD dense or none"
        )
    dim = model.clip.embed_dim
    metadata = mask_metadata(
        model,
        fixed_size,
        text="names",
        embed_dim=dim,
        clip=model.clip.name,
        templates=model.bank.templates.name,
        reads_base=True,
        base_names=base_names(model.training_vocabulary),
    )

    def example(height: int, width: int, classes: int) -> Inputs:
        generator = torch.Generator().manual_seed(classes)
        first = torch.arange(classes)
        return {
            "images": _images(1, height, width),
            "text": F.normalize(torch.randn(classes + 1, dim, generator=generator), dim=1),
            # the last row is a second name of the first class
            "synonyms": torch.stack([first, torch.where(first == 0, classes, first)], dim=1),
            "base": first % 2 == 0,
        }

    return Graph(
        PooledMasks(model).eval(),
        metadata,
        example,
        outputs=("mask_logits", "scores"),
        dynamic={
            "images": () if fixed_size else (2, 3),
            "text": (0,),
            "synonyms": (0, 1),
            "base": (0,),
        },
        size=fixed_size or _traced_size(model),
    )


def mask_metadata(model: MaskFormer, fixed_size: tuple[int, int] | None, **fields: Any) -> FileMetadata:
    """Describe a model that predicts masks, with further fields of `FileMetadata`."""
    merging = model.merging
    if merging.best_masks:
        raise ExportError(
            "MODEL.TWO_STAGE.BEST_MASKS selects masks by their scores after the network: set it to False, "
            "and select them yourself"
        )
    return FileMetadata(
        system=type(model).__name__,
        task="masks",
        channels=model.input_format,
        pixel_mean=tuple(model.pixel_mean.flatten().tolist()),
        pixel_std=tuple(model.pixel_std.flatten().tolist()),
        multiple=model.size_divisibility,
        min_size=32,
        fixed_size=fixed_size or (),
        things=tuple(sorted(model.things)),
        resize_masks_first=merging.resize_masks_first,
        object_threshold=merging.object_mask_threshold,
        overlap_threshold=merging.overlap_threshold,
        pixel_threshold=merging.pixel_threshold,
        calibration=max(merging.calibration, 0.0),
        **fields,
    )


def base_names(vocabulary: Vocabulary | None) -> tuple[str, ...]:
    """Return all names of the classes that a model was trained on, as they are compared."""
    if vocabulary is None:
        return ()
    base = vocabulary.base or (True,) * len(vocabulary)
    groups = (names for names, flag in zip(vocabulary.synonyms, base, strict=True) if flag)
    return tuple(dict.fromkeys(canonical(name) for names in groups for name in names))


def _images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def _traced_size(model: MaskFormer) -> tuple[int, int]:
    side = max(model.size_divisibility, 32)
    return 3 * side, 4 * side
