"""dino.txt: a vision head on DINOv2 or DINOv3 and a text encoder in one space."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from timm.layers import SwiGLU
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from clipdense.clip.towers.text import TextTower

__all__ = [
    "DinoTxtHead",
    "DinoTxtParts",
    "build_dinotxt",
    "dinotxt_state",
    "patch_text",
    "stretch_to_patches",
]

_HEAD = (
    (r"^(visual_model\.)?(head\.)?block_list\.", "blocks."),
    (r"^visual_model\.head\.", ""),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_TEXT = (
    (r"^text_model\.", ""),
    (r"^backbone\.blocks\.", "transformer.resblocks."),
    (r"^backbone\.", ""),
    (r"\.attention_norm\.", ".ln_1."),
    (r"\.ffn_norm\.", ".ln_2."),
    (r"\.attention\.qkv\.weight$", ".attn.in_proj_weight"),
    (r"\.attention\.proj\.", ".attn.out_proj."),
    (r"\.feed_forward\.fc1\.", ".mlp.c_fc."),
    (r"\.feed_forward\.fc2\.", ".mlp.c_proj."),
    (r"^head\.linear_projection\.weight$", "text_projection"),
)


class DinoTxtHead(nn.Module):
    """Transformer blocks over all tokens of the backbone, without positions, then a norm.

    Args:
        dim: width of the backbone.
        heads: number of heads, the backbone's.
        depth: number of blocks.
        hidden: width of the SwiGLU.

    Source: dino.txt (Jose et al., CVPR 2025), section 3.2.
    """

    def __init__(self, dim: int, heads: int, depth: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                TimmBlock(
                    dim,
                    heads,
                    mlp_ratio=(hidden + 0.5) / dim,  # timm truncates the product
                    qkv_bias=False,
                    init_values=1e-5,
                    act_layer=nn.SiLU,
                    norm_layer=nn.LayerNorm,  # epsilon 1e-5
                    mlp_layer=SwiGLU,
                )
                for _ in range(depth)
            )
        )
        self.ln_final = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, L, dim) of the backbone, after its norm, to tokens of the joint space."""
        y: Tensor = self.ln_final(self.blocks(tokens))
        return y

    @staticmethod
    def image_features(tokens: Tensor, prefix: int) -> Tensor:
        """Embed images (B, 2 dim): the class token and the mean of the patches; not normalised."""
        return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], 1)


@dataclass(frozen=True)
class DinoTxtParts:
    """Parts of a published dino.txt.

    Attributes:
        head: vision head.
        text: text tower; the second half of its embedding belongs to patches, the first to the class token.
        logit_scale: logarithm of the inverse temperature, or None if the file has none.
    """

    head: DinoTxtHead
    text: TextTower
    logit_scale: Tensor | None


def build_dinotxt(state: Mapping[str, Tensor], *, heads: int, text_heads: int) -> DinoTxtParts:
    """Build head and text tower from published tensors, strictly.

    Args:
        state: all tensors: of the one file for DINOv3, or of both files for DINOv2.
        heads: number of heads of the backbone.
        text_heads: number of heads of the text tower, which the tensors do not show (published: 20).

    Raises:
        RuntimeError: If keys or shapes do not fit.
    """
    visual, text = dinotxt_state(state)
    depth = 1 + max(int(key.split(".")[1]) for key in visual if key.startswith("blocks."))
    hidden, dim = visual["blocks.0.mlp.fc1_g.weight"].shape
    head = DinoTxtHead(dim, heads, depth, hidden)
    head.load_state_dict(visual)
    return DinoTxtParts(head.eval(), _text_tower(text, text_heads), state.get("logit_scale"))


def dinotxt_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename published tensors to those of `DinoTxtHead`, and of open_clip's text tower.

    The attention of open_clip's tower has biases, which are 0 here. ``logit_scale`` is in neither.
    """
    visual: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "logit_scale":
            continue
        is_text = key.startswith(("text_model.", "backbone.", "head.linear_projection."))
        name = _rename(key, _TEXT if is_text else _HEAD)
        (text if is_text else visual)[name] = value
    if "text_projection" in text:
        text["text_projection"] = text["text_projection"].T.contiguous()
    for key in [key for key in text if key.endswith("attn.in_proj_weight")]:
        text[key.replace("in_proj_weight", "in_proj_bias")] = torch.zeros(len(text[key]))
    return visual, text


def _text_tower(state: dict[str, Tensor], heads: int) -> TextTower:
    """Build open_clip's text tower."""
    blocks = {int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks.")}
    vocabulary, width = state["token_embedding.weight"].shape
    hidden = len(state["transformer.resblocks.0.mlp.c_fc.weight"])
    module = TextTransformer(
        context_length=len(state["positional_embedding"]),
        vocab_size=vocabulary,
        width=width,
        heads=heads,
        layers=len(blocks),
        mlp_ratio=hidden / width,
        output_dim=state["text_projection"].shape[1],
    )
    module.load_state_dict(state)
    return TextTower(module).eval()


def patch_text(embeddings: Tensor) -> Tensor:
    """Return class embeddings for patches from template embeddings.

    Args:
        embeddings: (K, templates, 2 dim).

    Returns:
        (K, dim): the second half of each template, normalised, averaged, and normalised.
    """
    half = F.normalize(embeddings.chunk(2, dim=-1)[1], dim=-1)
    return F.normalize(half.mean(1), dim=-1)


def stretch_to_patches(images: Tensor, patch_size: int) -> Tensor:
    """Stretch images (B, C, H, W) bicubically, without antialiasing, to whole patches."""
    height, width = (-(-side // patch_size) * patch_size for side in images.shape[-2:])
    if (height, width) == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False)


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
