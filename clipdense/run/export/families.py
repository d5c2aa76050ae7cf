"""The families of models that export, and the reasons of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from clipdense.maskformer import MaskFormer
from clipdense.run.export.catseg import catseg_graph
from clipdense.run.export.detection import detector_graph
from clipdense.run.export.graph import ExportError, Graph
from clipdense.run.export.masks import fcclip_graph, maskformer_graph
from clipdense.run.export.names import zero_shot_graph
from clipdense.run.export.semantic import semantic_graph
from clipdense.run.export.two_stage import ovseg_graph
from clipdense.systems.catseg import CATSeg
from clipdense.systems.denseclip import WindowedSemanticSegmentor
from clipdense.systems.mask_pooling import FCCLIP
from clipdense.systems.training_free import ZeroShotSegmentor
from clipdense.systems.two_stage import OVSeg

from detectron2.modeling import GeneralizedRCNN

__all__ = ["FAMILIES", "REFUSED", "Family", "model_graph", "support_table"]


@dataclass(frozen=True)
class Family:
    """A family of models that export.

    Attributes:
        model: their common class.
        build: from a model and a fixed size to its graph; further keyword arguments as named below.
        names: what people call them.
        content: what the file computes.
        text: its text inputs.
        free: what may vary from run to run without a new export.
        left_out: settings that are refused.
        options: further keyword arguments of `build`, among those of `model_graph`.
    """

    model: type[nn.Module]
    build: Callable[..., Graph]
    names: str
    content: str
    text: str
    free: str
    left_out: str
    options: tuple[str, ...] = ()


FAMILIES = (
    Family(
        ZeroShotSegmentor,
        zero_shot_graph,
        "training-free methods (`ZeroShotSegmentor`): clip, maskclip, sclip, clearclip, gem, naclip, scclip, "
        "sfp, radseg",
        "cosines of one window, or of the whole image",
        "row per name",
        "batch, height, width, K",
        "trident (runs SAM), corrclip (reads region ids), lposs (solves a sparse system), resclip (follows "
        "the paths between patches), proxyclip (runs a second model); PAMR, pixel "
        "propagation, SAM refinement, area and class thresholds (they follow the windows)",
    ),
    Family(
        FCCLIP,
        fcclip_graph,
        "FC-CLIP, ODISE (`FCCLIP`)",
        "mask logits, fused class scores",
        "row per name, synonyms, base flags",
        "height, width, K",
        "mask tokens (a second CLIP at its own size); masks from a file",
    ),
    Family(
        OVSeg,
        ovseg_graph,
        "OVSeg, zsseg, ZegFormer (`OVSeg`)",
        "both stages: mask logits, fused class scores; or the first alone (`SCORES.SOURCE proposals`)",
        "row per class (queries, crops), base flags",
        "height, width, K",
        "crops by RoIAlign of masked images; masks from a file; `BEST_MASKS`",
    ),
    Family(
        MaskFormer,
        maskformer_graph,
        "MaskFormer, Mask2Former (`MaskFormer`)",
        "mask logits, class scores",
        "none: constant classes",
        "batch, height, width",
        "",
        options=("classes",),
    ),
    Family(
        CATSeg,
        catseg_graph,
        "CAT-Seg, SED (`CATSeg`)",
        "logits of the whole image",
        "P rows per class",
        "batch, height, width, K up to `MAX_CLASSES`",
        "windows (several runs), category early rejection (its number of classes depends on the image)",
    ),
    Family(
        WindowedSemanticSegmentor,
        semantic_graph,
        "Semantic FPN, UPerNet, DeepLabV3+, DenseCLIP's segmentors, score maps (`WindowedSemanticSegmentor` "
        "and subclasses)",
        "logits of one window, or of the whole image",
        "DenseCLIP: row per class, of the model itself; `ScoreMapSegmentor`: any K; otherwise none",
        "batch, height, width",
        "test-time scales and flips (several runs); prompts that depend on the image",
        options=("classes", "channels"),
    ),
    Family(
        GeneralizedRCNN,
        detector_graph,
        "Mask R-CNN, TextRCNN, DenseCLIP's Mask R-CNN, F-VLM, F-ViT (`GeneralizedRCNN` and subclasses)",
        "selected detections with masks, or all scored boxes (`--all-boxes`)",
        "TextRCNN, F-VLM: row per class; otherwise none",
        "height, width, K",
        "other proposal generators and heads than RPN with `StandardROIHeads`; padding to squares without a "
        "fixed size",
        options=("classes", "select"),
    ),
)
"""Families in the order in which a model is compared with them: subclasses first."""

REFUSED = {
    "RetinaNet": (
        "its selection of detections runs per level on as many anchors as exceed a score",
        "export a two-stage detector",
    ),
    "PromptedCLIP": (
        "its prompts may depend on the image, so that the text tower would run for each image",
        "write its class embeddings as a text table, and export the tower (clipdense export --clip NAME)",
    ),
    "SegCLIP": (
        "it is a model for pre-training, whose group tokens are matched to text by its own evaluator",
        "export a segmentor of the families above",
    ),
}
"""Class name of a model -> why it does not export, and what to do instead."""


def model_graph(
    model: Any,
    *,
    fixed_size: tuple[int, int] | None = None,
    select: bool = True,
    classes: tuple[str, ...] = (),
    channels: str = "RGB",
) -> Graph:
    """Prepare a model of any family for export.

    Args:
        model: a built model in evaluation mode.
        fixed_size: height and width of the (padded) images in pixels; None: any.
        select: detectors: see `detector_graph`.
        classes: names of constant classes.
        channels: order of the channels of images (INPUT.FORMAT), for models that do not know it.

    Raises:
        ExportError: If the model or one of its settings does not export; the message says why, and what to
            change.
    """
    for family in FAMILIES:
        if isinstance(model, family.model):
            offered = {"select": select, "classes": classes, "channels": channels}
            options = {name: offered[name] for name in family.options}
            return family.build(model, fixed_size=fixed_size, **options)
    for parent in type(model).__mro__:
        if parent.__name__ in REFUSED:
            reason, remedy = REFUSED[parent.__name__]
            raise ExportError(f"{type(model).__name__} cannot be exported: {reason}; {remedy}")
    names = ", ".join(family.model.__name__ for family in FAMILIES)
    raise ExportError(
        f"{type(model).__name__} cannot be exported: no family with an adapter contains it ({names}). Export "
        "a part of it, such as its CLIP tower (clipdense export --clip NAME)"
    )


def support_table() -> str:
    """Return what exports and what does not, and why, as Markdown."""
    lines = [
        "| models | file | text input | free | refused, and why |",
        "| --- | --- | --- | --- | --- |",
        "| dense towers (`--clip`): ResNet, ViT, EVA, ConvNeXt, heads that pool by attention (SigLIP, PE); "
        "every dense mode | cosines of the whole image | row per name | batch, height, width, K | modes with "
        "guidance (proxyclip, resclip), which the image alone does not give; position rules `dino_scale` and "
        "`crop` without a fixed size |",
    ]
    for family in FAMILIES:
        cells = (family.names, family.content, family.text, family.free, family.left_out or "-")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| does not export | why | instead |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {reason} | {remedy} |" for name, (reason, remedy) in REFUSED.items()]
    return "\n".join(lines)
