"""Layout of the published SegCLIP checkpoint (Luo et al., ICML 2023).

Sizes are read from the tensors. Heads have a width of 64, as in the released model. The published weights
were trained with mixed keys, which have no effect on the single images that it is evaluated with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from clipdense.checkpoint import ModelLayout, config_leaves, count_parts, register_layout, rename, shown_size

__all__ = ["PREFIXES", "SEGCLIP"]

State = Mapping[str, Tensor]

_HEAD_WIDTH = 64
_VISUAL = "clip.visual."
_BLOCKS = f"{_VISUAL}transformer."
_CENTERS = f"{_BLOCKS}semantic_layer2."
_DECODER = "vis_mae_decoder."
PREFIXES = {
    f"{_BLOCKS}layers0.": "visual.patch_blocks.",
    f"{_BLOCKS}layers2.": "visual.group_blocks.",
    f"{_BLOCKS}layers_mae2.": "visual.reconstruct_blocks.",
    _CENTERS: "visual.groups.",
    f"{_BLOCKS}reconstruct_layer2.rec_proj_a.": "visual.reconstruction.",
    _VISUAL: "visual.",
    "clip.logit_scale": "logit_scale",
    "clip.": "text.",
    _DECODER: "decoder.",
}
"""Key prefixes, of a published file -> of `SegCLIP`."""


def _convert(state: State) -> dict[str, Tensor]:
    return {rename(key, PREFIXES): value for key, value in state.items()}


def _options(state: State, classes: Sequence[str] | None) -> dict[str, Any]:
    width, patch = (shown_size(state, (f"{_VISUAL}conv1.weight", axis)) for axis in (0, 3))
    side = math.isqrt(shown_size(state, (f"{_VISUAL}positional_embedding", 0)) - 1)
    group_layers = count_parts(state, f"{_BLOCKS}layers2.")
    text_width = shown_size(state, ("clip.text_projection", 0))
    config = {
        "embed_dim": shown_size(state, ("clip.text_projection", 1)),
        "custom_text": True,
        "quick_gelu": True,
        "vision_cfg": {
            "layers": count_parts(state, f"{_BLOCKS}layers0.") + group_layers,
            "width": width,
            "head_width": _HEAD_WIDTH,
            "patch_size": patch,
            "image_size": side * patch,
        },
        "text_cfg": {
            "context_length": shown_size(state, ("clip.positional_embedding", 0)),
            "vocab_size": shown_size(state, ("clip.token_embedding.weight", 0)),
            "width": text_width,
            "heads": text_width // _HEAD_WIDTH,
            "layers": count_parts(state, "clip.transformer.resblocks."),
        },
    }
    options = {
        "MODEL.META_ARCHITECTURE": "SegCLIP",
        "MODEL.CLIP.NAME": "SegCLIP",
        "MODEL.CLIP.PRETRAINED": "random",
        **dict(config_leaves(config, "MODEL.CLIP.CONFIG")),
        "MODEL.SEGCLIP.CENTERS": shown_size(state, (f"{_CENTERS}semantic_center", 0)),
        "MODEL.SEGCLIP.GROUP_LAYERS": group_layers,
        "MODEL.SEGCLIP.CROSS_LAYERS": count_parts(state, f"{_CENTERS}cross_att."),
        "MODEL.SEGCLIP.RECONSTRUCT_LAYERS": count_parts(state, f"{_BLOCKS}layers_mae2."),
        "MODEL.SEGCLIP.DECODER.DEPTH": count_parts(state, f"{_DECODER}decoder_blocks."),
        "INPUT.FORMAT": "RGB",
    }
    if options["MODEL.SEGCLIP.DECODER.DEPTH"]:
        options["MODEL.SEGCLIP.DECODER.WIDTH"] = shown_size(state, (f"{_DECODER}decoder_embed.bias", 0))
    return options


SEGCLIP = register_layout(
    ModelLayout(
        name="segclip",
        about="SegCLIP: clip.visual.transformer.layers0.*, semantic_layer2.*",
        matches=lambda state: f"{_CENTERS}semantic_center" in state,
        convert=_convert,
        options=_options,
        prefixes=lambda state: PREFIXES,
        licence="none is stated in the repository of the published weights",
    )
)
