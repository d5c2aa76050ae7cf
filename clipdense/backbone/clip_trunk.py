"""CLIP image towers as trunks."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from clipdense.backbone.prompting import build_visual_prompts
from clipdense.backbone.trunk import NUM_STAGES, PixelConversion, Trunk, feature_name
from clipdense.clip.attention import TokenStream
from clipdense.clip.finetune import freeze_unused
from clipdense.clip.model import ClipModel, build_clip, load_clip
from clipdense.clip.sources import without_weights
from clipdense.clip.towers import Tower, TowerOutput, TowerRequest, TransformerTower
from clipdense.clip.towers.groups import parameters_of
from clipdense.clip.visual_prompts import VisualPrompts, chain_hooks

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY


@BACKBONE_REGISTRY.register()
class CLIPTrunk(Trunk):
    """A CLIP image tower without its projection.

    ResNet and ConvNeXt towers return C2 to C5 as "res2" to "res5". A ViT returns the tokens of its last
    block, before the final norm, as one map named by its stride (16 -> "res4"), for the simple feature
    pyramid. The tower keeps the parts that the maps do not need (attention pool, projection); they are not
    trained.
    """

    @configurable
    def __init__(
        self,
        tower: Tower | ClipModel,
        *,
        out_features: Sequence[str] = (),
        freeze_at: int = 0,
        norm: str = "BN",
        window_size: int = 0,
        global_blocks: Collection[int] = (),
        joint: bool = False,
        pixels: PixelConversion | None = None,
        dense: str = "plain",
        visual_prompts: VisualPrompts | None = None,
    ) -> None:
        """
        Args:
            tower: the image tower of a `ClipModel`, or the model.
            out_features: names of the maps to return, e.g. ("res2", "res3"); empty: all. Later stages are not
                run.
            freeze_at, norm: see :class:`Trunk`.
            window_size: ViTs: side of the attention windows in tokens; 0: every block attends to the whole
                image.
            global_blocks: ViTs: indices, from 0, of the blocks without windows.
            joint: whether :meth:`forward_joint` is used. The projection into the joint space then belongs to
                the last stage and is trained with it.
            pixels: see :class:`Trunk`.
            dense: mode of the dense map of :meth:`forward_joint`, one of the tower's ``dense_modes``.
            visual_prompts: ViTs: learned tokens, which are trained even if the tower is frozen.

        Raises:
            ValueError: If the tower lacks one of the maps or blocks, if windows are set for a tower that is
                not a ViT, or if ``joint`` is set and the tower does not have the dense mode.
        """
        tower = tower.visual if isinstance(tower, ClipModel) else tower
        is_vit = isinstance(tower, TransformerTower)
        taps = [max(tower.tap_channels)] if is_vit else sorted(tower.tap_channels)
        names = {feature_name(tower.tap_strides[tap]): tap for tap in taps}
        if missing := [name for name in out_features if name not in names]:
            raise ValueError(
                f"MODEL.TRUNK.OUT_FEATURES {missing}: the maps of a {type(tower).__name__} are {list(names)}"
            )
        if (window_size or global_blocks) and not is_vit:
            raise ValueError(
                f"MODEL.TRUNK.WINDOW_SIZE and GLOBAL_BLOCKS need a ViT, not a {type(tower).__name__}"
            )
        if unknown := sorted(set(global_blocks) - set(tower.tap_channels)):
            raise ValueError(
                f"MODEL.TRUNK.GLOBAL_BLOCKS {unknown}: the blocks are 0..{max(tower.tap_channels)}"
            )
        chosen = {name: tap for name, tap in names.items() if not out_features or name in out_features}
        super().__init__(
            {
                n: ShapeSpec(channels=tower.tap_channels[t], stride=tower.tap_strides[t])
                for n, t in chosen.items()
            },
            pixels,
        )
        self.tower = tower
        self.window_size = window_size
        self.global_blocks = frozenset(global_blocks)
        self.joint, self.dense = joint, dense
        self._request = TowerRequest(taps=tuple(chosen.values()))
        if joint and dense not in tower.dense_modes:
            why = tower.why_no_dense or f"its modes are {', '.join(tower.dense_modes)}"
            raise tower.cannot(f"a dense map of mode {dense!r} in the joint space", why)
        self._freeze(freeze_at, norm)
        if visual_prompts is not None:
            visual_prompts.check(tower)
        self.visual_prompts = visual_prompts

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, Any]:
        clip = clip_from_config(cfg, text=False, in_backbone=True)
        return {
            "tower": clip.visual,
            "out_features": cfg.MODEL.TRUNK.OUT_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "norm": cfg.MODEL.TRUNK.NORM,
            "window_size": cfg.MODEL.TRUNK.WINDOW_SIZE,
            "global_blocks": cfg.MODEL.TRUNK.GLOBAL_BLOCKS,
            "visual_prompts": build_visual_prompts(cfg, clip.visual),
            "pixels": PixelConversion.from_config(cfg, clip.name, clip.pixel_mean, clip.pixel_std),
        }

    @property
    def size_divisibility(self) -> int:
        """Patch size of a ViT, which would ignore the remainder; 0 (no restriction) for other towers."""
        return self.tower.stride if isinstance(self.tower, TransformerTower) else 0

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        stages = self._tower_stages()
        if self.joint:
            inside = {id(p) for stage in stages for p in parameters_of(stage)}
            stages[-1].extend(p for p in self.tower.parameters() if id(p) not in inside)
        return stages

    def _tower_stages(self) -> list[list[nn.Module | nn.Parameter]]:
        groups, count = self.tower.groups(), NUM_STAGES - 1
        if not isinstance(self.tower, TransformerTower):
            return [list(groups.stem), *(list[nn.Module | nn.Parameter]([stage]) for stage in groups.blocks)]
        quarters: list[list[nn.Module | nn.Parameter]] = [[] for _ in range(count)]
        for i, block in enumerate(groups.blocks):
            quarters[count * i // len(groups.blocks)].append(block)
        return [[*groups.stem, *groups.positions], *quarters]

    def features(self, images: Tensor) -> dict[str, Tensor]:
        return self._maps(self._run(images, self._request))

    def forward_joint(
        self, images: Tensor, pooled: bool = True
    ) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
        """Compute the maps and, in the joint space, a global and a dense feature.

        Args:
            images: normalised images (B, 3, H, W).
            pooled: whether to compute the image embedding.

        Returns:
            Maps by name, the image embedding (B, D) or None, and the dense map (B, D, h, w), not
            L2-normalised.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out = self._run(self.pixels(images), replace(self._request, pooled=pooled, dense=self.dense))
        return self._maps(out), out.pooled if pooled else None, out.dense

    def freeze_global_feature(self, unread: Collection[str] = ()) -> None:
        """Freeze what only the image embedding depends on, or maps that are not read.

        Args:
            unread: names of maps that the loss does not depend on.
        """
        if not any(p.requires_grad for p in self.tower.parameters()):
            return
        taps = zip(self._outputs, self._request.taps, strict=True)
        read = tuple(tap for name, tap in taps if name not in unread)
        modes = {module: module.training for module in self.tower.modules()}
        self.tower.eval()  # the forward pass below must not change running statistics
        freeze_unused(self.tower, replace(self._request, taps=read, dense=self.dense))
        for module, training in modes.items():
            module.training = training

    def _run(self, images: Tensor, request: TowerRequest) -> TowerOutput:
        found = chain_hooks(self._window if self.window_size else None, self.visual_prompts)
        hook = {} if found is None else {"hook": found}
        out: TowerOutput = self.tower(images, request, **hook)
        return out

    def _maps(self, out: TowerOutput) -> dict[str, Tensor]:
        return {name: tap for name, (tap, _) in zip(self._outputs, out.taps, strict=True)}

    def _window(self, index: int, stream: TokenStream) -> TokenStream:
        """Set the attention window of a block (hook of the block loop)."""
        return replace(stream, window=0 if index in self.global_blocks else self.window_size)


