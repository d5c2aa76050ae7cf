"""Layout of the published F-ViT detectors (Wu et al., CLIPSelf, ICLR 2024): mmdetection's R-CNN on
EVA02-CLIP, with box heads only (OV-COCO) or also a class-agnostic mask head (OV-LVIS).

Sizes are read from the tensors. The tensors do not determine the head width of the ViT, the tapped blocks,
the temperatures, the fusion weights and the image size: these are set as in the released configs. The
presence of a mask head decides between the settings for OV-COCO and OV-LVIS.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from clipdense.checkpoint import (
    CheckpointError,
    DropRule,
    ModelLayout,
    config_leaves,
    count_parts,
    register_layout,
    rename,
    shown_size,
)
from clipdense.clip.layouts import EVA_CLIP, eva_vision_config
from clipdense.open_vocabulary import training_metadata

__all__ = ["FVIT"]

State = Mapping[str, Tensor]

BLOCKS = {12: [3, 5, 7, 11], 24: [6, 10, 14, 23]}
"""Tapped blocks of the released ViTs, by depth."""
SCALE = 50.0
"""Inverse temperature of the detector if it is not learned (transfer head)."""

_VISUAL, _TOWER = "backbone.visual.", "backbone.bottom_up.trunk.tower."
_BOX, _MASK = "roi_head.bbox_head.", "roi_head.mask_head."
_CLASSIFIER = "roi_heads.box_predictor.cls_score."


def _prefixes(state: State) -> dict[str, str]:
    first = int(math.log2(_strides(state)[0]))
    levels = range(count_parts(state, "neck.lateral_convs."))
    rpn = range(count_parts(state, "rpn_head.rpn_conv."))
    convs, fcs = (
        range(count_parts(state, f"{_BOX}shared_convs.")),
        range(count_parts(state, f"{_BOX}shared_fcs.")),
    )
    masks = range(count_parts(state, f"{_MASK}convs."))
    with_norms = {
        **{f"neck.lateral_convs.{i}.": f"backbone.fpn_lateral{first + i}." for i in levels},
        **{f"neck.fpn_convs.{i}.": f"backbone.fpn_output{first + i}." for i in levels},
        **{f"rpn_head.rpn_conv.{i}.": f"proposal_generator.rpn_head.conv.conv{i}." for i in rpn},
        **{f"{_BOX}shared_convs.{i}.": f"roi_heads.box_head.conv{i + 1}." for i in convs},
        **{f"{_MASK}convs.{i}.": f"roi_heads.mask_head.mask_fcn{i + 1}." for i in masks},
    }
    return {
        _VISUAL: f"{_TOWER}trunk.",
        "backbone.interpolate1.": "backbone.bottom_up.levels.0.",
        "backbone.interpolate2.": "backbone.bottom_up.levels.1.",
        **{f"{theirs}conv.": ours for theirs, ours in with_norms.items()},
        **{f"{theirs}bn.": f"{ours}norm." for theirs, ours in with_norms.items()},
        "rpn_head.rpn_cls.": "proposal_generator.rpn_head.objectness_logits.",
        "rpn_head.rpn_reg.": "proposal_generator.rpn_head.anchor_deltas.",
        **{f"{_BOX}shared_fcs.{i}.": f"roi_heads.box_head.fc{i + 1}." for i in fcs},
        f"{_BOX}cls_fcs.0.": f"{_CLASSIFIER}project.",
        f"{_BOX}all_embeddings": f"{_CLASSIFIER}text",
        f"{_BOX}detect_temperature": f"{_CLASSIFIER}log_scale",
        f"{_BOX}reg_fcs.0.": "roi_heads.box_predictor.bbox_pred.0.",
        f"{_BOX}fc_reg.": "roi_heads.box_predictor.bbox_pred.2.",
        f"{_MASK}upsample.": "roi_heads.mask_head.deconv.",
        f"{_MASK}conv_logits.": "roi_heads.mask_head.predictor.",
    }


def _convert(state: State) -> dict[str, Tensor]:
    prefixes = _prefixes(state)
    visual = EVA_CLIP.convert(_visual(state))
    converted = {_TOWER + key.removeprefix("visual."): value for key, value in visual.items()}
    for key, value in state.items():
        if not key.startswith(_VISUAL):
            converted[rename(key, prefixes)] = value
    if (embeddings := converted.pop(f"{_CLASSIFIER}text", None)) is not None:  # (D, K + 1), background last
        rows = embeddings.T.contiguous()
        converted |= {f"{_CLASSIFIER}text": rows[:-1], f"{_CLASSIFIER}background": rows[-1:]}
    if (scale := converted.get(f"{_CLASSIFIER}log_scale")) is not None:
        converted[f"{_CLASSIFIER}log_scale"] = scale.log()
    return converted


def _options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    num_classes = shown_size(state, (f"{_BOX}all_embeddings", 1), (f"{_BOX}fc_cls.bias", 0)) - 1
    if classes and len(classes) != num_classes:
        raise CheckpointError(
            f"the file's heads have {num_classes} classes, but {len(classes)} class names are given"
        )
    strides, depth = _strides(state), count_parts(state, f"{_VISUAL}blocks.")
    width = shown_size(state, (f"{_BOX}fc_reg.weight", 1), (f"{_BOX}reg_fcs.0.bias", 0))
    return {
        "MODEL.META_ARCHITECTURE": "FVLM",
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [255 * x for x in IMAGENET_DEFAULT_MEAN],
        "MODEL.PIXEL_STD": [255 * x for x in IMAGENET_DEFAULT_STD],
        **_backbone_options(state, strides, depth),
        **_head_options(state, strides, num_classes),
        "MODEL.FVLM.TEXT_SOURCE": "weights",
        "MODEL.FVLM.BACKGROUND": "text",
        "MODEL.FVLM.EMBEDDING_RELU": True,
        "MODEL.FVLM.BOX_FC_DIM": width,
        "MODEL.FVLM.SCALE": SCALE,
        "MODEL.FVLM.LEARN_SCALE": f"{_BOX}detect_temperature" in state,
        "MODEL.FVLM.FINEST_BOX_SIZE": 56.0,
        **_data_options(state, large=depth == 24),
    }


def _levels(strides: Sequence[float]) -> list[int]:
    """Pyramid levels: the base-2 logarithms of the strides."""
    return [int(math.log2(stride)) for stride in strides]


def _backbone_options(state: State, strides: Sequence[float], depth: int) -> dict[str, Any]:
    """The frozen CLIP and its pyramid."""
    return {
        "MODEL.CLIP.PRETRAINED": "random",
        "MODEL.CLIP.POSITION_RULE": "bicubic",
        "MODEL.CLIP.POSITION_GRID": 0,
        **dict(config_leaves(_clip_config(state), "MODEL.CLIP.CONFIG")),
        "MODEL.BACKBONE.NAME": "build_trunk_fpn_backbone",
        "MODEL.TRUNK.NAME": "InterpolatedTrunk",
        "MODEL.TRUNK.WINDOW_SIZE": 0,
        "MODEL.FROZEN_CLIP.BLOCKS": BLOCKS.get(depth) or [(i + 1) * depth // 4 - 1 for i in range(4)],
        "MODEL.FROZEN_CLIP.LAST_BLOCK": "value",
        "MODEL.FROZEN_CLIP.JOINT": "clipself",
        "MODEL.INTERPOLATED.SCALE_FACTORS": [4.0, 2.0, 1.0, 0.5],
        "MODEL.INTERPOLATED.NORM": "BN",
        "MODEL.FPN.IN_FEATURES": [f"res{level}" for level in _levels(strides)[:4]],
        "MODEL.FPN.OUT_CHANNELS": shown_size(
            state, ("neck.lateral_convs.0.conv.weight", 0), ("neck.fpn_convs.0.conv.weight", 0)
        ),
        "MODEL.FPN.NORM": "BN",
        "MODEL.FPN.FUSE_TYPE": "sum",
        "MODEL.FPN.TOP_BLOCK": "LastLevelMaxPool",
    }


def _head_options(state: State, strides: Sequence[float], num_classes: int) -> dict[str, Any]:
    """Anchors, proposals and box head."""
    pyramid = [f"p{level}" for level in _levels(strides)]
    rpn_bn = any(re.match(r"rpn_head\.rpn_conv\.\d+\.bn\.", key) for key in state)
    return {
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8 * stride] for stride in strides],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
        "MODEL.PROPOSAL_GENERATOR.NAME": "ProbabilityRPN",
        "MODEL.RPN.HEAD_NAME": "NormRPNHead" if rpn_bn else "StandardRPNHead",
        "MODEL.RPN.NORM": "BN",
        "MODEL.RPN.CONV_DIMS": [-1] * count_parts(state, "rpn_head.rpn_conv."),
        "MODEL.RPN.IN_FEATURES": pyramid,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 2000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "MODEL.RPN.NMS_THRESH": 0.7,
        "MODEL.ROI_HEADS.IN_FEATURES": pyramid[:4],
        "MODEL.ROI_HEADS.NUM_CLASSES": num_classes,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_CONV": count_parts(state, f"{_BOX}shared_convs."),
        "MODEL.ROI_BOX_HEAD.CONV_DIM": shown_size(state, (f"{_BOX}shared_convs.0.conv.weight", 0)),
        "MODEL.ROI_BOX_HEAD.NORM": "BN",
        "MODEL.ROI_BOX_HEAD.NUM_FC": count_parts(state, f"{_BOX}shared_fcs."),
        "MODEL.ROI_BOX_HEAD.FC_DIM": shown_size(state, (f"{_BOX}shared_fcs.0.bias", 0)),
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
    }


def _data_options(state: State, large: bool) -> dict[str, Any]:
    """Return the released settings for OV-COCO (boxes) or OV-LVIS (masks)."""
    transfer = f"{_BOX}detect_temperature" not in state
    if not any(key.startswith(_MASK) for key in state):
        return {
            "MODEL.MASK_ON": False,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01,
            "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.4,
            "TEST.DETECTIONS_PER_IMAGE": 100,
            "MODEL.FVLM.FUSION": "fvit_transfer" if transfer else "fvit",
            "MODEL.FVLM.ALPHA": 0.2 if transfer else 0.1,
            "MODEL.FVLM.BETA": 0.8,
            "MODEL.FVLM.CLIP_SCALE": 120.0 if transfer else 75.0,
            "MODEL.FVLM.SQUARE_SIZE": 896 if large else 640,
        }
    return {
        "MODEL.MASK_ON": True,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": count_parts(state, f"{_MASK}convs."),
        "MODEL.ROI_MASK_HEAD.CONV_DIM": shown_size(state, (f"{_MASK}upsample.bias", 0)),
        "MODEL.ROI_MASK_HEAD.NORM": "BN",
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
        "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 0,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 1e-4,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
        "TEST.DETECTIONS_PER_IMAGE": 300,
        "MODEL.FVLM.FUSION": "fvit_transfer" if transfer else "fvit",
        "MODEL.FVLM.ALPHA": 0.3 if transfer else 0.1,
        "MODEL.FVLM.BETA": 0.4 if large else 0.6,
        "MODEL.FVLM.CLIP_SCALE": 120.0 if transfer else 50.0,
        "MODEL.FVLM.SQUARE_SIZE": 896 if large else 1024,
    }


def _clip_config(state: State) -> dict[str, Any]:
    """Return open_clip's model_cfg of the image tower; there is no text tower."""
    try:
        vision = eva_vision_config(EVA_CLIP.convert(_visual(state)))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return {
        "embed_dim": shown_size(state, (f"{_VISUAL}head.bias", 0), (f"{_VISUAL}head.weight", 0)),
        "custom_text": True,
        "vision_cfg": {**vision, "head_width": 64},
    }


