"""The contract of an image tower: one forward that computes the requested outputs only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clipdense.clip.position import POSITION_RULES, Grid, resize_table
from clipdense.clip.towers.groups import TowerGroups


@dataclass(frozen=True)
class TowerRequest:
    """Requested tower outputs.

    Attributes:
        taps: ResNet and ConvNeXt: stages 2 to 5 (C2 to C5); transformers: 0-based block indices (residual
            stream, no norm).
        pre: the last map before the projection into the joint space, in the dense mode ("plain" if there is
            none).
        dense: last-block mode of the dense map in the joint space, e.g. "plain" or "value".
        keys: key projection of the last attention, un-normalised, heads side by side.
        pooled: the image embedding.
        tap_mode: transformers: mode of the last block for its tap (F-ViT: "value").
        guidance: transformers: tensor that steers the attention of the last block, e.g. patch features of
            another model, a similarity, region ids or token weights. Passed to the modes of ``dense`` and
            ``tap_mode`` that take guidance (`clipdense.clip.attention.Mode.guidance` says what each mode
            expects); an error if none of them does.
        options: transformers: keyword options of the modes of ``dense`` and ``tap_mode``
            (`clipdense.clip.attention.Mode.options` lists them), e.g. {"full": True}.
    """

    taps: tuple[int, ...] = ()
    pre: bool = False
    dense: str | None = None
    keys: bool = False
    pooled: bool = False
    tap_mode: str = "plain"
    guidance: Tensor | None = field(default=None, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


POOLED = TowerRequest(pooled=True)
_POOL_DENSE = "its pooling has no weights; pool `dense` with clipdense.regions"


class TowerOutput:
    """Requested outputs of a tower; reading any other output is an error.

    Attributes:
        taps: (map (B, C, h, w), stride in pixels), in the order of `TowerRequest.taps`.
        pre: (B, C, h, w).
        dense: (B, D, h, w) in the joint space, not L2-normalised.
        keys: (B, C, h, w).
        pooled: (B, D), not L2-normalised.
    """

    taps: list[tuple[Tensor, int]]
    pre: Tensor
    dense: Tensor
    keys: Tensor
    pooled: Tensor

    def __init__(self) -> None:
        self.taps = []

    def __getattr__(self, name: str) -> Any:
        if name in TowerOutput.__annotations__:
            raise AttributeError(f"'{name}' was not requested: set it in TowerRequest")
        raise AttributeError(name)


class Tower(nn.Module):
    """Image tower with the parts of an open_clip module, under the same state-dict names.

    Attributes:
        embed_dim: D of the joint space.
        stride: stride of `dense` and `pre`, in pixels.
        grid: (h, w) of the dense map on which the tower was trained, and of its position table.
        image_size: native (H, W), in pixels.
        tap_channels: number of channels by tap.
        tap_strides: stride in pixels by tap.
        dense_modes: valid values of `TowerRequest.dense`; empty if the tower has no dense map.
        why_no_dense: reason why the tower has no dense map, for error messages.
        has_keys: whether the tower has an attention whose keys `TowerRequest.keys` can request.
        position_rule: name in `clipdense.clip.position.POSITION_RULES` for grids other than the native one.
    """

    embed_dim: int
    stride: int
    grid: Grid
    image_size: tuple[int, int]
    tap_channels: dict[int, int]
    tap_strides: dict[int, int]
    why_no_dense: str = ""
    has_keys: bool = False

    def __init__(self, visual: nn.Module, position_rule: str = "bicubic") -> None:
        super().__init__()
        if position_rule not in POSITION_RULES:
            raise ValueError(f"unknown position rule '{position_rule}'; known: {', '.join(POSITION_RULES)}")
        self.position_rule = position_rule
        adopt(self, visual)

    @property
    def dense_modes(self) -> tuple[str, ...]:
        """Valid values of `TowerRequest.dense`."""
        return () if self.why_no_dense else ("plain",)

    def forward(self, images: Tensor, request: TowerRequest = POOLED) -> TowerOutput:
        """Compute the requested outputs.

        Args:
            images: (B, 3, H, W), normalised; both sides at least `smallest_side`.
            request: outputs to compute.

        Raises:
            ValueError: If an image is smaller than `smallest_side`, or the tower does not have a requested
                output.
        """
        self.check(images, request)
        return self.features(images.to(self.dtype), request)

    def features(self, images: Tensor, request: TowerRequest) -> TowerOutput:
        """Compute the outputs of a checked request."""
        raise NotImplementedError

    def groups(self) -> TowerGroups:
        """Return the parameters by their role, for fine-tuning rules (`clipdense.clip.finetune`)."""
        raise NotImplementedError

    def embed_regions(
        self, features: Tensor, *, boxes: Sequence[Tensor] | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """Embed regions in the joint space by the tower's own pooling (attention pool, MLP head).

        Args:
            features: `TowerOutput.pre`, (B, C, h, w).
            boxes: one (n_i, 4) per image, xyxy in input pixels.
            masks: (B, Q, h, w), at least 0, at the size of `features`.

        Returns:
            (sum n_i, D) for boxes, (B, Q, D) for masks; not L2-normalised.

        Raises:
            ValueError: If not exactly one of boxes and masks is given, or the tower's pooling has no weights.
        """
        if (boxes is None) == (masks is None):
            raise ValueError("embed_regions takes either boxes or masks: pass exactly one of them")
        if boxes is not None:
            return self.embed_boxes(features, boxes)
        assert masks is not None
        return self.embed_masks(features, masks)

    def resize_positions(self, side: int) -> None:
        """Resize the stored position table bilinearly to side x side, which becomes the native grid.

        DenseCLIP does this when it loads weights, and applies the position rule to the result at run time.
        Two resamplings differ from one.

        Raises:
            ValueError: If the tower has no position table.
        """
        owner = self.position_owner()
        if owner is None:
            raise self.cannot("another position grid", "it has no position table")
        table = resize_table(owner.positional_embedding.data, self.grid, (side, side), "bilinear")
        owner.positional_embedding = nn.Parameter(table.contiguous())
        self.grid = (side, side)

    def set_patch_stride(self, stride: int) -> None:
        """Set the distance of neighbouring patches in pixels; see `TransformerTower.set_patch_stride`.

        Raises:
            ValueError: If the tower has no patches, or the stride does not fit them.
        """
        raise self.cannot("another patch stride", "only ViTs have patches")

    def double_class_embedding(self) -> None:
        """Add the class embedding twice from now on, as the published segmentors of DenseCLIP do.

        Raises:
            ValueError: If the tower does not add a class embedding.
        """
        raise self.cannot("a doubled class embedding", "only open_clip's ViTs can")

    def set_drop_path(self, rate: float) -> None:
        """Set stochastic depth: the rate rises linearly from 0 in the first block to ``rate`` in the last.

        Raises:
            ValueError: If the tower has no stochastic depth.
        """
        raise self.cannot("stochastic depth", "only open_clip's ViTs can")

    def position_owner(self) -> Any:
        """Return the module with the parameter `positional_embedding` (1 + h * w, C), or None."""
        return None

    def embed_boxes(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Embed boxes; see `embed_regions`."""
        raise self.cannot("region embeddings of boxes", _POOL_DENSE)

    def embed_masks(self, features: Tensor, masks: Tensor) -> Tensor:
        """Embed masks; see `embed_regions`."""
        raise self.cannot("region embeddings of masks", _POOL_DENSE)

    @property
    def smallest_side(self) -> int:
        """Smallest side of an image in pixels."""
        return self.stride

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights; images are cast to it."""
        return next(p.dtype for p in self.parameters() if p.dim() == 4)

    def check(self, images: Tensor, request: TowerRequest) -> None:
        """Raise ValueError for images or requested outputs that do not fit the tower."""
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < self.smallest_side:
            raise ValueError(
                f"{type(self).__name__} takes images (B, 3, H, W) of at least {self.smallest_side} px a "
                f"side, not {tuple(images.shape)}"
            )
        for tap in request.taps:
            if tap not in self.tap_channels:
                raise self.cannot(f"tap {tap}", f"its taps are {sorted(self.tap_channels)}")
        if request.dense is not None and request.dense not in self.dense_modes:
            known = ", ".join(self.dense_modes)
            why = f"its modes are {known}" if known else self.why_no_dense
            raise self.cannot(f"dense '{request.dense}'", why)
        if request.keys and not self.has_keys:
            raise self.cannot("keys", "it has no attention")
        self.check_guidance(request)

    def check_guidance(self, request: TowerRequest) -> None:
        """Raise ValueError if guidance or options do not fit the requested modes."""
        if request.guidance is not None:
            raise self.cannot("an output with guidance", "its dense modes take none")
        if request.options:
            raise self.cannot("an output with options", "its dense modes have none")

    def cannot(self, output: str, why: str) -> ValueError:
        """Return the error for an output that the tower does not have."""
        return ValueError(f"{type(self).__name__} cannot give {output}: {why}")


def adopt(module: nn.Module, source: nn.Module) -> None:
    """Register the children and direct parameters of `source` in `module` under the same names."""
    for name, child in source.named_children():
        module.add_module(name, child)
    for name, parameter in source.named_parameters(recurse=False):
        module.register_parameter(name, parameter)


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Reshape tokens (B, h * w, C), row-major, to a map (B, C, h, w)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)
