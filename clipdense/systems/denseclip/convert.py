"""Published DenseCLIP detectors: mmdetection's RetinaNet and Mask R-CNN on CLIP RN50 and RN101.

Sizes are read from the tensors. What they cannot tell is as in the released files
(specs/denseclip_maskclip_segclip.md 1.11, 1.14, 1.15): heads of the text tower, the attention pool and the
context decoder, the temperature, the weight of the auxiliary loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from clipdense.checkpoint import CheckpointError, ModelLayout, register_layout, rename
from clipdense.clip.layouts import config_from_tensors

__all__ = ["DENSECLIP_MASK_RCNN", "DENSECLIP_RETINANET"]

State = Mapping[str, Tensor]
RATIOS = [0.5, 1.0, 2.0]

_TRUNK, _TEXT = "backbone.bottom_up.trunk.tower.", "backbone.bottom_up.text."
_LANGUAGE = {
    "backbone.": _TRUNK,
    "text_encoder.": f"{_TEXT}tower.",
    "contexts": f"{_TEXT}prompts.contexts",
    "gamma": "backbone.bottom_up.gamma",
    "context_decoder.": "backbone.bottom_up.context_decoder.",
}
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


def _retinanet_prefixes(state: State) -> dict[str, str]:
    laterals = _count(state, "neck.lateral_convs.")
    convs = _count(state, "bbox_head.cls_convs.", "bbox_head.reg_convs.")
    return {
        **_LANGUAGE,
        **_neck(laterals, first=3),
        f"neck.fpn_convs.{laterals}.conv.": "backbone.top_block.p6.",
        f"neck.fpn_convs.{laterals + 1}.conv.": "backbone.top_block.p7.",
        **{f"bbox_head.cls_convs.{i}.conv.": f"head.cls_subnet.{2 * i}." for i in range(convs)},
        **{f"bbox_head.reg_convs.{i}.conv.": f"head.bbox_subnet.{2 * i}." for i in range(convs)},
        **_RETINANET_HEAD,
    }


def _mask_rcnn_prefixes(state: State) -> dict[str, str]:
    fcs = range(_count(state, "roi_head.bbox_head.shared_fcs."))
    convs = range(_count(state, "roi_head.mask_head.convs."))
    return {
        **_LANGUAGE,
        **_neck(_count(state, "neck.lateral_convs."), first=2),
        **_MASK_RCNN_HEADS,
        **{f"roi_head.bbox_head.shared_fcs.{i}.": f"roi_heads.box_head.fc{i + 1}." for i in fcs},
        **{f"roi_head.mask_head.convs.{i}.conv.": f"roi_heads.mask_head.mask_fcn{i + 1}." for i in convs},
    }


def _neck(levels: int, first: int) -> dict[str, str]:
    return {
        f"neck.{theirs}_convs.{i}.conv.": f"backbone.fpn_{ours}{first + i}."
        for theirs, ours in (("lateral", "lateral"), ("fpn", "output"))
        for i in range(levels)
    }


def _retinanet_state(state: State) -> dict[str, Tensor]:
    anchors = _shape(state, "bbox_head.retina_reg.weight")[0] // 4
    prefixes = _retinanet_prefixes(state)
    return {
        rename(key, prefixes): _ours_of_anchors(key, value, anchors)
        if key.startswith(tuple(_RETINANET_HEAD))
        else value
        for key, value in state.items()
    }


def _ours_of_anchors(key: str, tensor: Tensor, anchors: int) -> Tensor:
    """Channels (ratio, scale, ...), mmdetection's order of anchors, as (scale, ratio, ...), Detectron2's."""
    if tensor.shape[0] % anchors:
        raise CheckpointError(f"{key} has {tensor.shape[0]} channels, not a multiple of {anchors} anchors")
    blocks = tensor.unflatten(0, (len(RATIOS), anchors // len(RATIOS), -1))
    return blocks.transpose(0, 1).flatten(0, 2)


def _mask_rcnn_state(state: State) -> dict[str, Tensor]:
    prefixes = _mask_rcnn_prefixes(state)
    return {rename(key, prefixes): value for key, value in state.items()}


def _retinanet_options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    anchors = _shape(state, "bbox_head.retina_reg.weight")[0] // 4
    scales, rest = divmod(anchors, len(RATIOS))
    if not scales or rest:
        raise CheckpointError(f"bbox_head.retina_reg has {anchors} anchors, not a multiple of {len(RATIOS)}")
    num_classes = _shape(state, "bbox_head.retina_cls.weight")[0] // anchors
    sizes = [[4 * 2**level * 2 ** (i / scales) for i in range(scales)] for level in range(3, 8)]
    return {
        "MODEL.META_ARCHITECTURE": "DenseCLIPRetinaNet",
        **_language_options(state, num_classes, classes),
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.FPN.TOP_BLOCK": "LastLevelP6P7NoReLU",
        "MODEL.ANCHOR_GENERATOR.SIZES": sizes,
        "MODEL.RETINANET.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        "MODEL.RETINANET.NUM_CLASSES": num_classes,
        "MODEL.RETINANET.NUM_CONVS": _count(state, "bbox_head.cls_convs.", "bbox_head.reg_convs."),
        "MODEL.RETINANET.LOW_QUALITY_MATCHES": "mmdet",
        "MODEL.RETINANET.LOSS_NORMALIZER": "batch",
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0.0,
        "MODEL.RETINANET.DELTA_CLAMP": "both",
        "MODEL.RETINANET.TEST_CANDIDATES": "anchors",
        "MODEL.RETINANET.CLIP_BEFORE_NMS": True,
    }


def _mask_rcnn_options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    num_classes = _shape(state, "roi_head.bbox_head.fc_cls.weight")[0] - 1
    fc_dim, flattened = _shape(state, "roi_head.bbox_head.shared_fcs.0.weight")
    channels = _shape(state, "neck.fpn_convs.0.conv.weight")[0]
    return {
        "MODEL.META_ARCHITECTURE": "DenseCLIPRCNN",
        **_language_options(state, num_classes, classes),
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
        "MODEL.ROI_BOX_HEAD.NUM_FC": _count(state, "roi_head.bbox_head.shared_fcs."),
        "MODEL.ROI_BOX_HEAD.FC_DIM": fc_dim,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": round((flattened / channels) ** 0.5),
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": _count(state, "roi_head.mask_head.convs."),
        "MODEL.ROI_MASK_HEAD.CONV_DIM": _shape(state, "roi_head.mask_head.upsample.weight")[1],
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
    }


def _language_options(state: State, num_classes: int, classes: Sequence[str] | None) -> dict[str, Any]:
    """Of the backbone, which both detectors share."""
    if classes and len(classes) != num_classes:
        raise CheckpointError(f"heads of {num_classes} classes, but {len(classes)} names of classes")
    towers = {"backbone.": "visual.", "text_encoder.": "text."}
    try:
        width = _shape(state, "backbone.layer1.0.conv1.weight")[0]
        # 32 heads in the attention pool, whatever the width: its tokens are 32 times as wide.
        clip = config_from_tensors(
            {rename(key, towers): value for key, value in state.items() if key.startswith(tuple(towers))},
            head_width=width,
            text_heads=8,
        )
    except (KeyError, ValueError) as e:
        raise CheckpointError(f"its tensors determine no CLIP ({e})") from e
    trunk_channels = _shape(state, "backbone.layer4.0.conv3.weight")[0]
    scored = _shape(state, f"neck.lateral_convs.{_count(state, 'neck.lateral_convs.') - 1}.conv.weight")[1]
    return {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [255 * x for x in OPENAI_DATASET_MEAN],
        "MODEL.PIXEL_STD": [255 * x for x in OPENAI_DATASET_STD],
        "MODEL.BACKBONE.NAME": "build_trunk_fpn_backbone",
        "MODEL.FPN.OUT_CHANNELS": _shape(state, "neck.fpn_convs.0.conv.weight")[0],
        "MODEL.FPN.NORM": "",
        "MODEL.FPN.FUSE_TYPE": "sum",
        "MODEL.TRUNK.NAME": "LanguageTrunk",
        "MODEL.TRUNK.OUT_FEATURES": [],
        "MODEL.TRUNK.NORM": "BN",
        "MODEL.CLIP.PRETRAINED": "random",
        "MODEL.CLIP.POSITION_RULE": "crop",
        "MODEL.CLIP.POSITION_GRID": clip["vision_cfg"]["image_size"] // 32,
        **dict(_leaves({"MODEL": {"CLIP": {"CONFIG": {**clip, "quick_gelu": True}}}})),
        "MODEL.LANGUAGE.TRUNK": "CLIPTrunk",
        **({"MODEL.LANGUAGE.CLASSES": list(classes)} if classes else {}),
        "MODEL.LANGUAGE.N_CONTEXTS": _shape(state, "contexts")[1],
        "MODEL.LANGUAGE.CONTEXT_DECODER.ENABLED": True,
        "MODEL.LANGUAGE.CONTEXT_DECODER.WIDTH": _shape(state, "context_decoder.text_proj.1.weight")[0],
        "MODEL.LANGUAGE.CONTEXT_DECODER.HEADS": 4,
        "MODEL.LANGUAGE.CONTEXT_DECODER.LAYERS": _count(state, "context_decoder.decoder."),
        "MODEL.LANGUAGE.TAU": 0.07,
        "MODEL.LANGUAGE.SCORE": "scaled",
        "MODEL.LANGUAGE.LAST_MAP": "trunk" if scored == trunk_channels + num_classes else "dense",
        "MODEL.PIXEL_TEXT.SOURCE": "boxes",
        "MODEL.PIXEL_TEXT.WEIGHT": 1.0,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [RATIOS],
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
    }


def _leaves(node: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield key, node
        return
    for name, child in node.items():
        yield from _leaves(child, f"{key}.{name}" if key else name)


def _count(state: State, *prefixes: str) -> int:
    """How many numbered parts there are below the prefixes, by the highest number."""
    numbers = (re.match(r"\d+", key.removeprefix(p)) for p in prefixes for key in state if key.startswith(p))
    return 1 + max((int(number[0]) for number in numbers if number), default=-1)


def _shape(state: State, key: str) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"it lacks {key}, from which sizes are read")
    return tuple(state[key].shape)


def _is_detector(head: str) -> Callable[[State], bool]:
    """Whether keys are of a DenseCLIP with such a head, which may lack a few."""
    return lambda state: all(
        any(key.startswith(prefix) for key in state)
        for prefix in ("backbone.attnpool.", "text_encoder.", "context_decoder.", "neck.", head)
    )


DENSECLIP_RETINANET = register_layout(
    ModelLayout(
        name="denseclip_retinanet",
        about="DenseCLIP's RetinaNet as mmdetection saves it: backbone.*, text_encoder.*, bbox_head.*",
        matches=_is_detector("bbox_head."),
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
        convert=_mask_rcnn_state,
        options=_mask_rcnn_options,
        prefixes=_mask_rcnn_prefixes,
    )
)
