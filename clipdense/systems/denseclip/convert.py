"""Conversion of the published DenseCLIP detectors: mmdetection's RetinaNet and Mask R-CNN on CLIP's ResNets.

Sizes are read from the tensors. Settings that tensors do not determine are those of the released configs:
number of heads of the text tower, the attention pool and the context decoder, temperature, weight of the
auxiliary loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from clipdense.checkpoint import (
    CheckpointError,
    ModelLayout,
    config_leaves,
    count_parts,
    register_layout,
    rename,
    shown_size,
)
from clipdense.clip.tokenizer import CLIP_VOCABULARY

__all__ = [
    "DENSECLIP_MASK_RCNN",
    "DENSECLIP_RETINANET",
    "language_options",
    "language_prefixes",
    "neck_prefixes",
    "resnet_config",
    "text_config",
]

State = Mapping[str, Tensor]
RATIOS, SCALES = [0.5, 1.0, 2.0], 3

_RETINANET_HEAD = {"bbox_head.retina_cls.": "head.cls_score.", "bbox_head.retina_reg.": "head.bbox_pred."}
_MASK_RCNN_HEADS = {
    "rpn_head.rpn_conv.": "proposal_generator.rpn_head.conv.",
    "rpn_head.rpn_cls.": "proposal_generator.rpn_head.objectness_logits.",
    "rpn_head.rpn_reg.": "proposal_generator.rpn_head.anchor_deltas.",
    "roi_head.bbox_head.fc_cls.": "roi_heads.box_predictor.cls_score.",
    "roi_head.bbox_head.fc_reg.": "roi_heads.box_predictor.bbox_pred.",
    "roi_head.mask_head.upsample.": "roi_heads.mask_head.deconv.",
    "roi_head.mask_head.conv_logits.": "roi_heads.mask_head.predictor.",
}


def language_prefixes() -> dict[str, str]:
    """Return the key prefixes of trunk, text and context decoder: published -> ours."""
    return {
        "backbone.": "backbone.bottom_up.trunk.tower.",
        "text_encoder.": "backbone.bottom_up.text.tower.",
        "contexts": "backbone.bottom_up.text.prompts.contexts",
        "gamma": "backbone.bottom_up.gamma",
        "context_decoder.": "backbone.bottom_up.context_decoder.",
    }


def _retinanet_prefixes(state: State) -> dict[str, str]:
    laterals = count_parts(state, "neck.lateral_convs.")
    convs = count_parts(state, "bbox_head.cls_convs.", "bbox_head.reg_convs.")
    return {
        **language_prefixes(),
        **neck_prefixes(laterals, first=3),
        f"neck.fpn_convs.{laterals}.conv.": "backbone.top_block.p6.",
        f"neck.fpn_convs.{laterals + 1}.conv.": "backbone.top_block.p7.",
        **{f"bbox_head.cls_convs.{i}.conv.": f"head.cls_subnet.{2 * i}." for i in range(convs)},
        **{f"bbox_head.reg_convs.{i}.conv.": f"head.bbox_subnet.{2 * i}." for i in range(convs)},
        **_RETINANET_HEAD,
    }


def _mask_rcnn_prefixes(state: State) -> dict[str, str]:
    fcs = range(count_parts(state, "roi_head.bbox_head.shared_fcs."))
    convs = range(count_parts(state, "roi_head.mask_head.convs."))
    return {
        **language_prefixes(),
        **neck_prefixes(count_parts(state, "neck.lateral_convs."), first=2),
        **_MASK_RCNN_HEADS,
        **{f"roi_head.bbox_head.shared_fcs.{i}.": f"roi_heads.box_head.fc{i + 1}." for i in fcs},
        **{f"roi_head.mask_head.convs.{i}.conv.": f"roi_heads.mask_head.mask_fcn{i + 1}." for i in convs},
    }


def neck_prefixes(levels: int, first: int) -> dict[str, str]:
    """Return the key prefixes of an FPN: published -> ours.

    Args:
        levels: number of its levels.
        first: number of the finest level; 2 has stride 4.
    """
    return {
        f"neck.{theirs}_convs.{i}.conv.": f"backbone.fpn_{ours}{first + i}."
        for theirs, ours in (("lateral", "lateral"), ("fpn", "output"))
        for i in range(levels)
    }


def _retinanet_state(state: State) -> dict[str, Tensor]:
    prefixes = _retinanet_prefixes(state)
    return {
        rename(key, prefixes): _reorder_anchors(key, value)
        if key.startswith(tuple(_RETINANET_HEAD))
        else value
        for key, value in state.items()
    }


def _reorder_anchors(key: str, tensor: Tensor) -> Tensor:
    """Convert channels from mmdetection's order of anchors (ratio, scale, ...) to Detectron2's (scale, ratio,
    ...).
    """
    if tensor.ndim == 0 or tensor.shape[0] % (len(RATIOS) * SCALES):
        raise CheckpointError(
            f"{key} {tuple(tensor.shape)}: channels are not a multiple of {len(RATIOS) * SCALES} anchors"
        )
    return tensor.unflatten(0, (len(RATIOS), SCALES, -1)).transpose(0, 1).flatten(0, 2)


def _mask_rcnn_state(state: State) -> dict[str, Tensor]:
    prefixes = _mask_rcnn_prefixes(state)
    return {rename(key, prefixes): value for key, value in state.items()}


def _retinanet_options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    logits = shown_size(state, ("bbox_head.retina_cls.weight", 0), ("bbox_head.retina_cls.bias", 0))
    num_classes = logits // (len(RATIOS) * SCALES)
    sizes = [[4 * 2**level * 2 ** (i / SCALES) for i in range(SCALES)] for level in range(3, 8)]
    return {
        "MODEL.META_ARCHITECTURE": "DenseCLIPRetinaNet",
        **_detector_options(state, num_classes, classes),
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.TOP_BLOCK": "LastLevelP6P7NoReLU",
        "MODEL.ANCHOR_GENERATOR.SIZES": sizes,
        "MODEL.RETINANET.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        "MODEL.RETINANET.NUM_CLASSES": num_classes,
        "MODEL.RETINANET.NUM_CONVS": count_parts(state, "bbox_head.cls_convs.", "bbox_head.reg_convs."),
        "MODEL.RETINANET.RULES": "mmdetection",
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0.0,
    }


def _mask_rcnn_options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    box, mask = "roi_head.bbox_head", "roi_head.mask_head"
    num_classes = shown_size(state, (f"{mask}.conv_logits.weight", 0), (f"{mask}.conv_logits.bias", 0))
    return {
        "MODEL.META_ARCHITECTURE": "DenseCLIPRCNN",
        **_detector_options(state, num_classes, classes),
        "MODEL.MASK_ON": True,
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.TOP_BLOCK": "LastLevelMaxPool",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8 * 2**level] for level in range(2, 7)],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": num_classes,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": count_parts(state, f"{box}.shared_fcs."),
        "MODEL.ROI_BOX_HEAD.FC_DIM": shown_size(
            state,
            (f"{box}.shared_fcs.0.bias", 0),
            (f"{box}.shared_fcs.0.weight", 0),
            (f"{box}.fc_reg.weight", 1),
        ),
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": count_parts(state, f"{mask}.convs."),
        "MODEL.ROI_MASK_HEAD.CONV_DIM": shown_size(
            state,
            (f"{mask}.upsample.bias", 0),
            (f"{mask}.upsample.weight", 1),
            (f"{mask}.conv_logits.weight", 1),
        ),
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
    }


def _detector_options(state: State, num_classes: int, classes: Sequence[str] | None) -> dict[str, Any]:
    """Return the options that both detectors share."""
    clip = resnet_config(state)
    last_lateral = f"neck.lateral_convs.{count_parts(state, 'neck.lateral_convs.') - 1}.conv.weight"
    dense_last = shown_size(state, (last_lateral, 1)) == clip["embed_dim"] + num_classes
    return {
        **language_options(state, clip, num_classes, classes),
        "MODEL.CLIP.POSITION_RULE": "crop",
        "MODEL.LANGUAGE.TRUNK": "CLIPTrunk",
        "MODEL.LANGUAGE.SCORE": "scaled",
        "MODEL.LANGUAGE.LAST_MAP": "dense" if dense_last else "trunk",
        "MODEL.PIXEL_TEXT.SOURCE": "boxes",
        "MODEL.PIXEL_TEXT.WEIGHT": 1.0,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [RATIOS],
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
    }


def language_options(
    state: State, clip: dict[str, Any], num_classes: int, classes: Sequence[str] | None
) -> dict[str, Any]:
    """Return the options of the backbone that detectors and segmentors share.

    Args:
        state: tensors of the published file.
        clip: open_clip's model_cfg of the towers.
        num_classes: number of classes of the heads.
        classes: class names, if the file lists them.

    Raises:
        CheckpointError: If the numbers of classes differ, or a tensor is missing.
    """
    if classes and len(classes) != num_classes:
        raise CheckpointError(
            f"the heads have {num_classes} classes, but {len(classes)} class names are given"
        )
    vision = clip["vision_cfg"]
    last_lateral = f"neck.lateral_convs.{count_parts(state, 'neck.lateral_convs.') - 1}.conv.weight"
    return {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [255 * x for x in OPENAI_DATASET_MEAN],
        "MODEL.PIXEL_STD": [255 * x for x in OPENAI_DATASET_STD],
        "MODEL.BACKBONE.NAME": "build_trunk_fpn_backbone",
        "MODEL.FPN.OUT_CHANNELS": shown_size(
            state, *((f"neck.{kind}_convs.0.conv.bias", 0) for kind in ("lateral", "fpn")), (last_lateral, 0)
        ),
        "MODEL.FPN.NORM": "",
        "MODEL.FPN.FUSE_TYPE": "sum",
        "MODEL.TRUNK.NAME": "LanguageTrunk",
        "MODEL.TRUNK.OUT_FEATURES": [],
        "MODEL.TRUNK.NORM": "BN",
        "MODEL.CLIP.PRETRAINED": "random",
        "MODEL.CLIP.POSITION_GRID": vision["image_size"] // (vision["patch_size"] or 32),
        **dict(config_leaves(clip, "MODEL.CLIP.CONFIG")),
        **({"MODEL.LANGUAGE.CLASSES": list(classes)} if classes else {}),
        "MODEL.LANGUAGE.N_CONTEXTS": shown_size(state, ("contexts", 1)),
        "MODEL.LANGUAGE.CONTEXT_DECODER.ENABLED": True,
        "MODEL.LANGUAGE.CONTEXT_DECODER.WIDTH": shown_size(
            state, *((f"context_decoder.{x}.bias", 0) for x in ("text_proj.1", "memory_proj.1", "out_proj.0"))
        ),
        "MODEL.LANGUAGE.CONTEXT_DECODER.HEADS": 4,
        "MODEL.LANGUAGE.CONTEXT_DECODER.LAYERS": count_parts(state, "context_decoder.decoder."),
        "MODEL.LANGUAGE.TAU": 0.07,
    }


def resnet_config(state: State) -> dict[str, Any]:
    """Return open_clip's model_cfg of the published towers, whose image tower is a ResNet."""
    visual = "backbone"
    width = shown_size(state, *((f"{visual}.{x}.weight", 0) for x in ("bn3", "conv3", "layer1.0.conv1")))
    return {
        **text_config(state, (f"{visual}.attnpool.c_proj.bias", 0)),
        "vision_cfg": {
            "layers": [count_parts(state, f"{visual}.layer{i}.") for i in (1, 2, 3, 4)],
            "width": width,
            "head_width": width,  # the attention pool has 32 heads, and tokens of 32 times this width
            "patch_size": None,
            "image_size": 32 * math.isqrt(shown_size(state, (f"{visual}.attnpool.positional_embedding", 0))),
        },
    }


