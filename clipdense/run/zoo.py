"""The models that clipdense runs: what ships with it, and the published weights that it converts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ZOO", "Entry"]

_UNSTATED = "see its repository"
_NO_COMMERCE = "CC BY-NC 4.0"


@dataclass(frozen=True)
class Entry:
    """A row of the zoo.

    Attributes:
        name: of the model, or of the config in ``projects/<system>/configs``.
        task: what it does.
        system: folder in ``projects``, whose README has all results and the conversion; "" for none.
        backbone: image encoder.
        numbers: published results, as the system's README lists them; "" if it lists none for this row.
        licence: of the published weights.
        source: where they come from.
    """

    name: str
    task: str
    system: str
    backbone: str
    numbers: str = ""
    licence: str = _UNSTATED
    source: str = "published"

    @property
    def command(self) -> str:
        """The command that runs the model on pictures; ``WEIGHTS`` is a file of ``clipdense convert``."""
        verb = {"panoptic": "panoptic", "detection": "detect"}.get(self.task, "segment")
        if self.source == "package":
            return f'clipdense segment photo.jpg --words "red star, blue ring" --model {self.name}'
        if self.source == "open_clip":
            model, _, tag = self.name.partition(":")
            return f'clipdense segment photo.jpg --words "cat, sofa" --model {model} --pretrained {tag}'
        config = f"projects/{self.system}/configs/{self.name}.yaml"
        return f"clipdense {verb} photo.jpg --config {config} --weights WEIGHTS"


_WORDS, _PIXELS, _OBJECTS = "any words, no training", "semantic", "detection"

ZOO: tuple[Entry, ...] = (
    Entry("shapes-rn", _WORDS, "ShapesWorld", "ResNet", licence="Apache-2.0", source="package"),
    Entry("shapes-vit", _WORDS, "ShapesWorld", "ViT, patch 8", licence="Apache-2.0", source="package"),
    Entry("shapes-eva", _WORDS, "ShapesWorld", "EVA02, patch 8", licence="Apache-2.0", source="package"),
    Entry("ViT-B-16:openai", _WORDS, "ZeroShot", "ViT-B/16", "SCLIP: VOC21 59.6 mIoU", source="open_clip"),
    Entry("catseg_vitb_384", _PIXELS, "CATSeg", "CLIP ViT-B/16", "A-150 31.8 mIoU"),
    Entry("catseg_vitl_336", _PIXELS, "CATSeg", "CLIP ViT-L/14", "A-150 37.9 mIoU"),
    Entry("sed_convnext_b_768", _PIXELS, "CATSeg", "ConvNeXt-B", "A-150 31.8 mIoU"),
    Entry("sed_convnext_l_768", _PIXELS, "CATSeg", "ConvNeXt-L", "A-150 35.3 mIoU"),
    Entry("ovseg_swinb_vitl14", _PIXELS, "OVSeg", "Swin-B, CLIP ViT-L/14", "A-150 29.6 mIoU", _NO_COMMERCE),
    Entry("ovseg_r101c_vitb16", _PIXELS, "OVSeg", "R101c, CLIP ViT-B/16", "A-150 24.8 mIoU", _NO_COMMERCE),
    Entry("zegformer_r101_vitb16", _PIXELS, "ZegFormer", "R101, CLIP ViT-B/16", "", _NO_COMMERCE),
    Entry("vit_b16_coco", _PIXELS, "SegCLIP", "CLIP ViT-B/16", "", "its repository states none"),
    Entry("semantic_fpn_rn50", _PIXELS, "DenseCLIP", "CLIP RN50"),
    Entry("semantic_fpn_rn101", _PIXELS, "DenseCLIP", "CLIP RN101"),
    Entry("semantic_fpn_vit_b16", _PIXELS, "DenseCLIP", "CLIP ViT-B/16"),
    Entry("fcclip_convnext_large_d_320", "panoptic", "FCCLIP", "ConvNeXt-L", "ADE20K 26.8 PQ"),
    Entry("fcclip_r50", "panoptic", "FCCLIP", "CLIP RN50", "ADE20K 17.9 PQ"),
    Entry("mask2former_swinl_coco_panoptic", "panoptic", "MaskFormer", "Swin-L"),
    Entry("mask2former_r50_coco_panoptic", "panoptic", "MaskFormer", "R50"),
    Entry("maskformer_r50_ade20k150", _PIXELS, "MaskFormer", "R50", "", _NO_COMMERCE),
    Entry("fvit_b16_ovcoco", _OBJECTS, "FVLM", "CLIPSelf EVA02-B/16"),
    Entry("fvit_l14_ovcoco", _OBJECTS, "FVLM", "CLIPSelf EVA02-L/14"),
    Entry("mask_rcnn_rn50", _OBJECTS, "DenseCLIP", "CLIP RN50"),
    Entry("retinanet_rn50", _OBJECTS, "DenseCLIP", "CLIP RN50"),
)
"""The rows, by task."""
