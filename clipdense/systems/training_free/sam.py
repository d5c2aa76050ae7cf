"""SAM from transformers: its last attention, masks for prompts, and regions of an image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from clipdense.clip.position import Grid
from clipdense.inference import Prompts
from clipdense.inference.sam_refine import scaled_size
from clipdense.systems.training_free.features import Statistics, renormalize

__all__ = ["SamModel"]


class SamModel(nn.Module):
    """A SAM of transformers (``SamModel``), frozen.

    Args:
        module: transformers' SamModel, built with the attention implementation "eager".

    Raises:
        ValueError: If its attention does not return weights.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        source: Any = module
        if getattr(source.config.vision_config, "_attn_implementation", "eager") != "eager":
            raise ValueError("build SAM with attn_implementation='eager': its attention weights are needed")
        self.module: Any = module.eval().requires_grad_(False)
        vision = source.config.vision_config
        self.side: int = vision.image_size
        self.patch_size: int = vision.patch_size

    @classmethod
    def create(cls, name: str, pretrained: str = "") -> SamModel:
        """Build a SAM of the Hugging Face hub.

        Args:
            name: such as "facebook/sam-vit-base", or a local folder.
            pretrained: "" for its weights, or "random" for a model of the default size with random weights.

        Raises:
            ImportError: If the package transformers is not installed.
            ConnectionError: If the weights cannot be downloaded.
        """
        try:
            from transformers import SamConfig
            from transformers import SamModel as Module
        except ImportError as error:
            raise ImportError("SAM needs the package transformers: pip install 'clipdense[sam]'") from error
        if pretrained == "random":
            return cls(Module._from_config(SamConfig(), attn_implementation="eager"))
        try:
            return cls(Module.from_pretrained(name, attn_implementation="eager"))
        except OSError as error:
            raise ConnectionError(f"SAM '{name}' could not be loaded: {error}") from error

    def frame(self, images: Tensor, statistics: Statistics) -> Tensor:
        """Resize a normalised image (1, 3, H, W) to SAM's frame, and pad it there at the bottom and right."""
        size = scaled_size(images.shape[2], images.shape[3], self.side)
        images = renormalize(images, statistics, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return F.pad(images, (0, self.side - size[1], 0, self.side - size[0]))

    @torch.no_grad()
    def last_attention(self, images: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor, Grid]:
        """Return the last encoder block's attention over the image, without the padding.

        Args:
            images: (1, 3, H, W), normalised.
            statistics: of the image.

        Returns:
            Weights (heads, N, N) after the softmax, values (heads, N, d), and the grid (h, w) of N = h w.
        """
        captured: list[Tensor] = []
        encoder = self.module.vision_encoder
        handle = encoder.layers[-1].attn.qkv.register_forward_hook(
            lambda module, inputs, output: captured.append(output)
        )
        try:
            out = encoder(self.frame(images, statistics), output_attentions=True)
        finally:
            handle.remove()
        side = self.side // self.patch_size
        size = scaled_size(images.shape[2], images.shape[3], self.side)
        grid = (max(size[0] // self.patch_size, 1), max(size[1] // self.patch_size, 1))
        weights = out.attentions[-1]
        heads = self.module.config.vision_config.num_attention_heads
        inside = torch.zeros(side, side, dtype=torch.bool, device=images.device)
        inside[: grid[0], : grid[1]] = True
        kept = inside.flatten().nonzero()[:, 0]
        weights = weights.reshape(heads, side * side, side * side)[:, kept][:, :, kept]
        values = captured[0].reshape(side * side, 3, heads, -1)[kept, 2].transpose(0, 1)
        return weights, values, grid

    @torch.no_grad()
    def embed(self, images: Tensor, statistics: Statistics) -> Tensor:
        """Embed a normalised image for `decode`."""
        found: Tensor = self.module.get_image_embeddings(self.frame(images, statistics))
        return found

    @torch.no_grad()
    def decode(self, embeddings: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Predict one mask for each prompt; see `clipdense.inference.sam_refine.MaskDecoder`."""
        count, side = len(prompts.boxes), 4 * embeddings.shape[-1]  # 256 for an input of 1024 pixels
        masks = prompts.mask_input
        if masks.shape[-1] != side:
            masks = F.interpolate(masks[None], (side, side), mode="bilinear", align_corners=False)[0]
        out = self.module(
            image_embeddings=embeddings,
            input_points=prompts.points[None],
            input_labels=prompts.point_labels[None].long(),
            input_boxes=prompts.boxes[None],
            input_masks=masks[None],
            multimask_output=False,
        )
        return out.pred_masks[0, :count, 0], out.iou_scores[0, :count, 0]

    @torch.no_grad()
    def regions(
        self, images: Tensor, statistics: Statistics, *, points: int = 8, least_iou: float = 0.4
    ) -> Tensor:
        """Segment an image by a grid of point prompts.

        Args:
            images: (1, 3, H, W), normalised.
            statistics: of the image.
            points: number of points on each side of the grid.
            least_iou: masks with a lower predicted IoU are left out.

        Returns:
            (H, W) int64: 0 where no mask lies; larger masks are painted over by smaller ones.
        """
        size = (images.shape[2], images.shape[3])
        down, across = scaled_size(*size, self.side)
        steps = (torch.arange(points, device=images.device) + 0.5) / points
        ys, xs = torch.meshgrid(steps * down, steps * across, indexing="ij")
        places = torch.stack([xs.flatten(), ys.flatten()], 1)[None, :, None]
        out = self.module(
            image_embeddings=self.embed(images, statistics),
            input_points=places,
            input_labels=torch.ones(1, points * points, 1, dtype=torch.long, device=images.device),
            multimask_output=False,
        )
        logits = out.pred_masks[0, :, :1]
        masks = F.interpolate(logits, (self.side, self.side), mode="bilinear", align_corners=False)
        masks = F.interpolate(masks[..., :down, :across], size, mode="bilinear", align_corners=False)[:, 0]
        kept = (masks > 0)[out.iou_scores[0, :, 0] >= least_iou]
        regions = torch.zeros(size, dtype=torch.long, device=images.device)
        areas = kept.flatten(1).sum(1)
        for number, index in enumerate(areas.argsort(descending=True).tolist(), start=1):
            regions[kept[index]] = number
        return regions
