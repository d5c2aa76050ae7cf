"""`SegCLIP`: semantic segmentation learned from image-text pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip import ClipModel
from clipdense.clip.contrastive import contrastive_loss
from clipdense.clip.prompts import require_text_tower
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.inference import slide_windows
from clipdense.open_vocabulary import OpenVocabularyModel, TextEmbeddings
from clipdense.systems.segclip.decoder import (
    MaskedDecoder,
    TokenMask,
    mask_tokens,
    patch_pixels,
    reconstruction_loss,
)
from clipdense.systems.segclip.groups import gumbel_noise
from clipdense.systems.segclip.loss import superpixel_loss
from clipdense.systems.segclip.model import GroupedImage, SegCLIPTower

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["SegCLIP"]


@META_ARCH_REGISTRY.register()
class SegCLIP(OpenVocabularyModel, nn.Module):
    """CLIP whose image tower gathers patches into groups, trained on images with captions.

    Losses: contrastive, between images and captions; superpixel, patches of a superpixel belong to one
    group; reconstruction, the groups of a quarter of the patches predict the pixels of the others. In
    evaluation, the pixels of a group get its class scores, which makes masks without any being labelled.

    Source: Luo et al., SegCLIP: Patch Aggregation with Learnable Centers for Open-Vocabulary Semantic
        Segmentation, ICML 2023.
    """

    @configurable
    def __init__(
        self,
        *,
        clip: ClipModel,
        visual: SegCLIPTower,
        decoder: MaskedDecoder | None = None,
        keep: float = 0.25,
        reconstruction_weight: float = 1.0,
        superpixel_weight: float = 1.0,
        max_logit_scale: float = 100.0,
        templates: str = "a photo of a {}.",
        window: int = 224,
        stride: int = 224,
        top_classes: int = 5,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """
        Args:
            clip: text tower, temperature, tokenizer and pixel statistics.
            visual: the image tower.
            decoder: decoder of the reconstruction; None: no reconstruction loss.
            keep: share of visible tokens in the reconstruction.
            reconstruction_weight, superpixel_weight: factors of the losses.
            max_logit_scale: upper bound of the temperature exp(logit_scale).
            templates: prompt templates of class names, see `TextBank`.
            window, stride: side and distance of the square windows of evaluation, in pixels.
            top_classes: number of classes, those with the best scores of the window, that compete for its
                groups; 0: all.
            vocabulary: classes of evaluation before another one is set; None if there are none.

        Raises:
            ValueError: If the CLIP has no text tower, there is a decoder and the image tower reconstructs
                nothing, or the window is not a multiple of the patch size.
        """
        super().__init__()
        if decoder is not None and visual.reconstruction is None:
            raise ValueError(
                "MODEL.SEGCLIP.DECODER.DEPTH needs MODEL.SEGCLIP.RECONSTRUCT_LAYERS of at least 1"
            )
        if window % visual.patch_size:
            raise ValueError(
                f"MODEL.SEGCLIP.WINDOW {window} is not a multiple of the patch size {visual.patch_size}"
            )
        self.visual, self.decoder = visual, decoder
        if decoder is None and visual.reconstruction is not None:  # no loss reaches these parts
            visual.reconstruction.requires_grad_(False)
            visual.reconstruct_blocks.requires_grad_(False)
        self.text = require_text_tower(clip)
        self.logit_scale = clip.logit_scale
        self.keep, self.max_logit_scale = keep, max_logit_scale
        self.weights = {
            "loss_contrastive": 1.0,
            "loss_superpixel": superpixel_weight,
            "loss_reconstruction": reconstruction_weight,
        }
        self.window, self.stride, self.top_classes = window, stride, top_classes
        clip.visual = nn.Identity()  # type: ignore[assignment]  # its parts belong to the image tower now
        self.bank = TextBank(clip, templates)
        self.init_vocabulary(vocabulary)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the constructor arguments from ``MODEL.CLIP`` and ``MODEL.SEGCLIP``."""
        keys, clip = cfg.MODEL.SEGCLIP, clip_from_config(cfg)
        visual = SegCLIPTower(
            clip.visual,
            group_layers=keys.GROUP_LAYERS,
            reconstruct_layers=keys.RECONSTRUCT_LAYERS,
            centers=keys.CENTERS,
            cross_layers=keys.CROSS_LAYERS,
            mixed_keys=keys.MIXED_KEYS,
        )
        decoder = None
        if keys.DECODER.DEPTH:
            height, width = visual.native_grid
            decoder = MaskedDecoder(
                visual.conv1.out_channels,
                height * width,
                visual.patch_size,
                decoder_width=keys.DECODER.WIDTH,
                depth=keys.DECODER.DEPTH,
                heads=keys.DECODER.HEADS,
            )
        return {
            "clip": clip,
            "visual": visual,
            "decoder": decoder,
            "keep": keys.KEEP,
            "reconstruction_weight": keys.RECONSTRUCTION_WEIGHT,
            "superpixel_weight": keys.SUPERPIXEL_WEIGHT,
            "max_logit_scale": keys.MAX_LOGIT_SCALE,
            "templates": keys.TEMPLATES,
            "window": keys.WINDOW,
            "stride": keys.STRIDE,
            "top_classes": keys.TOP_CLASSES,
        }

    @property
    def device(self) -> torch.device:
        """Device of the model, to which inputs are moved."""
        return self.logit_scale.device

    def train(self, mode: bool = True) -> SegCLIP:
        """Set the mode; text embeddings of the old weights are dropped."""
        super().train(mode)
        self.clear_text_cache()
        return self

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        """Embed classes as ``classes`` (K, D), unit length; see `OpenVocabularyModel`."""
        return {"classes": self.bank(vocabulary)}

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Compute the losses of a batch, or segment images.

        Args:
            batched_inputs: in training see `SegCLIPMapper`; in evaluation Detectron2's inputs, with ``image``
                (3, H, W) RGB, 0 to 255.

        Returns:
            In training, the weighted losses. In evaluation ``sem_seg`` (K, height, width) for each image,
            scores at least 0.
        """
        if not self.training:
            return [{"sem_seg": self.segment(x)} for x in batched_inputs]
        images = self._normalize(torch.stack([x["image"] for x in batched_inputs]))
        tokens = self.bank.clip.tokenizer([x["caption"] for x in batched_inputs]).to(self.device)
        segments = torch.stack([x["segments"] for x in batched_inputs]).to(self.device)
        patches, centers = segments.shape[1], len(self.visual.groups.semantic_center)
        mask = mask_tokens(torch.rand(len(images), 1 + patches, device=self.device), self.keep)
        noise = gumbel_noise(len(images), centers, patches, self.device)
        masked_noise = gumbel_noise(len(images), centers, mask.visible.shape[1] - 1, self.device)
        losses, _ = self.losses_of(images, tokens, segments, mask, noise=noise, masked_noise=masked_noise)
        return {name: self.weights[name] * loss for name, loss in losses.items() if self.weights[name]}

    def losses_of(
        self,
        images: Tensor,
        tokens: Tensor,
        segments: Tensor,
        mask: TokenMask,
        *,
        noise: Tensor,
        masked_noise: Tensor,
    ) -> tuple[dict[str, Tensor], GroupedImage]:
        """Compute the losses without their weights, and the embedding of the images.

        Args:
            images: (B, 3, H, W), normalised.
            tokens: ids of the captions (B, N).
            segments: superpixel of each patch (B, L).
            mask: visible tokens of the reconstruction.
            noise, masked_noise: Gumbel noise of the patches (B, G, L), and of the visible patches.
        """
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(self.max_logit_scale))
        found = self.visual(images, noise)
        u, t = F.normalize(found.image, dim=-1), F.normalize(self.text(tokens), dim=-1)
        losses = {
            "loss_contrastive": contrastive_loss(u, t, self.logit_scale.exp()),
            "loss_superpixel": superpixel_loss(found.grouping.hard.transpose(1, 2), segments),
        }
        if self.decoder is not None:
            visible = self.visual.reconstruct(images, mask, masked_noise)
            predicted = self.decoder(visible, mask.restore)
            pixels = patch_pixels(images, self.visual.patch_size)
            losses["loss_reconstruction"] = reconstruction_loss(predicted, pixels, mask.masked[:, 1:])
        return losses, found

    @torch.no_grad()
    def segment(self, sample: dict[str, Any]) -> Tensor:
        """Segment one image by windows, (K, height, width)."""
        image = self._normalize(sample["image"][None])
        height, width = image.shape[-2:]
        window = self.window
        # whole windows of the trained size: smaller images are enlarged to one
        scale = max(1.0, window / min(height, width))
        if scale > 1:
            enlarged = [max(window, round(side * scale)) for side in (height, width)]
            image = F.interpolate(image, enlarged, mode="bilinear", align_corners=False)
        scores = slide_windows(self.window_scores, image, window, self.stride)
        size = (sample.get("height", height), sample.get("width", width))
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)[0]

    def window_scores(self, windows: Tensor) -> Tensor:
        """Compute class scores of pixels (n, K, H, W) from normalised windows (n, 3, H, W).

        With P the softmax of the groups' logits over all classes, and P' that over the classes with the best
        scores of the window, a pixel gets P * P' of its group.
        """
        found, text = self.visual(windows), self.text_embeddings()["classes"]
        scale = self.logit_scale.exp()
        groups = scale * F.normalize(found.groups, dim=-1) @ text.T  # (n, G, K)
        scores = groups.softmax(-1)
        if 0 < self.top_classes < groups.shape[2]:
            image = F.normalize(found.image, dim=-1) @ text.T  # (n, K)
            best = torch.zeros_like(image, dtype=torch.bool)
            best.scatter_(1, image.topk(self.top_classes).indices, True)
            scores = scores * groups.masked_fill(~best[:, None], -torch.inf).softmax(-1)
        else:
            scores = scores * scores
        soft = found.grouping.soft.unflatten(2, found.grid)
        soft = F.interpolate(soft, windows.shape[-2:], mode="bilinear", align_corners=False)
        owner = soft.argmax(1)  # (n, H, W)
        pixels = torch.stack([s[o] for s, o in zip(scores, owner, strict=True)])
        return pixels.permute(0, 3, 1, 2)

    def _normalize(self, images: Tensor) -> Tensor:
        return self.bank.clip.normalize(images.to(self.device).float())
