"""Masked crops mask by mask, step by step as specs/ovseg_zegformer_maskformer.md 2.3 has them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_loop(
    image: Tensor,
    probabilities: Tensor,
    *,
    threshold: float,
    size: int,
    pixel_mean: tuple[float, ...],
    pixel_std: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """(image (3, h, w) in 0 .. 255, masks (Q, h, w)) -> valid (Q,), crops (N, 3, size, size), their masks
    (N, 1, size, size).
    """
    mean, std = (255 * torch.tensor(s, device=image.device).reshape(3, 1, 1) for s in (pixel_mean, pixel_std))
    valid, regions, region_masks = [], [], []
    for probability in probabilities:
        inside = (probability > threshold).float()
        valid.append(bool(inside.any()))
        if not valid[-1]:
            continue
        ys, xs = torch.where(inside.any(1))[0], torch.where(inside.any(0))[0]
        rows, columns = slice(int(ys.min()), int(ys.max()) + 1), slice(int(xs.min()), int(xs.max()) + 1)
        crop, mask = image[:, rows, columns].float(), inside[rows, columns]
        region = (crop * mask + (1 - mask) * mean - mean) / std
        regions.append(F.interpolate(region[None], (size, size), mode="bicubic", align_corners=False)[0])
        region_masks.append(F.interpolate(mask[None, None], (size, size), mode="nearest")[0])
    empty = image.new_zeros(0, 3, size, size, dtype=torch.float32)
    if not regions:
        return torch.tensor(valid), empty, empty[:, :1]
    return torch.tensor(valid), torch.stack(regions), torch.stack(region_masks)
