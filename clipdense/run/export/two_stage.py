"""Export of OVSeg, zsseg and ZegFormer: both stages in one file, or the first stage alone."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.maskformer import MaskPrediction
from clipdense.regions import MaskCrops, cosine_logits, get_fusion, mask_extent
from clipdense.regions.crops import expand_boxes
from clipdense.run.export.graph import ExportError, Graph, Inputs
from clipdense.run.export.masks import base_names, mask_metadata
from clipdense.systems.two_stage import OVSeg
from clipdense.systems.two_stage.scores import Scoring

__all__ = ["ovseg_graph"]


class TwoStages(nn.Module):
    """Masks of one image, classified by their queries and by the crops that they cut out."""

    def __init__(self, model: OVSeg) -> None:
        super().__init__()
        self.model = model
        self.normalize = Statistics(model)

    def forward(
        self, images: Tensor, image_size: Tensor, text: Tensor, crop_text: Tensor, base: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict masks and classify them.

        Args:
            images: normalised and padded (1, 3, H, W).
            image_size: (2,) int64, height and width without the padding.
            text: (K, D), unit length, compared with queries.
            crop_text: (K, D), unit length, compared with crops.
            base: (K,) bool, the classes that were trained.

        Returns:
            Mask logits (1, Q, h, w) and class scores (1, Q, K + 1), background last.
        """
        model = self.model
        prediction: MaskPrediction = model.head(model.backbone(images))
        masks = prediction.mask_logits
        logits = model.classifier(prediction.require_query_embeddings(), text)[0]
        crops = self.crop(images, masks, image_size)
        regions, inside = crops.regions(batched=True), None
        if model.encoder.prompted:
            inside = crops.region_masks()
        scale = model.crop_scale or model.encoder.clip.logit_scale.exp()
        crop_logits = cosine_logits(model.encoder.encode(regions, inside), crop_text, scale)
        scores = score_all(model.scoring, logits, crop_logits, crops.valid, base)
        return masks, scores[None]

    def crop(self, images: Tensor, mask_logits: Tensor, image_size: Tensor) -> MaskCrops:
        """Cut out a crop of each mask, also of empty ones, whose crop is the whole image."""
        encoder = self.model.encoder
        rule = encoder.rule
        height, width = images.shape[-2:]
        masks = F.interpolate(mask_logits, (height, width), mode="bilinear", align_corners=False)[0]
        if not rule.padded_logits:  # pixels of the padding are outside
            rows = torch.arange(height, device=images.device) < image_size[0]
            columns = torch.arange(width, device=images.device) < image_size[1]
            masks = masks.sigmoid() * (rows[:, None] & columns).to(masks.dtype)
        extent = mask_extent(masks, rule.threshold)
        if rule.padded_logits:
            size = torch.stack([torch.full_like(image_size[0], side) for side in (height, width)])
        else:
            size = image_size
        whole = torch.cat([torch.zeros_like(size), size.flip(0)])
        boxes = torch.where(extent.valid[:, None], extent.boxes, whole)
        mean = torch.tensor(encoder.clip.pixel_mean)[:, None, None]
        std = torch.tensor(encoder.clip.pixel_std)[:, None, None]
        every = torch.arange(masks.shape[0], device=masks.device)
        return MaskCrops(
            rule=rule,
            valid=extent.valid | rule.keep_empty,
            index=every,
            boxes=expand_boxes(boxes, rule.expand, size),
            source=every,
            image=self.normalize(images, image_size),
            masks=masks,
            fill=torch.zeros_like(mean) if rule.fill == "mean" else -mean / std,
            size=encoder.clip.image_size[0],
        )


