"""The models that clipdense runs: what ships with it, and the published weights that it converts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ZOO", "Entry"]

_MIT = "code MIT; weights not stated"
_APACHE = "code Apache-2.0; weights not stated"
_NO_COMMERCE = "CC BY-NC 4.0 (no commercial use)"
_NTU = "NTU S-Lab 1.0 (no commercial use)"


@dataclass(frozen=True)
class Entry:
    """A row of the zoo.

    Attributes:
        name: of the model, of the published file, or of the config in ``projects/<system>/configs``.
        task: what it does.
        system: folder in ``projects``, whose README has all results and the conversion; "" for none.
        backbone: image encoder.
        numbers: published results, as the system's README lists them; "" if it lists none for this row.
        licence: of the published weights.
        source: "package", "open_clip" (downloaded by it), or the GitHub repository that publishes them.
        megabytes: size of the parameters in float32, or of the files in the package; 0 if it is not known. A
            published file may also hold the state of its optimizer, or be in half precision.
    """

    name: str
    task: str
    system: str
    backbone: str
    numbers: str = ""
    licence: str = _MIT
    source: str = "open_clip"
    megabytes: float = 0.0

    @property
    def page(self) -> str:
        """Address of the source; "" for the package."""
        if self.source == "package":
            return ""
        name = "mlfoundations/open_clip" if self.source == "open_clip" else self.source
        return f"https://github.com/{name}"

    @property
    def is_clip(self) -> bool:
        """Whether the row is a CLIP, and not a system with a config."""
        return self.task in (_WORDS, _REGIONS)

    @property
    def size(self) -> str:
        """Size with its unit; "not known" without one."""
        return f"{self.megabytes:,.0f} MB" if self.megabytes else "not known"

    @property
    def command(self) -> str:
        """The command that runs the model on pictures.

        ``WEIGHTS`` is a file of ``clipdense convert``, ``FOLDER`` one with the published files.
        """
        verb = {"panoptic": "panoptic", "detection": "detect"}.get(self.task, "segment")
        if self.source == "package":
            return f'clipdense segment photo.jpg --words "red star, blue ring" --model {self.name}'
        if self.is_clip:
            model, _, tag = self.name.partition(":")
            model = self.backbone if self.task == _REGIONS else model
            tag = tag or ("WEIGHTS" if self.task == _REGIONS else "FOLDER")
            return f'clipdense segment photo.jpg --words "cat, sofa" --model {model} --pretrained {tag}'
        config = f"projects/{self.system}/configs/{self.name}.yaml"
        return f"clipdense {verb} photo.jpg --config {config} --weights WEIGHTS"


_WORDS, _PIXELS, _OBJECTS, _REGIONS = "any words, no training", "semantic", "detection", "regions"
_PANOPTIC = "panoptic"
_DENSECLIP, _SED, _FCCLIP = "raoyongming/DenseCLIP", "xb534/SED", "bytedance/fc-clip"
_CATSEG, _OVSEG, _CLIPSELF = "cvlab-kaist/CAT-Seg", "facebookresearch/ov-seg", "wusize/CLIPSelf"
_MASKFORMER, _MASK2FORMER = "facebookresearch/MaskFormer", "facebookresearch/Mask2Former"
_ZSSEG, _ZEGFORMER, _SEGCLIP = "MendelXu/zsseg.baseline", "dingjiansw101/ZegFormer", "ArrowLuo/SegCLIP"
_TALK2DINO = "lorebianchi98/Talk2DINO"
_NONE_STATED = "its repository states none"

_OPENAI = (("RN50", 389), ("RN101", 457), ("ViT-B-32", 577), ("ViT-B-16", 571), ("ViT-L-14", 1631)) + (
    ("ViT-L-14-336", 1632),
)
_EVA_B, _EVA_L = "EVA02-B-16", "EVA02-L-14-336"

ZOO: tuple[Entry, ...] = (
    Entry("shapes-rn", _WORDS, "ShapesWorld", "ResNet", "", "Apache-2.0", "package", 13),
    Entry("shapes-vit", _WORDS, "ShapesWorld", "ViT, patch 8", "", "Apache-2.0", "package", 8),
    Entry("shapes-eva", _WORDS, "ShapesWorld", "EVA02, patch 8", "", "Apache-2.0", "package", 8),
    Entry("shapes-siglip", _WORDS, "ShapesWorld", "SigLIP, patch 8", "", "Apache-2.0", "package", 9),
    *(
        Entry(
            f"{name}:openai",
            _WORDS,
            "ZeroShot",
            f"OpenAI CLIP {name}",
            "SCLIP: VOC21 59.6 mIoU" if name == "ViT-B-16" else "",
            megabytes=size,
        )
        for name, size in _OPENAI
    ),
    Entry(
        "dinotxt-vitl14-reg4", _WORDS, "ZeroShot", "DINOv2 ViT-L/14", "", _APACHE, "facebookresearch/dinov2"
    ),
    Entry(
        "dinotxt-dinov3-vitl16",
        _WORDS,
        "ZeroShot",
        "DINOv3 ViT-L/16",
        "",
        "DINOv3",
        "facebookresearch/dinov3",
    ),
    Entry("talk2dino-vitb14-reg4", _WORDS, "ZeroShot", "DINOv2 ViT-B/14", "", _NONE_STATED, _TALK2DINO),
    Entry("talk2dino-vitl14-reg4", _WORDS, "ZeroShot", "DINOv2 ViT-L/14", "", _NONE_STATED, _TALK2DINO),
    Entry("eva_vitb16_coco_clipself_patches", _REGIONS, "CLIPSelf", _EVA_B, "", _NTU, _CLIPSELF, 572),
    Entry("eva_vitb16_coco_clipself_proposals", _REGIONS, "CLIPSelf", _EVA_B, "", _NTU, _CLIPSELF, 572),
    Entry("eva_vitb16_coco_regionclip", _REGIONS, "CLIPSelf", _EVA_B, "", _NTU, _CLIPSELF, 572),
    Entry("eva_vitb16_lvis_clipself_patches", _REGIONS, "CLIPSelf", _EVA_B, "", _NTU, _CLIPSELF, 572),
    Entry("eva_vitl14_coco_clipself_proposals", _REGIONS, "CLIPSelf", _EVA_L, "", _NTU, _CLIPSELF, 1640),
    Entry("eva_vitl14_lvis_clipself_patches", _REGIONS, "CLIPSelf", _EVA_L, "", _NTU, _CLIPSELF, 1640),
    Entry("catseg_vitb_384", _PIXELS, "CATSeg", "CLIP ViT-B/16", "A-150 31.8 mIoU", _MIT, _CATSEG, 589),
    Entry("catseg_vitl_336", _PIXELS, "CATSeg", "CLIP ViT-L/14", "A-150 37.9 mIoU", _MIT, _CATSEG, 1655),
    Entry("sed_convnext_b_768", _PIXELS, "CATSeg", "ConvNeXt-B", "A-150 31.8 mIoU", _APACHE, _SED, 690),
    Entry("sed_convnext_l_768", _PIXELS, "CATSeg", "ConvNeXt-L", "A-150 35.3 mIoU", _APACHE, _SED, 1348),
    Entry(
        "ovseg_swinb_vitl14",
        _PIXELS,
        "OVSeg",
        "Swin-B, CLIP ViT-L/14",
        "A-150 29.6 mIoU",
        _NO_COMMERCE,
        _OVSEG,
        2028,
    ),
    Entry(
        "ovseg_r101c_vitb16",
        _PIXELS,
        "OVSeg",
        "R101c, CLIP ViT-B/16",
        "A-150 24.8 mIoU",
        _NO_COMMERCE,
        _OVSEG,
        806,
    ),
    Entry(
        "zsseg_r101c_vitb16", _PIXELS, "OVSeg", "R101c, CLIP ViT-B/16", "A-150 15.3 mIoU", _MIT, _ZSSEG, 805
    ),
    Entry(
        "zegformer_r101_vitb16",
        _PIXELS,
        "ZegFormer",
        "R101, CLIP ViT-B/16",
        "",
        _NO_COMMERCE,
        _ZEGFORMER,
        802,
    ),
    Entry("vit_b16_coco", _PIXELS, "SegCLIP", "CLIP ViT-B/16", "", _NONE_STATED, _SEGCLIP, 720),
    Entry("semantic_fpn_rn50", _PIXELS, "DenseCLIP", "CLIP RN50", "", _MIT, _DENSECLIP, 435),
    Entry("semantic_fpn_rn101", _PIXELS, "DenseCLIP", "CLIP RN101", "", _MIT, _DENSECLIP, 501),
    Entry("semantic_fpn_vit_b16", _PIXELS, "DenseCLIP", "CLIP ViT-B/16", "", _MIT, _DENSECLIP, 643),
    Entry("maskformer_r50_ade20k150", _PIXELS, "MaskFormer", "R50", "", _NO_COMMERCE, _MASKFORMER, 158),
    Entry("maskformer_swinl_ade20k150", _PIXELS, "MaskFormer", "Swin-L", "", _NO_COMMERCE, _MASKFORMER, 809),
    Entry("mask2former_r50_coco_panoptic", _PANOPTIC, "MaskFormer", "R50", "", _MIT, _MASK2FORMER, 168),
    Entry("mask2former_swinl_coco_panoptic", _PANOPTIC, "MaskFormer", "Swin-L", "", _MIT, _MASK2FORMER, 824),
    Entry(
        "fcclip_convnext_large_d_320",
        _PANOPTIC,
        "FCCLIP",
        "ConvNeXt-L",
        "ADE20K 26.8 PQ",
        _APACHE,
        _FCCLIP,
        1421,
    ),
    Entry("fcclip_r50", _PANOPTIC, "FCCLIP", "CLIP RN50", "ADE20K 17.9 PQ", _APACHE, _FCCLIP, 470),
    Entry("fcclip_r101", _PANOPTIC, "FCCLIP", "CLIP RN101", "ADE20K 19.1 PQ", _APACHE, _FCCLIP, 537),
    Entry("fcclip_r50x4", _PANOPTIC, "FCCLIP", "CLIP RN50x4", "ADE20K 21.8 PQ", _APACHE, _FCCLIP, 761),
    Entry("fcclip_r50x16", _PANOPTIC, "FCCLIP", "CLIP RN50x16", "ADE20K 22.5 PQ", _APACHE, _FCCLIP, 1193),
    Entry("fcclip_r50x64", _PANOPTIC, "FCCLIP", "CLIP RN50x64", "ADE20K 22.8 PQ", _APACHE, _FCCLIP, 2463),
    Entry(
        "fvit_b16_ovcoco", _OBJECTS, "FVLM", "CLIPSelf EVA02-B/16", "novel AP50 37.6", _NTU, _CLIPSELF, 411
    ),
    Entry(
        "fvit_l14_ovcoco", _OBJECTS, "FVLM", "CLIPSelf EVA02-L/14", "novel AP50 44.3", _NTU, _CLIPSELF, 1287
    ),
    Entry("fvit_b16_ovlvis", _OBJECTS, "FVLM", "CLIPSelf EVA02-B/16", "APr 25.3", _NTU, _CLIPSELF, 425),
    Entry("fvit_l14_ovlvis", _OBJECTS, "FVLM", "CLIPSelf EVA02-L/14", "APr 34.9", _NTU, _CLIPSELF, 1304),
    Entry("mask_rcnn_rn50", _OBJECTS, "DenseCLIP", "CLIP RN50", "", _MIT, _DENSECLIP, 497),
    Entry("mask_rcnn_rn101", _OBJECTS, "DenseCLIP", "CLIP RN101", "", _MIT, _DENSECLIP, 564),
    Entry("retinanet_rn50", _OBJECTS, "DenseCLIP", "CLIP RN50", "", _MIT, _DENSECLIP, 474),
    Entry("retinanet_rn101", _OBJECTS, "DenseCLIP", "CLIP RN101", "", _MIT, _DENSECLIP, 540),
)
"""The rows, by task. Sizes are those of the key lists of the published files."""
