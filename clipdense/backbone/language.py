"""DenseCLIP's language-guided backbone: a trunk that scores every position against every class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn

from clipdense.backbone.class_text import ClassTable, ClassText
from clipdense.backbone.clip_trunk import CLIPTrunk, clip_from_config
from clipdense.backbone.context_decoder import ContextDecoder
from clipdense.backbone.trunk import SCORE
from clipdense.clip.position import resize_table
from clipdense.clip.towers.base import to_map
from clipdense.clip.towers.resnet import attention_pool
from clipdense.data.classes import class_names

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

__all__ = ["DensePool", "LanguageTrunk"]


@BACKBONE_REGISTRY.register()
class LanguageTrunk(Backbone):
    """A trunk with class scores on its last map (Rao et al., DenseCLIP, CVPR 2022, section 3).

    The trunk gives maps, a global feature g and a dense map z, both in the text's space; t are the class
    embeddings:

        t' = t + gamma * decoder(t, [g; z])        (context-aware prompting; without decoder t' = t)
        s  = cos(z, t') / tau                      (score map)

    s is concatenated to the trunk's map of the same stride, and given as "score". It is a trunk itself: feed
    it to an FPN or a simple feature pyramid, which pass "score" on, or use it as it is.
    """

    @configurable
    def __init__(
        self,
        trunk: Backbone,
        text: ClassText | ClassTable,
        *,
        context_decoder: ContextDecoder | None = None,
        gamma: float = 1e-4,
        tau: float = 0.07,
        concatenate: str = "scaled",
        last_map: str = "trunk",
    ) -> None:
        """
        Args:
            trunk: a `CLIPTrunk` with ``joint``, whose projection gives g and z; any other gets an attention
                pool with random weights over its last map.
            text: of the K classes.
            context_decoder: of the text's dimension; None for class embeddings that do not see the image.
            gamma: every entry of the learned vector at the start.
            tau: temperature, not learned.
            concatenate: "scaled" appends s (as published detectors), "cosine" s * tau (published segmentors).
            last_map: "trunk", or "dense": z replaces the trunk's map of its stride, before s is appended
                (published as att_level3).

        Raises:
            ValueError: text and trunk of different dimensions, no map at the stride of z, unknown choices.
        """
        super().__init__()
        if concatenate not in ("scaled", "cosine"):
            raise ValueError(f"MODEL.LANGUAGE.SCORE must be scaled or cosine, not {concatenate!r}")
        if last_map not in ("trunk", "dense"):
            raise ValueError(f"MODEL.LANGUAGE.LAST_MAP must be trunk or dense, not {last_map!r}")
        shapes = dict(trunk.output_shape())
        self.trunk = trunk
        self.pool: DensePool | None = None
        if isinstance(trunk, CLIPTrunk):
            dim, stride = trunk.tower.embed_dim, trunk.tower.stride
        else:
            last = list(shapes.values())[-1]
            self.pool = DensePool(last.channels, text.embed_dim)
            dim, stride = text.embed_dim, last.stride
        if dim != text.embed_dim:
            raise ValueError(
                f"the trunk's joint space has {dim} dimensions, the class embeddings {text.embed_dim}"
            )
        scored = [name for name, shape in shapes.items() if shape.stride == stride]
        if not scored:
            raise ValueError(
                f"the score map has stride {stride}, the trunk gives "
                f"{ {name: shape.stride for name, shape in shapes.items()} }: "
                "leave that map in MODEL.TRUNK.OUT_FEATURES"
            )
        self.scored = scored[-1]
        self.text = text
        self.context_decoder = context_decoder
        self.gamma = nn.Parameter(torch.full((dim,), gamma)) if context_decoder is not None else None
        self.tau = tau
        self.scaled, self.dense_last = concatenate == "scaled", last_map == "dense"
        classes = len(text.classes)
        channels = (dim if self.dense_last else shapes[self.scored].channels) + classes
        shapes[self.scored] = ShapeSpec(channels=channels, stride=stride)
        self._shapes = shapes | {SCORE: ShapeSpec(channels=classes, stride=stride)}

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, Any]:
        keys = cfg.MODEL.LANGUAGE
        trunk_class = BACKBONE_REGISTRY.get(keys.TRUNK)
        joint = {"joint": True} if trunk_class is CLIPTrunk else {}
        decoder = keys.CONTEXT_DECODER
        text = build_class_text(cfg)
        return {
            "trunk": trunk_class(cfg, input_shape, **joint),
            "text": text,
            "context_decoder": ContextDecoder(
                text.embed_dim,
                width=decoder.WIDTH,
                heads=decoder.HEADS,
                layers=decoder.LAYERS,
                dropout=decoder.DROPOUT,
            )
            if decoder.ENABLED
            else None,
            "gamma": keys.GAMMA,
            "tau": keys.TAU,
            "concatenate": keys.SCORE,
            "last_map": keys.LAST_MAP,
        }

    @property
    def size_divisibility(self) -> int:
        return self.trunk.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The trunk's, where the installed detectron2 has them."""
        return getattr(self.trunk, "padding_constraints", {})

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every map, by name, "score" last."""
        return dict(self._shapes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) -> the trunk's maps with the scores on one, and "score" (B, K, h,
        w), which are logits s.
        """
        maps, g, z = self._joint(images)
        score = self.score(g, z)
        last = z if self.dense_last else maps[self.scored]
        maps[self.scored] = torch.cat([last, score if self.scaled else score * self.tau], dim=1)
        return {**maps, SCORE: score}

    def score(self, g: Tensor, z: Tensor) -> Tensor:
        """Global features (B, D) and dense maps (B, D, h, w) -> s (B, K, h, w)."""
        t = self.refine(self.text().expand(len(z), -1, -1), g, z)
        return torch.einsum("bdhw,bkd->bkhw", F.normalize(z, dim=1), F.normalize(t, dim=2)) / self.tau

    def refine(self, t: Tensor, g: Tensor, z: Tensor) -> Tensor:
        """Class embeddings t (B, K, D), global features (B, D), dense maps (B, D, h, w) -> t' (B, K, D)."""
        if self.context_decoder is None or self.gamma is None:
            return t
        memory = torch.cat([g[:, None], z.flatten(2).transpose(1, 2)], dim=1)
        refined: Tensor = t + self.gamma * self.context_decoder(t, memory)
        return refined

    def _joint(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        if isinstance(self.trunk, CLIPTrunk):
            return self.trunk.forward_joint(images)
        assert self.pool is not None
        maps: dict[str, Tensor] = dict(self.trunk(images))
        return maps, *self.pool(maps[self.scored])


class DensePool(nn.Module):
    """An attention pool with random weights that gives a trunk without language g and z (DenseCLIP, section
    4.3: "any backbone").
    """

    def __init__(self, channels: int, dim: int, grid: int = 7) -> None:
        """
        Args:
            channels: C of the trunk's last map.
            dim: D of the text.
            grid: side of the position table, resized bilinearly to every map.
        """
        super().__init__()
        heads = max(h for h in range(1, max(channels // 64, 1) + 1) if channels % h == 0)
        self.grid = (grid, grid)
        self.attnpool = AttentionPool2d(grid, channels, heads, dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) -> g (B, D), z (B, D, h, w)."""
        grid = (features.shape[2], features.shape[3])
        positions = resize_table(self.attnpool.positional_embedding, self.grid, grid, "bilinear")
        tokens = attention_pool(self.attnpool, features, positions, every_query=True)
        return tokens[:, 0], to_map(tokens[:, 1:], grid)


def build_class_text(cfg: CN) -> ClassText | ClassTable:
    """The class embeddings that MODEL.LANGUAGE and MODEL.CLIP describe."""
    keys = cfg.MODEL.LANGUAGE
    classes: Sequence[str] = keys.CLASSES or class_names(cfg, keys.CLASSES_FROM)
    if keys.TEXT == "table":
        return ClassTable(classes, keys.TABLE_DIM)
    if keys.TEXT != "tower":
        raise ValueError(f"MODEL.LANGUAGE.TEXT must be tower or table, not {keys.TEXT!r}")
    return ClassText(clip_from_config(cfg), classes, n_ctx=keys.N_CONTEXTS, trainable=not keys.FREEZE_TEXT)
