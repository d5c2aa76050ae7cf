"""Patch features of a second image model (DINO, DINOv2, DINOv3 from timm, or another CLIP) that steer CLIP's
last block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from clipdense.clip import ClipModel, TowerRequest, load_clip
from clipdense.clip.position import resize_table
from clipdense.clip.towers.base import to_map

__all__ = ["FeatureModel", "Output", "TowerFeatures", "build_features", "renormalize"]

CLIP_PREFIX = "clip:"
"""Begin of a name that is a CLIP's, not timm's."""

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of RGB images in 0..1."""

Output = Literal["tokens", "queries_keys", "values"]
"""Features: tokens after the final norm (ProxyCLIP), queries + keys (CorrCLIP) or values (LPOSS) of the last
attention, heads side by side."""

IMAGENET: Statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def renormalize(images: Tensor, old: Statistics, new: Statistics) -> Tensor:
    """Change the pixel statistics of normalised images (B, 3, H, W)."""
    mean, std, new_mean, new_std = (torch.tensor(v).to(images)[:, None, None] for v in (*old, *new))
    return (images * std + mean - new_mean) / new_std


class FeatureModel(nn.Module):
    """A ViT of timm that returns patch features for images of any size.

    DINO, and DINOv2 without registers, resize positions by the rule `dino_scale`; the others as timm does.

    Args:
        trunk: VisionTransformer, or Eva with an attention of fused projections (DINOv3).
        output: see `Output`.

    Raises:
        ValueError: If the output is unknown, or the trunk has no patch tokens or no fused projection.
    """

    def __init__(self, trunk: nn.Module, output: Output = "tokens") -> None:
        super().__init__()
        if output not in get_args(Output):
            raise ValueError(f"output must be one of {', '.join(get_args(Output))}, not {output!r}")
        source: Any = trunk
        if not hasattr(source, "forward_features") or not hasattr(source, "num_prefix_tokens"):
            raise ValueError(f"{type(trunk).__name__} is not a ViT of timm with patch tokens")
        if output != "tokens" and not isinstance(getattr(source.blocks[-1].attn, "qkv", None), nn.Linear):
            raise ValueError(f"{type(trunk).__name__} has no fused projection: only the output 'tokens'")
        self.trunk: Any = trunk.eval().requires_grad_(False)
        self.output = output
        self.patch_size: int = source.patch_embed.patch_size[0]
        registers = getattr(source, "reg_token", None)
        has_class_token = getattr(source, "cls_token", None) is not None
        self.dino_positions = isinstance(trunk, VisionTransformer) and has_class_token and registers is None

    @classmethod
    def create(cls, name: str, pretrained: str = "", output: Output = "tokens") -> FeatureModel:
        """Build a model of timm by name.

        Args:
            name: such as "vit_base_patch8_224.dino" or "vit_base_patch14_reg4_dinov2.lvd142m".
            pretrained: "" for the weights of the name's tag, "random", or a weight file in timm's layout.
            output: see `Output`.
        """
        arguments: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True}
        if pretrained not in ("", "random"):
            arguments["pretrained_cfg_overlay"] = {"file": pretrained}
        trunk = timm.create_model(name, pretrained=pretrained != "random", **arguments)
        return cls(trunk, output)

    @torch.no_grad()
    def forward(self, images: Tensor, statistics: Statistics) -> Tensor:
        """Compute features (B, C, h, w).

        Args:
            images: (B, 3, H, W), normalised with ``statistics``; pixels that fill no patch are dropped.
            statistics: of the images; they are changed to ImageNet's.
        """
        p = self.patch_size
        height, width = (side // p * p for side in images.shape[-2:])
        images = renormalize(images[..., :height, :width], statistics, IMAGENET)
        grid = (height // p, width // p)
        captured: list[Tensor] = []
        last = self.trunk.blocks[-1].attn
        handle = (
            None
            if self.output == "tokens"
            else last.qkv.register_forward_hook(lambda module, inputs, output: captured.append(output))
        )
        try:
            tokens = self._tokens(images, grid)
        finally:
            if handle is not None:
                handle.remove()
        if captured:
            q, k, v = captured[0].chunk(3, dim=-1)
            tokens = v if self.output == "values" else q + k
        return to_map(tokens[:, tokens.shape[1] - grid[0] * grid[1] :], grid)

    def _tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        trunk = self.trunk
        if not self.dino_positions:
            tokens: Tensor = trunk.forward_features(images)
            return tokens
        x = trunk.patch_embed.proj(images).flatten(2).transpose(1, 2)
        native = tuple(trunk.patch_embed.grid_size)
        table = trunk.pos_embed[0]
        prefix = len(table) - native[0] * native[1]
        positions = resize_table(table, native, grid, "dino_scale", prefix)
        x = torch.cat([trunk.cls_token.expand(x.shape[0], -1, -1), x], 1) + positions
        y: Tensor = trunk.norm(trunk.blocks(trunk.norm_pre(x)))
        return y


class TowerFeatures(nn.Module):
    """The image tower of a CLIP as second model: its last map before the projection, for every `Output`.

    Args:
        clip: its pixel statistics and image tower are used.
    """

    def __init__(self, clip: ClipModel) -> None:
        super().__init__()
        self.visual = clip.visual.eval().requires_grad_(False)
        self.statistics: Statistics = (clip.pixel_mean, clip.pixel_std)
        self.patch_size: int = clip.visual.stride

    @torch.no_grad()
    def forward(self, images: Tensor, statistics: Statistics) -> Tensor:
        """Compute features (B, C, h, w); see `FeatureModel.forward`."""
        images = renormalize(images, statistics, self.statistics)
        features: Tensor = self.visual(images, TowerRequest(pre=True)).pre
        return features


def build_features(
    name: str, pretrained: str = "", output: Output = "tokens"
) -> FeatureModel | TowerFeatures:
    """Build a second model.

    Args:
        name: of timm, see `FeatureModel.create`; or "clip:" and the name of a CLIP, see `load_clip`.
        pretrained: weights of the model.
        output: see `Output`.
    """
    if name.startswith(CLIP_PREFIX):
        return TowerFeatures(load_clip(name.removeprefix(CLIP_PREFIX), pretrained or None, text=False))
    return FeatureModel.create(name, pretrained, output)
