"""Text-aligned DINO as CLIP models: dino.txt and Talk2DINO, each with its own text side.

`load_clip` builds them by name. Their dense map is "plain", the patches of the last map; whatever compares
dense maps with class names, such as zero-shot segmentation by the method "clip", takes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
from open_clip.model import _build_text_tower
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from clipdense.clip.aligned_configs import ALIGNED_MODELS, Part
from clipdense.clip.dinotxt import DinoTxtHead, dinotxt_state, stretch_to_patches
from clipdense.clip.layouts import OPENAI_CLIP
from clipdense.clip.talk2dino import TextProjection, projection_state
from clipdense.clip.towers import TextTower, Tower, TowerGroups, TowerOutput, TowerRequest
from clipdense.clip.towers.base import to_map
from clipdense.clip.towers.groups import around, norm_parameters

__all__ = [
    "ALIGNED_MODELS",
    "AlignedTower",
    "HalfTextTower",
    "ProjectedTextTower",
    "aligned_text",
    "aligned_visual",
    "is_aligned",
    "published_state",
]


class AlignedTower(Tower):
    """DINO, of timm, with or without dino.txt's vision head.

    Sides that are not whole patches are stretched, as dino.txt does. `TowerOutput.pre` is DINO's own map.

    Args:
        trunk: VisionTransformer or Eva of timm that takes images of any size.
        head: dino.txt's head; None: the patches of the trunk (Talk2DINO).
        part: "patches": the dense map, and for images the mean of its patches; "image": class token and mean
            of the patches side by side, and no dense map.
    """

    def __init__(self, trunk: nn.Module, head: DinoTxtHead | None, part: Part = "patches") -> None:
        nn.Module.__init__(self)
        source: Any = trunk
        self.position_rule = "bicubic"  # timm resizes the positions of the trunk itself
        self.trunk, self.head, self.part = source, head, part
        self.prefix: int = source.num_prefix_tokens
        self.stride = source.patch_embed.patch_size[0]
        self.grid, self.image_size = tuple(source.patch_embed.grid_size), tuple(source.patch_embed.img_size)
        self.embed_dim = source.embed_dim * (2 if part == "image" else 1)
        self.tap_channels, self.tap_strides = {}, {}
        if part == "image":
            self.why_no_dense = "it embeds whole images: use the model without -image in its name"

    def features(self, images: Tensor, request: TowerRequest) -> TowerOutput:
        """See `Tower.features`."""
        images = stretch_to_patches(images, self.stride)
        grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)
        tokens = self.trunk.forward_features(images)
        aligned = tokens if self.head is None else self.head(tokens)
        output = TowerOutput()
        if request.pre:
            output.pre = to_map(tokens[:, self.prefix :], grid)
        if request.dense is not None:
            output.dense = to_map(aligned[:, self.prefix :], grid)
        if request.pooled and self.part == "image":
            output.pooled = DinoTxtHead.image_features(aligned, self.prefix)
        elif request.pooled:
            output.pooled = aligned[:, self.prefix :].mean(1)
        return output

    def groups(self) -> TowerGroups:
        """See `Tower.groups`; the head is the projection."""
        before, after = around(self.trunk, self.trunk.blocks)
        positions = () if self.trunk.pos_embed is None else (self.trunk.pos_embed,)
        tokens = [
            p for p in self.trunk.parameters(recurse=False) if not any(p is table for table in positions)
        ]
        head = () if self.head is None else (self.head,)
        return TowerGroups(
            stem=(*tokens, *before),
            blocks=tuple(self.trunk.blocks),
            projection=(*after, *head),
            positions=positions,
            norms=norm_parameters(self),
            attentions=(),
        )


class HalfTextTower(TextTower):
    """dino.txt's text tower for patches: the second half of its embedding."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__(text)
        self.embed_dim //= 2

    def encode(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """See `TextTower.encode`."""
        return super().encode(embeddings, end).chunk(2, dim=-1)[1]


class ProjectedTextTower(TextTower):
    """CLIP's text tower with Talk2DINO's projection, which follows the mean over the prompts of a name.

    Args:
        text: CLIP's text tower.
        dim: dimension of the patch space.
    """

    averages_first = True

    def __init__(self, text: nn.Module, dim: int) -> None:
        super().__init__(text)
        self.projection = TextProjection(self.embed_dim, dim)
        self.embed_dim = dim

    def forward(self, tokens: Tensor) -> Tensor:
        """See `TextTower.forward`."""
        return self.finish(self.unfinished(tokens))

    def unfinished(self, tokens: Tensor) -> Tensor:
        """Embed token ids with CLIP alone."""
        return super().forward(tokens)

    def finish(self, embeddings: Tensor) -> Tensor:
        """Project embeddings of CLIP (n, D')."""
        y: Tensor = self.projection(embeddings)
        return y


def is_aligned(config: Mapping[str, Any]) -> bool:
    """Return whether a config describes a text-aligned DINO."""
    return "dino_trunk" in config["model_cfg"]["vision_cfg"]


def aligned_visual(config: Mapping[str, Any]) -> AlignedTower:
    """Build the image tower of a config, with random weights."""
    vision = config["model_cfg"]["vision_cfg"]
    arguments = {"num_classes": 0, "dynamic_img_size": True, "img_size": vision["image_size"]}
    trunk: Any = timm.create_model(vision["dino_trunk"], **arguments, **vision.get("trunk_sizes", {}))
    head = None
    if vision["head_layers"]:
        heads = trunk.blocks[0].attn.num_heads
        head = DinoTxtHead(trunk.embed_dim, heads, vision["head_layers"], vision["head_hidden"])
    return AlignedTower(trunk, head, cast(Part, vision["part"]))


def aligned_text(config: Mapping[str, Any]) -> TextTower:
    """Build the text side of a config, with random weights."""
    model = config["model_cfg"]
    settings = {key: value for key, value in model["text_cfg"].items() if key != "embed_dim"}
    module = _build_text_tower(model["text_cfg"]["embed_dim"], settings, model.get("quick_gelu", False))
    if not model["vision_cfg"]["head_layers"]:
        return ProjectedTextTower(module, model["embed_dim"])
    return HalfTextTower(module) if model["vision_cfg"]["part"] == "patches" else TextTower(module)


def published_state(states: Sequence[Mapping[str, Tensor]], visual: AlignedTower) -> dict[str, Tensor]:
    """Merge the tensors of published files under the keys of the model.

    Args:
        states: of dino.txt, its vision head and text tower (DINOv3: one file); of Talk2DINO, its projection
            and OpenAI's CLIP; and DINO's own weights, published or timm's. In any order.
        visual: the image tower, whose trunk decides how DINO's keys are read.
    """
    merged: dict[str, Tensor] = {}
    for state in states:
        if any(
            "block_list." in k or k.startswith(("visual_model.", "backbone.tok", "text_m")) for k in state
        ):
            head, text = dinotxt_state(state)
            merged |= {f"visual.head.{key}": value for key, value in head.items()}
            merged |= {f"text.{key}": value for key, value in text.items()}
            if "logit_scale" in state:
                merged["logit_scale"] = state["logit_scale"].reshape(())
        elif "linear_layer.weight" in state:
            merged |= {f"text.projection.{key}": value for key, value in projection_state(state).items()}
        elif OPENAI_CLIP.matches(state):
            clip = OPENAI_CLIP.convert(state)
            merged |= {key: value for key, value in clip.items() if key.startswith(("text.", "logit_scale"))}
        else:
            module = eva if isinstance(visual.trunk, eva.Eva) else vision_transformer
            trunk = module.checkpoint_filter_fn(dict(state), visual.trunk)
            merged |= {f"visual.trunk.{key}": value for key, value in trunk.items()}
    # published DINO files have a token for masked patches, which only their pre-training reads
    return {key: value for key, value in merged.items() if key != "visual.trunk.mask_token"}
