"""Position tables and RoPE for any grid: every published rule is one named function.

A table is (P + S_h * S_w, C): P prefix rows (class token, mean token) and a row-major grid. Only
"bicubic_antialias" antialiases, as open_clip and timm do, which changes every position even when it enlarges.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
PositionRule = Callable[[Tensor, Grid, Grid, int], Tensor]


def bilinear(table: Tensor, old: Grid, new: Grid, prefix: int = 1) -> Tensor:
    """Resize bilinearly, align_corners False, prefix rows copied.

    Used by DenseCLIP (when weights are loaded and at run time) and by FC-CLIP's attention pool.
    """
    return _interpolate(table, old, new, prefix, "bilinear")


def bicubic(table: Tensor, old: Grid, new: Grid, prefix: int = 1) -> Tensor:
    """Resize bicubically, align_corners False, prefix rows copied (CLIPSelf, MaskCLIP, SegCLIP)."""
    return _interpolate(table, old, new, prefix, "bicubic")


def crop(table: Tensor, old: Grid, new: Grid, prefix: int = 1) -> Tensor:
    """Crop the top-left window of the grid (DenseCLIP's detectors).

    Raises:
        ValueError: If the new grid is larger than the grid of the table.
    """
    if new[0] > old[0] or new[1] > old[1]:
        raise ValueError(
            f"a {new[0]} x {new[1]} feature map is larger than the {old[0]} x {old[1]} position grid, which "
            f"'crop' only cuts: use smaller images, a larger grid, or the rule 'bilinear' or 'bicubic'"
        )
    body = table[prefix:].reshape(*old, -1)[: new[0], : new[1]]
    return torch.cat([table[:prefix], body.flatten(0, 1)])


def bicubic_antialias(table: Tensor, old: Grid, new: Grid, prefix: int = 1) -> Tensor:
    """Resize bicubically with antialiasing, prefix rows copied (open_clip, timm, DINOv2; GEM)."""
    return _interpolate(table, old, new, prefix, "bicubic", antialias=True)


def dino_scale(table: Tensor, old: Grid, new: Grid, prefix: int = 1) -> Tensor:
    """Resize bicubically by the scale factors (new + 0.1) / old, which also place the samples.

    A grid with as many patches as the table, whatever its shape, takes the table as it is. The rule of DINO
    (Caron et al., ICCV 2021), which the released code of SCLIP, ClearCLIP, NACLIP, ProxyCLIP, Trident,
    CorrCLIP, ResCLIP, SC-CLIP and SFP applies to CLIP.
    """
    if new[0] * new[1] == old[0] * old[1]:
        return table
    body = table[prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    body = F.interpolate(body.float(), scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([table[:prefix], body[0].flatten(1).T.to(table.dtype)])


POSITION_RULES: dict[str, PositionRule] = {
    "bicubic": bicubic,
    "bicubic_antialias": bicubic_antialias,
    "bilinear": bilinear,
    "crop": crop,
    "dino_scale": dino_scale,
}


def resize_table(table: Tensor, old: Grid, new: Grid, rule: str, prefix: int = 1) -> Tensor:
    """Resize a table to another grid by a named rule; an equal grid returns the table itself.

    DenseCLIP resamples twice, when weights are loaded (7 x 7 to S x S) and at run time, and two resamplings
    differ from one: use this function for the first step and store the result as the tower's table.

    Args:
        table: (prefix + rows * columns, C).
        old: (rows, columns) of the table.
        new: (rows, columns) of the result.
        rule: name in `POSITION_RULES`.
        prefix: number of rows before the grid.

    Raises:
        ValueError: If the rule is unknown, or the table does not have ``prefix`` rows plus the old grid.
    """
    if rule not in POSITION_RULES:
        raise ValueError(f"unknown position rule '{rule}'; known: {', '.join(POSITION_RULES)}")
    if table.shape[0] != prefix + old[0] * old[1]:
        raise ValueError(f"a position table of {table.shape[0]} rows is not {prefix} + {old[0]} x {old[1]}")
    return table if old == new else POSITION_RULES[rule](table, old, new, prefix)


def truncate_text(table: Tensor, length: int) -> Tensor:
    """Return the first ``length`` rows of a text position table (L, C).

    Raises:
        ValueError: If ``length`` exceeds the table.
    """
    if length > table.shape[0]:
        raise ValueError(f"{length} tokens exceed the text tower's {table.shape[0]} positions")
    return table[:length]


def square_grid(rows: int, prefix: int = 1) -> Grid:
    """Return the grid of a square table from its number of rows.

    Raises:
        ValueError: If the number of rows is not ``prefix`` plus a square.
    """
    side = math.isqrt(rows - prefix)
    if side * side != rows - prefix:
        raise ValueError(f"a position table of {rows} rows is not {prefix} + a square: name the grid")
    return side, side


def rope_table(
    grid: Grid,
    head_dim: int,
    reference: Grid | None,
    *,
    temperature: float = 10000.0,
    offset: float = 0.0,
    order: str = "ij",
    spacing: float = 1.0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute sine and cosine (h * w, head_dim) of axial RoPE, tokens row-major.

    Each axis fills half of the head: head_dim / 4 frequencies temperature^(-i / (head_dim / 4)), each twice
    (interleaved pairs). Positions are rescaled to the reference grid (arange(h) / h * reference), so a slice
    of a larger grid's table is not the table of the smaller grid.

    Args:
        grid: (h, w).
        head_dim: width of a head.
        reference: grid of the pre-training (EVA: pt_hw_seq_len); None does not rescale positions.
        temperature: base of the frequencies.
        offset: added to every position (Perception Encoder: 1).
        order: "ij" puts the row half first, "xy" the column half.
        spacing: distance of neighbouring patches, as a share of a patch; less than 1 if patches overlap.
            Positions count whole patches, and each patch has that of its centre.
        device: device of the result.
    """
    steps = torch.arange(head_dim // 4, device=device, dtype=torch.float32)
    bands = temperature ** (-steps / (head_dim // 4))
    axes = []
    for axis, size in enumerate(grid):
        centre = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * spacing
        position = centre - 0.5 + offset
        if reference is not None:
            position = position / (size * spacing) * reference[axis]
        axes.append(torch.outer(position, bands).repeat_interleave(2, dim=1))
    rows = axes[0][:, None].expand(*grid, -1)
    columns = axes[1][None].expand(*grid, -1)
    angles = torch.cat([rows, columns] if order == "ij" else [columns, rows], dim=2).flatten(0, 1)
    return angles.sin(), angles.cos()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the interleaved pairs of x (..., N, head_dim): (a, b) -> (a cos - b sin, b cos + a sin)."""
    sin, cos = rope
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def _interpolate(
    table: Tensor, old: Grid, new: Grid, prefix: int, mode: str, antialias: bool = False
) -> Tensor:
    body = table[prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    body = F.interpolate(body.float(), size=new, mode=mode, align_corners=False, antialias=antialias)
    return torch.cat([table[:prefix], body[0].flatten(1).T.to(table.dtype)])
