"""DenseCLIP's language-guided backbone: a trunk with a score per position and class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn

from clipdense.backbone.class_text import ClassTable, ClassText
from clipdense.backbone.clip_blocks import CLIPBlockTrunk
from clipdense.backbone.clip_trunk import CLIPTrunk, clip_from_config
from clipdense.backbone.frozen_clip import FrozenCLIPTrunk
from clipdense.backbone.prompting import build_class_prompts, image_dependent_key
from clipdense.backbone.trunk import SCORE
from clipdense.clip.context_decoder import ContextDecoder
from clipdense.clip.position import resize_table
from clipdense.clip.towers.base import to_map
from clipdense.clip.towers.resnet import attention_pool, value_map
from clipdense.data.classes import class_names

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

__all__ = ["DensePool", "LanguageTrunk"]


@BACKBONE_REGISTRY.register()
class LanguageTrunk(Backbone):
    """A trunk with class scores appended to its last map.

    The trunk computes maps, a global feature g and a dense map z, both in the embedding space of the text.
    With class embeddings t:

        t' = t + gamma * decoder(t, [g; z])        (context-aware prompting; without decoder t' = t)
        s  = cos(z, t') / tau                      (score map)

    s is concatenated to the trunk's map of the same stride, and returned as "score". The result is a trunk
    itself: use it below an FPN or a simple feature pyramid, which pass "score" on, or alone.

    Source: Rao et al., DenseCLIP, CVPR 2022, section 3.
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
        pool_dense: str = "plain",
    ) -> None:
        """
        Args:
            trunk: a `CLIPTrunk` with ``joint``, whose projection computes g and z. Any other trunk gets an
                attention pool with random weights over its last map.
            text: embeddings of the K classes.
            context_decoder: decoder of the text's dimension; None: class embeddings ignore the image.
            gamma: initial value of every entry of the learned vector gamma.
            tau: temperature, not learned.
            concatenate: what is appended: "scaled", s (published detectors); "cosine", s * tau (published
                segmentors); or "centred", the cosines minus their mean over the classes at each position.
            last_map: what it is appended to: "trunk", the trunk's map of the stride of z, or "dense", z
                instead of that map (att_level3 of the published code).
            pool_dense: mode of z of the attention pool of a trunk that is not CLIP's, see `DensePool`. A
                `CLIPTrunk` has its own.

        Raises:
            ValueError: If the dimensions of text and trunk differ, if the trunk has no map of the stride of
                z, or if a choice is unknown.
        """
        super().__init__()
        if concatenate not in ("scaled", "cosine", "centred"):
            raise ValueError(f"MODEL.LANGUAGE.SCORE must be scaled, cosine or centred, not {concatenate!r}")
        if last_map not in ("trunk", "dense"):
            raise ValueError(f"MODEL.LANGUAGE.LAST_MAP must be trunk or dense, not {last_map!r}")
        shapes = dict(trunk.output_shape())
        self.trunk = trunk
        self.pool: DensePool | None = None
        if isinstance(trunk, CLIPTrunk):
            if not trunk.joint or isinstance(trunk, FrozenCLIPTrunk):
                raise ValueError(
                    f"MODEL.LANGUAGE.TRUNK: a {type(trunk).__name__} gives no dense map for a score map: use "
                    "CLIPTrunk, with MODEL.BACKBONE.FREEZE_AT 5 to freeze it"
                )
            dim, stride = trunk.tower.embed_dim, trunk.tower.stride
        else:
            last = list(shapes.values())[-1]
            self.pool = DensePool(last.channels, text.embed_dim, dense=pool_dense)
            dim, stride = text.embed_dim, last.stride
        if dim != text.embed_dim:
            raise ValueError(
                f"the trunk's joint space has {dim} dimensions, the class embeddings have {text.embed_dim}"
            )
        scored = [name for name, shape in shapes.items() if shape.stride == stride]
        if not scored:
            raise ValueError(
                f"the score map has stride {stride}, but the trunk's maps have "
                f"{ {name: shape.stride for name, shape in shapes.items()} }: "
                "add the map of that stride to MODEL.TRUNK.OUT_FEATURES"
            )
        self.scored = scored[-1]
        self.text = text
        self.context_decoder = context_decoder
        self.gamma = nn.Parameter(torch.full((dim,), gamma)) if context_decoder is not None else None
        self.tau = tau
        self.concatenate, self.dense_last = concatenate, last_map == "dense"
        classes = len(text.classes)
        channels = (dim if self.dense_last else shapes[self.scored].channels) + classes
        shapes[self.scored] = ShapeSpec(channels=channels, stride=stride)
        self._shapes = shapes | {SCORE: ShapeSpec(channels=classes, stride=stride)}
        self.reads_global_feature = context_decoder is not None or getattr(text, "image_dependent", False)
        if not self.reads_global_feature:
            self._freeze_global_feature()

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, Any]:
        keys = cfg.MODEL.LANGUAGE
        trunk_class = BACKBONE_REGISTRY.get(keys.TRUNK)
        is_clip = trunk_class in (CLIPTrunk, CLIPBlockTrunk)
        joint = {"joint": True, "dense": keys.DENSE} if is_clip else {}
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
            "pool_dense": keys.DENSE,
        }

    @property
    def size_divisibility(self) -> int:
        """Divisor of the padded images' height and width, which is the trunk's."""
        return self.trunk.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The trunk's padding constraints; empty if the installed detectron2 has none."""
        return getattr(self.trunk, "padding_constraints", {})

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every map, by name, "score" last."""
        return dict(self._shapes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the trunk's maps with the scores appended to one, and the score map.

        Args:
            images: normalised images (B, 3, H, W).

        Returns:
            Maps by name; "score" is s (B, K, h, w), logits.
        """
        maps, g, z = self._joint(images)
        score = self.score(g, z)
        last = z if self.dense_last else maps[self.scored]
        maps[self.scored] = torch.cat([last, self.appended(score)], dim=1)
        return {**maps, SCORE: score}

    def appended(self, score: Tensor) -> Tensor:
        """Convert s (B, K, h, w) to the channels that are appended to a map."""
        if self.concatenate == "scaled":
            return score
        cosine = score * self.tau
        return cosine - cosine.mean(1, keepdim=True) if self.concatenate == "centred" else cosine

    def joint_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features whose cosines the score map shows.

        Args:
            images: normalised images (B, 3, H, W).

        Returns:
            z (B, D, h, w) and t' (B, K, D), both L2-normalised over D.
        """
        _, g, z = self._joint(images)
        t = self.refine(self.class_embeddings(g, z), g, z)
        return F.normalize(z, dim=1), F.normalize(t, dim=2)

    def score(self, g: Tensor | None, z: Tensor) -> Tensor:
        """Compute s (B, K, h, w) from global features g (B, D) and dense maps z (B, D, h, w).

        g is read only by a context decoder and by prompts that depend on the image.
        """
        t = self.refine(self.class_embeddings(g, z), g, z)
        return torch.einsum("bdhw,bkd->bkhw", F.normalize(z, dim=1), F.normalize(t, dim=2)) / self.tau

    def class_embeddings(self, g: Tensor | None, z: Tensor) -> Tensor:
        """Return t (B, K, D) of each image, which prompts may compute from g and z."""
        if isinstance(self.text, ClassText) and self.text.image_dependent:
            return self.text(g, z)
        return self.text().expand(z.shape[0], -1, -1)

    def refine(self, t: Tensor, g: Tensor | None, z: Tensor) -> Tensor:
        """Compute t' (B, K, D) from t (B, K, D), global features g (B, D) and dense maps z (B, D, h, w)."""
        if self.context_decoder is None or self.gamma is None:
            return t
        assert g is not None
        memory = torch.cat([g[:, None], z.flatten(2).transpose(1, 2)], dim=1)
        refined: Tensor = t + self.gamma * self.context_decoder(t, memory)
        return refined

    def _joint(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
        if isinstance(self.trunk, CLIPTrunk):
            return self.trunk.forward_joint(images, pooled=self.reads_global_feature)
        assert self.pool is not None
        maps: dict[str, Tensor] = dict(self.trunk(images))
        return maps, *self.pool(maps[self.scored])

    def _freeze_global_feature(self) -> None:
        """Freeze what only the global feature depends on: no loss reaches it without a context decoder."""
        if self.pool is not None:
            self.pool.freeze_global_feature()
        elif isinstance(self.trunk, CLIPTrunk) and self.trunk.dense != "plain":
            self.trunk.freeze_global_feature(unread=(self.scored,) if self.dense_last else ())


class DensePool(nn.Module):
    """An attention pool with random weights, which computes g and z for a trunk that is not CLIP's.

    Source: Rao et al., DenseCLIP, CVPR 2022, section 4.3 ("any backbone").
    """

    def __init__(self, channels: int, dim: int, grid: int = 7, dense: str = "plain") -> None:
        """
        Args:
            channels: C, of the trunk's last map.
            dim: D, of the text embeddings.
            grid: side of the position table, which is resized bilinearly to every map.
            dense: "plain", every position is a query of the attention; or "value", the projected values
                without attention.

        Raises:
            ValueError: If the mode is unknown.
        """
        super().__init__()
        if dense not in ("plain", "value"):
            raise ValueError(
                f"MODEL.LANGUAGE.DENSE must be plain or value for a trunk that is not CLIP's, not {dense!r}"
            )
        self.dense = dense
        heads = max(h for h in range(1, max(channels // 64, 1) + 1) if channels % h == 0)
        self.grid = (grid, grid)
        self.attnpool = AttentionPool2d(grid, channels, heads, dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, h, w) to g (B, D) and z (B, D, h, w)."""
        grid = (features.shape[2], features.shape[3])
        positions = resize_table(self.attnpool.positional_embedding, self.grid, grid, "bilinear")
        if self.dense == "value":
            g = attention_pool(self.attnpool, features, positions)[:, 0]
            return g, value_map(self.attnpool, features)
        tokens = attention_pool(self.attnpool, features, positions, every_query=True)
        return tokens[:, 0], to_map(tokens[:, 1:], grid)

    def freeze_global_feature(self) -> None:
        """Freeze the parameters that z does not depend on."""
        if self.dense == "value":
            for module in (self.attnpool.q_proj, self.attnpool.k_proj):
                module.requires_grad_(False)
            self.attnpool.positional_embedding.requires_grad_(False)


def build_class_text(cfg: CN) -> ClassText | ClassTable:
    """Build the class embeddings that MODEL.LANGUAGE and MODEL.CLIP describe.

    Raises:
        ValueError: If MODEL.LANGUAGE.TEXT is unknown. See also `ClassText`.
    """
    keys = cfg.MODEL.LANGUAGE
    classes: Sequence[str] = keys.CLASSES or class_names(cfg, keys.CLASSES_FROM)
    if keys.TEXT == "table" and (key := image_dependent_key(cfg)):
        raise ValueError(
            f"MODEL.LANGUAGE.TEXT table: with MODEL.PROMPT.{key} {cfg.MODEL.PROMPT[key]}, class embeddings "
            "depend on the image, so that no table can hold them; set TEXT tower"
        )
    if keys.TEXT == "table":
        return ClassTable(classes, keys.TABLE_DIM)
    if keys.TEXT != "tower":
        raise ValueError(f"MODEL.LANGUAGE.TEXT must be tower or table, not {keys.TEXT!r}")
    clip = clip_from_config(cfg, in_backbone=True)
    return ClassText(
        clip,
        classes,
        n_ctx=keys.N_CONTEXTS,
        context_std=keys.CONTEXT_STD,
        context_words=keys.CONTEXT_WORDS,
        trainable=not keys.FREEZE_TEXT,
        prompts=build_class_prompts(cfg, clip, classes),
    )