def _visual(state: State) -> dict[str, Tensor]:
    """Return the tensors of the image tower under EVA-CLIP's own names, ``visual.*``."""
    return {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith(_VISUAL)}


def _strides(state: State) -> list[float]:
    """Return the strides of the five pyramid levels in pixels."""
    patch = shown_size(state, (f"{_VISUAL}patch_embed.proj.weight", 3))
    return [patch / 4 * 2**level for level in range(5)]


FVIT = register_layout(
    ModelLayout(
        name="fvit",
        about="F-ViT as mmdetection saves it: backbone.visual.*, backbone.interpolate1.*, roi_head.*",
        matches=lambda state: all(
            any(key.startswith(prefix) for key in state)
            for prefix in (f"{_VISUAL}blocks.", "backbone.interpolate1.", _BOX)
        ),
        classes="thing_classes",
        convert=_convert,
        options=_options,
        prefixes=_prefixes,
        # the file does not say which of its classes had labels in training
        metadata=lambda *_: training_metadata(None),
        drops=(
            DropRule(
                "RoPE tables",
                re.escape(_TOWER) + r"trunk\.(blocks\.\d+\.attn\.)?rope\.(flag|freqs_(cos|sin)(_\d+)?)",
                "computed for each grid",
            ),
            DropRule(
                "unused classifier", re.escape(_BOX) + r"fc_cls\..*", "class scores come from text embeddings"
            ),
        ),
    )
)