def text_config(state: State, joint: tuple[str, int]) -> dict[str, Any]:
    """Return open_clip's model_cfg of the published text tower.

    Args:
        state: tensors of the published file.
        joint: key and axis of a tensor of the image tower that shows the dimension of the joint space.
    """
    text = "text_encoder"
    embed_dim = shown_size(state, ("gamma", 0), joint, (f"{text}.text_projection", 1))
    text_width = shown_size(
        state, (f"{text}.ln_final.weight", 0), (f"{text}.ln_final.bias", 0), (f"{text}.text_projection", 0)
    )
    hidden = shown_size(
        state, *((f"{text}.transformer.resblocks.0.mlp.c_fc.{x}", 0) for x in ("bias", "weight"))
    )
    return {
        "embed_dim": embed_dim,
        "custom_text": True,
        "quick_gelu": True,
        "text_cfg": {
            "context_length": shown_size(state, (f"{text}.positional_embedding", 0)),
            "vocab_size": CLIP_VOCABULARY,
            "width": text_width,
            "heads": 8,
            "layers": count_parts(state, f"{text}.transformer.resblocks."),
            "mlp_ratio": hidden / text_width,
        },
    }


def _is_detector(head: str) -> Callable[[State], bool]:
    """Return a predicate: whether keys belong to a DenseCLIP with such a head, possibly incomplete."""
    return lambda state: all(
        any(key.startswith(prefix) for key in state)
        for prefix in ("backbone.attnpool.", "text_encoder.", "context_decoder.", "neck.", head)
    )


DENSECLIP_RETINANET = register_layout(
    ModelLayout(
        name="denseclip_retinanet",
        about="DenseCLIP's RetinaNet as mmdetection saves it: backbone.*, text_encoder.*, bbox_head.*",
        matches=_is_detector("bbox_head."),
        classes="thing_classes",
        convert=_retinanet_state,
        options=_retinanet_options,
        prefixes=_retinanet_prefixes,
    )
)

DENSECLIP_MASK_RCNN = register_layout(
    ModelLayout(
        name="denseclip_mask_rcnn",
        about="DenseCLIP's Mask R-CNN as mmdetection saves it: backbone.*, text_encoder.*, roi_head.*",
        matches=_is_detector("roi_head."),
        classes="thing_classes",
        convert=_mask_rcnn_state,
        options=_mask_rcnn_options,
        prefixes=_mask_rcnn_prefixes,
    )
)