def clip_from_config(cfg: CN, *, text: bool = True, in_backbone: bool = False) -> ClipModel:
    """Build the CLIP that MODEL.CLIP describes.

    Args:
        text: whether to build its text tower.
        in_backbone: whether all of it becomes part of the backbone, so that MODEL.FETCH_WEIGHTS decides
            whether its weights are downloaded.

    Raises:
        ValueError: If MODEL.CLIP.CONFIG is set together with MODEL.CLIP.PRETRAINED, or a key does not fit the
            image tower. See also `load_clip`.
    """
    keys = cfg.MODEL.CLIP
    if keys.CONFIG:
        if keys.PRETRAINED not in ("", "random"):
            raise ValueError(
                f"MODEL.CLIP.PRETRAINED is {keys.PRETRAINED!r}, but a CLIP that MODEL.CLIP.CONFIG describes "
                "starts with random weights: set it to random, and load weights by MODEL.WEIGHTS"
            )
        pixels = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
        config = {"model_cfg": json.loads(json.dumps(keys.CONFIG)), "preprocess_cfg": pixels}
        clip = build_clip(keys.NAME, config, text=text, position_rule=keys.POSITION_RULE).eval()
    else:
        fetch = cfg.MODEL.FETCH_WEIGHTS or not in_backbone
        clip = load_clip(
            keys.NAME,
            keys.PRETRAINED if fetch else without_weights(keys.NAME, keys.PRETRAINED),
            allow_pickle=cfg.MODEL.ALLOW_PICKLE,
            text=text,
            position_rule=keys.POSITION_RULE,
        )
    if keys.POSITION_GRID:
        clip.visual.resize_positions(keys.POSITION_GRID)
    if keys.PATCH_STRIDE:
        clip.visual.set_patch_stride(keys.PATCH_STRIDE)
    if keys.DOUBLE_CLASS_EMBEDDING:
        clip.visual.double_class_embedding()
    if keys.DROP_PATH:
        clip.visual.set_drop_path(keys.DROP_PATH)
    return clip
