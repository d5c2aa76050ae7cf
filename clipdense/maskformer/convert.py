"""Conversion of published MaskFormer and Mask2Former models, and the parts of it that other systems share.

Sizes are read from the tensors. Settings that tensors do not show are those of the released configs: one
attention head per 32 dimensions, the stride of the ResNets' first blocks, and pixel statistics. The number of
classes selects the outputs and thresholds (133: COCO panoptic, 80: COCO instances, others: semantic).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from clipdense.checkpoint import (
    CheckpointError,
    DropRule,
    ModelLayout,
    count_parts,
    register_layout,
    rename,
    shown_size,
)

__all__ = [
    "MASK2FORMER",
    "MASKFORMER",
    "NON_COMMERCIAL",
    "backbone_options",
    "backbone_prefixes",
    "head_options",
    "head_prefixes",
]

State = Mapping[str, Tensor]

NON_COMMERCIAL = "CC BY-NC 4.0 (no commercial use)"

DROPS = (
    DropRule("window indices", r"backbone\..*\.relative_position_index", "computed for each window"),
    DropRule("class weights", r"criterion\.empty_weight", "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT sets them"),
)

_HEAD, _PIXEL, _PREDICTOR = "sem_seg_head.", "head.pixel_decoder.", "head.predictor."
_V1, _V2 = "predictor.transformer.decoder.", "predictor.transformer_cross_attention_layers."
_DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}


def backbone_prefixes(state: State) -> dict[str, str]:
    """Map the file's key prefixes of the backbone to ours; Detectron2's ResNets keep their keys."""
    if "backbone.patch_embed.proj.weight" not in state:
        return {}
    stages = range(count_parts(state, "backbone.layers."))
    return {
        "backbone.patch_embed.": "backbone.model.patch_embed.",
        **{f"backbone.layers.{i}.": f"backbone.model.layers_{i}." for i in stages},
        # the file's downsampling ends a stage, timm's begins the next
        **{f"backbone.layers.{i}.downsample.": f"backbone.model.layers_{i + 1}.downsample." for i in stages},
        **{f"backbone.norm{i}.": f"backbone.norms.res{i + 2}." for i in stages},
    }


def backbone_options(state: State) -> dict[str, Any]:
    """Derive the config keys of a Detectron2 ResNet or a Swin Transformer and of its pixel statistics.

    Raises:
        CheckpointError: If the backbone is neither of them.
    """
    pixels = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [255 * x for x in IMAGENET_DEFAULT_MEAN],
        "MODEL.PIXEL_STD": [255 * x for x in IMAGENET_DEFAULT_STD],
        "MODEL.BACKBONE.FREEZE_AT": 0,
    }
    if "backbone.patch_embed.proj.weight" in state:
        return pixels | _swin_options(state)
    blocks = tuple(count_parts(state, f"backbone.res{i}.") for i in (2, 3, 4, 5))
    if blocks not in _DEPTHS:
        raise CheckpointError(
            f"the backbone is neither a Swin Transformer nor a ResNet of depth {sorted(_DEPTHS.values())}: "
            f"it has {blocks} blocks in res2 to res5"
        )
    deeplab = "backbone.stem.conv3.weight" in state
    stem = "backbone.stem.conv3.weight" if deeplab else "backbone.stem.conv1.weight"
    trained = "backbone.stem.conv1.norm.num_batches_tracked" in state
    return pixels | {
        "MODEL.BACKBONE.NAME": "build_resnet_deeplab_backbone" if deeplab else "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH": _DEPTHS[blocks],
        "MODEL.RESNETS.NORM": "BN" if trained else "FrozenBN",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.RESNETS.STEM_OUT_CHANNELS": shown_size(state, (stem, 0), ("backbone.res2.0.conv1.weight", 1)),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": shown_size(state, ("backbone.res2.0.conv3.weight", 0)),
        "MODEL.RESNETS.WIDTH_PER_GROUP": shown_size(state, ("backbone.res2.0.conv1.weight", 0)),
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }


def _swin_options(state: State) -> dict[str, Any]:
    stages = range(count_parts(state, "backbone.layers."))
    table = "backbone.layers.{}.blocks.0.attn.relative_position_bias_table"
    sizes = {
        "embed_dim": shown_size(state, ("backbone.patch_embed.proj.weight", 0), ("backbone.norm0.weight", 0)),
        "depths": [count_parts(state, f"backbone.layers.{i}.blocks.") for i in stages],
        "num_heads": [shown_size(state, (table.format(i), 1)) for i in stages],
        "window_size": (math.isqrt(shown_size(state, *((table.format(i), 0) for i in stages))) + 1) // 2,
    }
    return {
        "MODEL.BACKBONE.NAME": "SwinTrunk",
        "MODEL.TIMM.NAME": "swin_tiny_patch4_window7_224",
        "MODEL.TIMM.PRETRAINED": "random",
        **{f"MODEL.TIMM.KWARGS.{key}": value for key, value in sizes.items()},
    }


def head_prefixes(state: State) -> dict[str, str]:
    """Map the file's key prefixes of the head to ours; also for old files without the pixel decoder's
    name."""
    old = not any(key.startswith(f"{_HEAD}pixel_decoder.") for key in state)
    return {
        _HEAD: _PIXEL if old else "head.",
        f"{_HEAD}predictor.": _PREDICTOR,
        f"{_HEAD}predictor.static_query.": f"{_PREDICTOR}query_feat.",
    }


def head_options(state: State) -> dict[str, Any]:
    """Derive the config keys of the pixel decoder and the transformer decoder.

    Args:
        state: The tensors under our keys.

    Raises:
        CheckpointError: If a tensor that shows a size is missing.
    """
    masked = any(key.startswith(f"head.{_V2}") for key in state)
    deformable = f"{_PIXEL}transformer.level_embed" in state
    encoded = any(key.startswith(f"{_PIXEL}transformer.encoder.") for key in state)
    conv_dim = shown_size(state, (f"{_PIXEL}layer_1.weight", 0), (f"{_PIXEL}mask_features.weight", 1))
    hidden = shown_size(
        state, (f"{_PREDICTOR}query_embed.weight", 1), (f"{_PREDICTOR}mask_embed.layers.0.weight", 1)
    )
    heads = max(hidden // 32, 1)
    ffn = f"{_PREDICTOR}transformer_ffn_layers.0." if masked else f"head.{_V1}layers.0."
    decoders = {
        "MODEL.MASK_FORMER.PIXEL_DECODER.NAME": "MSDeformAttnPixelDecoder"
        if deformable
        else "TransformerEncoderPixelDecoder"
        if encoded
        else "BasePixelDecoder",
        "MODEL.MASK_FORMER.PIXEL_DECODER.CONV_DIM": conv_dim,
        "MODEL.MASK_FORMER.PIXEL_DECODER.NORM": "GN" if f"{_PIXEL}layer_1.norm.weight" in state else "",
        "MODEL.MASK_FORMER.MASK_DIM": shown_size(
            state, (f"{_PIXEL}mask_features.bias", 0), (f"{_PIXEL}mask_features.weight", 0)
        ),
        "MODEL.MASK_FORMER.HIDDEN_DIM": hidden,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": shown_size(state, (f"{_PREDICTOR}query_embed.weight", 0)),
        "MODEL.MASK_FORMER.NHEADS": heads,
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD": shown_size(
            state, (f"{ffn}linear1.bias", 0), (f"{ffn}linear1.weight", 0), (f"{ffn}linear2.weight", 1)
        ),
        "MODEL.MASK_FORMER.DEC_LAYERS": count_parts(state, f"head.{_V2}" if masked else f"head.{_V1}layers."),
        "MODEL.MASK_FORMER.PRE_NORM": any(key.endswith(".encoder.norm.weight") for key in state),
        **_input_options(state, masked, encoded, conv_dim, hidden),
    }
    layers = f"{_PIXEL}transformer.encoder.layers."
    if encoded:
        decoders["MODEL.MASK_FORMER.PIXEL_DECODER.ENC_LAYERS"] = count_parts(state, layers)
    if deformable:
        samples = shown_size(state, (f"{layers}0.self_attn.attention_weights.bias", 0))
        decoders |= {
            "MODEL.MASK_FORMER.PIXEL_DECODER.POINTS": samples // (3 * heads),
            "MODEL.MASK_FORMER.PIXEL_DECODER.DIM_FEEDFORWARD": shown_size(
                state, (f"{layers}0.linear1.bias", 0), (f"{layers}0.linear1.weight", 0)
            ),
        }
    return decoders | (_MASK2FORMER_SETTINGS if masked else {})


def _input_options(state: State, masked: bool, encoded: bool, conv_dim: int, hidden: int) -> dict[str, Any]:
    """Find the map that queries attend to by its channels; if several maps fit, assume the published one."""
    projection = f"{_PREDICTOR}input_proj.{'0.' if masked else ''}weight"
    channels = state[projection].shape[1] if projection in state else hidden
    own = masked or (encoded and channels == conv_dim)
    layers = 0 if masked else count_parts(state, f"{_PREDICTOR}transformer.encoder.layers.")
    return {
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER": "MultiScaleMaskedTransformerDecoder"
        if masked
        else "StandardTransformerDecoder",
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "" if own else "res5",
        "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": projection in state and channels == hidden,
        "MODEL.MASK_FORMER.ENC_LAYERS": layers,
    }


_MASK2FORMER_SETTINGS: dict[str, Any] = {
    "MODEL.MASK_FORMER.DROPOUT": 0.0,
    "MODEL.MASK_FORMER.CLASS_WEIGHT": 2.0,
    "MODEL.MASK_FORMER.MASK_WEIGHT": 5.0,
    "MODEL.MASK_FORMER.DICE_WEIGHT": 5.0,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 12544,
    "MODEL.MASK_FORMER.TEST.PIXEL_THRESHOLD": 0.5,
}


def _prefixes(state: State) -> dict[str, str]:
    return backbone_prefixes(state) | head_prefixes(state)


def _convert(state: State) -> dict[str, Tensor]:
    prefixes = _prefixes(state)
    return {rename(key, prefixes): value for key, value in state.items()}


def _options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    ours = _convert(state)
    places = ((f"{_PREDICTOR}class_embed.bias", 0), (f"{_PREDICTOR}class_embed.weight", 0))
    num_classes = shown_size(ours, *places) - 1
    masked = any(key.startswith(f"head.{_V2}") for key in ours)
    panoptic, instances = num_classes == 133, num_classes == 80
    return {
        "MODEL.META_ARCHITECTURE": "MaskFormer",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": num_classes,
        **backbone_options(state),
        **head_options(ours),
        "MODEL.MASK_FORMER.TARGETS": "panoptic" if panoptic else "semantic",
        "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": not instances,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": panoptic,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON": instances or (panoptic and masked),
    }


def _layout(name: str, about: str, decoder: str, licence: str = "") -> ModelLayout:
    def matches(state: State) -> bool:
        linear = f"{_HEAD}predictor.class_embed.weight" in state
        return linear and any(key.startswith(_HEAD + decoder) for key in state)

    return register_layout(
        ModelLayout(
            name=name,
            about=about,
            matches=matches,
            classes="stuff_classes",
            convert=_convert,
            options=_options,
            prefixes=_prefixes,
            drops=DROPS,
            licence=licence,
        )
    )


MASKFORMER = _layout("maskformer", f"MaskFormer as Detectron2 saves it: {_HEAD}{_V1}*", _V1, NON_COMMERCIAL)
MASK2FORMER = _layout("mask2former", f"Mask2Former as Detectron2 saves it: {_HEAD}{_V2}*", _V2)