class Statistics(nn.Module):
    """From the proposal network's pixels to CLIP's; the padding becomes CLIP's mean colour."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: OVSeg) -> None:
        super().__init__()
        clip, self.flip = model.encoder.clip, model.input_format == "BGR"
        old_mean, old_std = model.pixel_mean.clone(), model.pixel_std.clone()
        if self.flip:
            old_mean, old_std = old_mean.flip(0), old_std.flip(0)
        mean, std = (255 * torch.tensor(v)[:, None, None] for v in (clip.pixel_mean, clip.pixel_std))
        self.register_buffer("scale", old_std / std)
        self.register_buffer("shift", (old_mean - mean) / std)

    def forward(self, images: Tensor, image_size: Tensor) -> Tensor:
        """Convert the padded image (1, 3, H, W) to (3, H, W) RGB, normalised for CLIP."""
        image = images[0].flip(0) if self.flip else images[0]
        rows = torch.arange(images.shape[2], device=images.device) < image_size[0]
        columns = torch.arange(images.shape[3], device=images.device) < image_size[1]
        return (image * self.scale + self.shift) * (rows[:, None] & columns).to(image.dtype)


def score_all(scoring: Scoring, logits: Tensor, crop_logits: Tensor, valid: Tensor, base: Tensor) -> Tensor:
    """Fuse the scores of queries and crops, as `Scoring` does for crops of valid masks only.

    Args:
        scoring: the rule.
        logits: (Q, K + 1) of queries, background last.
        crop_logits: (Q, K) of the crops of all masks.
        valid: (Q,) bool, the masks whose crops count.
        base: (K,) bool.

    Returns:
        (Q, K + 1), background last.
    """
    p = logits.softmax(-1)
    if scoring.source == "proposals":
        return p
    if scoring.clip_background:
        q = torch.cat([crop_logits, logits[:, -1:]], dim=-1).softmax(-1)
    else:
        q = F.pad(crop_logits.softmax(-1), (0, 1))
    seen = valid[:, None]
    if scoring.min_query_score:
        confident = p[:, :-1].amax(-1, keepdim=True) >= scoring.min_query_score
        seen = seen & confident
    if scoring.source == "clip":
        nothing = F.pad(torch.zeros_like(p[:, :-1]), (0, 1), value=1.0)
        return torch.where(seen, q, nothing)
    fusion = get_fusion(scoring.fusion)
    if scoring.empty == "boost":
        fused = fusion(p, torch.where(seen, q, torch.ones_like(q)), base, scoring.settings)
        return torch.where(confident, fused, p) if scoring.min_query_score else fused
    return torch.where(seen, fusion(p, q, base, scoring.settings), p)


class FirstStage(nn.Module):
    """Masks and class scores of queries alone."""

    def __init__(self, model: OVSeg) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Predict masks from (B, 3, H, W) and classify them by text (K, D): mask logits, class scores."""
        model = self.model
        prediction: MaskPrediction = model.head(model.backbone(images))
        logits = model.classifier(prediction.require_query_embeddings(), text)
        return prediction.mask_logits, logits.softmax(-1)


def ovseg_graph(model: OVSeg, *, fixed_size: tuple[int, int] | None = None) -> Graph:
    """Prepare a two-stage segmentor for export; masks are merged by the caller.

    The file holds both stages. With ``MODEL.TWO_STAGE.SCORES.SOURCE proposals`` it holds the first alone.

    Args:
        model: the segmentor.
        fixed_size: height and width of the padded images in pixels; None: any.

    Raises:
        ExportError: If masks come from elsewhere, or the crops are not bicubic.
    """
    if model.mask_source is not None:
        raise ExportError(
            "masks that come from a file or another model are no part of the network: set "
            "MODEL.MASK_FORMER.TEST.MASK_SOURCE ''"
        )
    first_stage, rule = model.scoring.source == "proposals", model.encoder.rule
    if not first_stage and rule.sampling == "roi_align" and rule.masked:
        raise ExportError(
            "crops by RoIAlign of masked images are taken from as many images as there are masks, a few at a "
            "time: set MODEL.TWO_STAGE.CROP.SAMPLING bicubic, or MASKED False"
        )
    clip = model.encoder.clip
    dim = clip.embed_dim
    metadata = mask_metadata(
        model,
        fixed_size,
        text="classes",
        embed_dim=dim,
        own_text=model.prompts is not None or model.query_bank.prompts is not None,
        clip=clip.name,
        templates=model.query_bank.templates.name,
        reads_base=not first_stage,
        reads_image_size=not first_stage,
        base_names=base_names(model.training_vocabulary),
    )

    def example(height: int, width: int, classes: int) -> Inputs:
        generator = torch.Generator().manual_seed(classes)
        text, crop_text = F.normalize(torch.randn(2, classes, dim, generator=generator), dim=2)
        images = torch.randn(1, 3, height, width, generator=generator)
        if first_stage:
            return {"images": images, "text": text}
        return {
            "images": images,
            "image_size": torch.tensor([height - 3, width - 5]),
            "text": text,
            "crop_text": crop_text,
            "base": torch.arange(classes) % 2 == 0,
        }

    free = () if fixed_size else (2, 3)
    module: nn.Module = FirstStage(model) if first_stage else TwoStages(model)
    side = max(model.size_divisibility, 32)
    return Graph(
        module.eval(),
        replace(metadata, dynamic_batch=False),
        example,
        outputs=("mask_logits", "scores"),
        dynamic={"images": free, "text": (0,), "crop_text": (0,), "base": (0,)},
        size=fixed_size or (3 * side, 4 * side),
    )
