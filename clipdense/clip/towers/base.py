"""The contract of an image tower: one forward, only what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipdense.clip.position import POSITION_RULES, Grid, resize_table


@dataclass(frozen=True)
class TowerRequest:
    """What a tower forward shall return.

    Attributes:
        taps: ResNet and ConvNeXt: stages 2 to 5 (C2 to C5); transformers: 0-based block indices (residual
            stream, no norm).
        pre: the last map before the projection into the joint space, under the dense mode ("plain" without
            one).
        dense: last-block mode of the dense map in the joint space, e.g. "plain" or "value".
        keys: key projection of the last attention, un-normalised, heads side by side.
        pooled: the image embedding.
        tap_mode: transformers: the mode of the last block, for its tap (F-ViT: "value").
    """

    taps: tuple[int, ...] = ()
    pre: bool = False
    dense: str | None = None
    keys: bool = False
    pooled: bool = False
    tap_mode: str = "plain"


POOLED = TowerRequest(pooled=True)
_POOL_DENSE = "its pooling has no weights; pool `dense` with clipdense.regions"


class TowerOutput:
    """What was asked for; reading anything else is an error.

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
            raise AttributeError(f"'{name}' was not asked for: pass it in TowerRequest")
        raise AttributeError(name)


class Tower(nn.Module):
    """An image tower that has taken over the parts of an open_clip module, under the same state-dict names.

    Attributes:
        embed_dim: D of the joint space.
        stride: of `dense` and `pre`, in pixels.
        grid: (h, w) of the native dense map; `image_size` is the native (H, W).
        tap_channels, tap_strides: by tap.
        dense_modes: values of `TowerRequest.dense`; empty if the tower has no dense map (see `why_no_dense`).
        has_keys: whether there is an attention whose keys `TowerRequest.keys` can ask for.
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
        """See the class."""
        return () if self.why_no_dense else ("plain",)

    def forward(self, images: Tensor, want: TowerRequest = POOLED) -> TowerOutput:
        """Normalised images (B, 3, H, W) of any size from one stride up -> what `want` names.

        Raises:
            ValueError: an image smaller than the stride, a tap or mode that this tower does not have.
        """
        self.check(images, want)
        return self.features(images.to(self.dtype), want)

    def features(self, images: Tensor, want: TowerRequest) -> TowerOutput:
        """The family's forward; `want` has been checked."""
        raise NotImplementedError

    def embed_regions(
        self, features: Tensor, *, boxes: Sequence[Tensor] | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """Region embeddings in the joint space by the pooling that the tower has weights for, not
        L2-normalised.

        Args:
            features: `TowerOutput.pre`, (B, C, h, w).
            boxes: one (n_i, 4) per image, xyxy in input pixels -> (sum n_i, D).
            masks: (B, Q, h, w), at least 0, at the size of `features` -> (B, Q, D).

        Raises:
            ValueError: not exactly one of boxes and masks, or the tower's region pooling has no weights.
        """
        if (boxes is None) == (masks is None):
            raise ValueError("embed_regions takes either boxes or masks")
        if boxes is not None:
            return self.embed_boxes(features, boxes)
        assert masks is not None
        return self.embed_masks(features, masks)

    def resize_positions(self, side: int) -> None:
        """Resize the stored position table to a grid of side x side, bilinearly; it becomes the native one.

        DenseCLIP does this at load, and applies the position rule to the result at run time: two resamplings,
        which are not one.

        Raises:
            ValueError: the tower has no position table.
        """
        owner = self.position_owner()
        if owner is None:
            raise self.cannot("another position grid", "it has no position table")
        table = resize_table(owner.positional_embedding.data, self.grid, (side, side), "bilinear")
        owner.positional_embedding = nn.Parameter(table.contiguous())
        self.grid = (side, side)

    def position_owner(self) -> Any:
        """The module with the parameter `positional_embedding`, (1 + h * w, C); None where there is none."""
        return None

    def embed_boxes(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """`embed_regions` of boxes."""
        raise self.cannot("region embeddings of boxes", _POOL_DENSE)

    def embed_masks(self, features: Tensor, masks: Tensor) -> Tensor:
        """`embed_regions` of masks."""
        raise self.cannot("region embeddings of masks", _POOL_DENSE)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; images are cast to it."""
        return next(p.dtype for p in self.parameters() if p.dim() == 4)

    def check(self, images: Tensor, want: TowerRequest) -> None:
        """Refuse what this tower cannot give."""
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < self.stride:
            raise ValueError(
                f"{type(self).__name__} takes images (B, 3, H, W) of at least {self.stride} px a side, not "
                f"{tuple(images.shape)}"
            )
        for tap in want.taps:
            if tap not in self.tap_channels:
                raise self.cannot(f"tap {tap}", f"its taps are {sorted(self.tap_channels)}")
        if want.dense is not None and want.dense not in self.dense_modes:
            known = ", ".join(self.dense_modes)
            why = f"its modes are {known}" if known else self.why_no_dense
            raise self.cannot(f"dense '{want.dense}'", why)
        if want.keys and not self.has_keys:
            raise self.cannot("keys", "it has no attention")

    def cannot(self, output: str, why: str) -> ValueError:
        """The error for an output that this tower does not have."""
        return ValueError(f"{type(self).__name__} cannot give {output}: {why}")


def adopt(module: nn.Module, source: nn.Module) -> None:
    """Register the children and own parameters of `source` in `module`, under their names."""
    for name, child in source.named_children():
        module.add_module(name, child)
    for name, parameter in source.named_parameters(recurse=False):
        module.register_parameter(name, parameter)


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, h * w, C) -> (B, C, h, w)."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
