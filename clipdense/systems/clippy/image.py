"""CLIPpy's image side: a ViT whose patches are pooled by their maximum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import timm
import torch
from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from clipdense.backbone.timm_weights import load_timm_weights
from clipdense.clip.attention import TokenStream
from clipdense.clip.finetune import freeze_unused
from clipdense.clip.towers import Tower, TowerRequest, TransformerTower, build_tower

__all__ = ["ImageSource", "PatchDrop", "PatchEncoder", "Pooling", "timm_tower"]

ImageSource = Literal["clip", "timm"]
Pooling = Literal["max", "mean", "class"]


class PatchDrop:
    """Block hook that lets each image keep a random part of its patches, drawn anew for every forward.

    With RoPE, all images of a batch keep the same patches, as they share one table.

    Args:
        share: of the patches that are dropped, 0 to below 1; at least one patch is kept.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, index: int, stream: TokenStream) -> TokenStream:
        """Drop patches before block 0; see `BlockHook`. The kept ones form a grid of one row."""
        if index != 0:
            return stream
        batch, count = len(stream.x), stream.grid[0] * stream.grid[1]
        kept = max(1, count - round(self.share * count))
        noise = torch.rand(1 if stream.rope is not None else batch, count, device=stream.x.device)
        places = noise.argsort(1)[:, :kept].sort(1).values
        rope = stream.rope
        if rope is not None:
            rope = (rope[0][places[0]], rope[1][places[0]])
        before = stream.x[:, : stream.x.shape[1] - count]
        index_ = places.expand(batch, -1)[:, :, None].expand(-1, -1, stream.x.shape[2])
        patches = stream.patches.gather(1, index_)
        return replace(stream, x=torch.cat([before, patches], 1), grid=(1, kept), rope=rope)


class PatchEncoder(nn.Module):
    """Image tower with an aggregation of its patches.

    Patches are those after the final norm and, for a CLIP, its projection.

    Args:
        tower: image tower with a dense map.
        pooling: image embedding: "max" or "mean" over the patches, or "class", the tower's own.
        token_drop: share of the patches that is dropped in training, see `PatchDrop`.

    Raises:
        ValueError: If the tower has no dense map, or patches are to be dropped and it is not a ViT.

    Source: Ranasinghe et al., Perceptual Grouping in Contrastive Vision-Language Models, ICCV 2023,
        section 3.
    """

    def __init__(self, tower: Tower, *, pooling: Pooling = "max", token_drop: float = 0.0) -> None:
        super().__init__()
        if "plain" not in tower.dense_modes:
            raise tower.cannot("patches for CLIPpy", tower.why_no_dense)
        if token_drop and not isinstance(tower, TransformerTower):
            raise tower.cannot("dropped patches", "only ViTs can: set MODEL.CLIPPY.TOKEN_DROP 0")
        self.tower, self.pooling = tower, pooling
        self.request = TowerRequest(pooled=True) if pooling == "class" else TowerRequest(dense="plain")
        freeze_unused(tower, self.request)
        self.drop = PatchDrop(token_drop) if token_drop else None

    def patches(self, images: Tensor) -> Tensor:
        """Embed the patches of normalised images (B, 3, H, W) as (B, D, h, w), not L2-normalised."""
        dense: Tensor = self.tower(images, TowerRequest(dense="plain")).dense
        return dense

    def forward(self, images: Tensor) -> Tensor:
        """Embed normalised images (B, 3, H, W) as (B, D), not L2-normalised."""
        dropped = self.drop is not None and self.training
        arguments: dict[str, Any] = {"hook": self.drop} if dropped else {}
        out = self.tower(images, self.request, **arguments)
        if self.pooling == "class":
            pooled: Tensor = out.pooled
            return pooled
        x: Tensor = out.dense.flatten(2)
        return x.amax(2) if self.pooling == "max" else x.mean(2)


def timm_tower(
    name: str, pretrained: str = "", *, allow_pickle: bool = False
) -> tuple[Tower, tuple[float, ...], tuple[float, ...]]:
    """Build a tower from a ViT of timm, such as DINO, without a head: its joint space is that of its tokens.

    Args:
        name: timm model name, such as "vit_base_patch16_224".
        pretrained: a timm tag such as "dino", a weight file in timm's layout, or "random".
        allow_pickle: whether a weight file may be a pickle.

    Returns:
        The tower, and mean and standard deviation of its pixels, RGB in 0..1.

    Raises:
        ValueError: If the model is unknown or not a ViT. See also `load_timm_weights`.
    """
    if not timm.is_model(name):
        raise ValueError(f"MODEL.TIMM.NAME: timm has no model {name!r}")
    arguments = {"num_classes": 0}
    with torch.device("meta"):
        probe = timm.create_model(name, pretrained=False, **arguments)
    if not isinstance(probe, VisionTransformer):
        raise ValueError(f"MODEL.TIMM.NAME: {name} is not a ViT of timm, whose patches CLIPpy needs")
    trunk: Any = load_timm_weights(probe, name, pretrained, allow_pickle=allow_pickle, kwargs=arguments)
    visual = _HeadlessModel(trunk)
    statistics = timm.get_pretrained_cfg(name) if pretrained in ("", "random") else trunk.pretrained_cfg
    mean, std = _statistics(statistics)
    return build_tower(visual), mean, std


def _statistics(source: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if isinstance(source, dict):
        return tuple(source["mean"]), tuple(source["std"])
    return tuple(source.mean), tuple(source.std)


class _HeadlessModel(TimmModel):
    """open_clip's adapter around a timm trunk that is built already, without a projection."""

    def __init__(self, trunk: Any) -> None:
        nn.Module.__init__(self)  # TimmModel.__init__ only builds registered trunks
        self.trunk, self.head = trunk, nn.Sequential()
        self.image_size = tuple(trunk.patch_embed.img_size)
