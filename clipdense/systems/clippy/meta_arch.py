"""`CLIPpy`: image-text training with max pooling over patches, and segmentation by patches and groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip.contrastive import contrastive_loss
from clipdense.clip.pixels import normalize_pixels
from clipdense.clip.vocabulary import Vocabulary
from clipdense.evaluation.probes import MapProbe, PatchProbe
from clipdense.inference import PatchWindows, segment_by_patches
from clipdense.open_vocabulary import OpenVocabularyModel, TextEmbeddings
from clipdense.systems.clippy.image import PatchEncoder, timm_tower
from clipdense.systems.clippy.text import CLIPTexts, SentenceT5, TextEncoder, embed_names

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["CLIPpy"]


@META_ARCH_REGISTRY.register()
class CLIPpy(OpenVocabularyModel, nn.Module):
    """Image tower with max pooling over its patches, and a text encoder, trained on images with captions.

    1. The image embedding is the maximum over the patches after the final norm, channel by channel.
    2. The symmetric contrastive loss compares it with the embedding of the caption; both sides are trained,
       from DINO and Sentence-T5 in the paper.
    3. In evaluation, top-down: the cosines of the patches with the class names are resized to the image.
       Bottom-up: the patches are grouped without names, see `clipdense.evaluation.GroupingEvaluator`.

    Source: Ranasinghe et al., Perceptual Grouping in Contrastive Vision-Language Models, ICCV 2023.
    """

    @configurable
    def __init__(
        self,
        *,
        image: PatchEncoder,
        text: TextEncoder,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        logit_scale: float = 14.2857,
        max_logit_scale: float = 100.0,
        templates: str = "single",
        windows: PatchWindows | None = None,
        max_dense_classes: int = 256,
        input_format: str = "RGB",
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """
        Args:
            image: the image side.
            text: the text side.
            pixel_mean, pixel_std: statistics of RGB images in 0..1.
            logit_scale: initial inverse temperature, above 0.
            max_logit_scale: upper bound of it.
            templates: prompt templates of class names.
            windows: sliding windows of evaluation; None: the whole image, padded to whole patches.
            max_dense_classes: with more classes, evaluation gives only labels and no class maps; 0: no limit.
            input_format: order of the channels of images in evaluation, "RGB" or "BGR".
            vocabulary: classes of evaluation before another one is set; None if there are none.

        Raises:
            ValueError: If the embeddings of images and texts differ in dimension.
        """
        super().__init__()
        tower = image.tower
        if tower.embed_dim != text.embed_dim:
            raise ValueError(
                f"CLIPpy has no projections: the patches have {tower.embed_dim} channels and the texts "
                f"{text.embed_dim}; choose MODEL.CLIPPY.IMAGE and SENTENCE_T5 of one width"
            )
        self.image, self.text = image, text
        self.pixel_mean, self.pixel_std = tuple(pixel_mean), tuple(pixel_std)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.max_logit_scale = max_logit_scale
        self.templates = templates
        self.windows = windows or PatchWindows(multiple=tower.stride)
        self.max_dense_classes, self.input_format = max_dense_classes, input_format
        self.init_vocabulary(vocabulary)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the constructor arguments from ``MODEL.CLIPPY``, ``MODEL.CLIP`` and ``MODEL.TIMM``."""
        keys = cfg.MODEL.CLIPPY
        of_clip = keys.IMAGE == "clip"
        clip = clip_from_config(cfg) if of_clip or not keys.SENTENCE_T5 else None
        if of_clip:
            assert clip is not None
            tower, mean, std = clip.visual, clip.pixel_mean, clip.pixel_std
        else:
            tower, mean, std = timm_tower(
                cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.PRETRAINED, allow_pickle=cfg.MODEL.ALLOW_PICKLE
            )
            if cfg.MODEL.CLIP.PATCH_STRIDE:
                tower.set_patch_stride(cfg.MODEL.CLIP.PATCH_STRIDE)
        text: TextEncoder
        if keys.SENTENCE_T5:
            text = SentenceT5.create(keys.SENTENCE_T5)
        else:
            assert clip is not None
            text = CLIPTexts(clip)
        scale = keys.LOGIT_SCALE or (1 / 0.07 if clip is None else float(clip.logit_scale.detach().exp()))
        return {
            "image": PatchEncoder(tower, pooling=keys.POOLING, token_drop=keys.TOKEN_DROP),
            "text": text,
            "pixel_mean": mean,
            "pixel_std": std,
            "logit_scale": scale,
            "max_logit_scale": keys.MAX_LOGIT_SCALE,
            "templates": keys.TEMPLATES,
            "windows": PatchWindows(keys.WINDOW, keys.STRIDE, keys.BATCH_SIZE, tower.stride),
            "max_dense_classes": cfg.TEST.MAX_DENSE_CLASSES,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        """Device of the model, to which inputs are moved."""
        return self.logit_scale.device

    def train(self, mode: bool = True) -> CLIPpy:
        """Set the mode; text embeddings of the old weights are dropped."""
        super().train(mode)
        self.clear_text_cache()
        return self

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        """Embed every name of every class: ``text`` (S, D), unit length, and ``classes`` (S,)."""
        text, classes = embed_names(self.text, vocabulary, self.templates)
        return {"text": text, "classes": classes}

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Compute the loss of a batch, or segment and classify images.

        Args:
            batched_inputs: in training see `CaptionMapper`; in evaluation Detectron2's inputs, with ``image``
                (3, H, W), 0 to 255.

        Returns:
            In training ``loss_contrastive``. In evaluation, for each image, ``sem_seg`` (K, height, width),
            scores in 0..1, or for large vocabularies ``sem_seg_labels`` (height, width).
        """
        if not self.training:
            return [self._predict(sample) for sample in batched_inputs]
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(self.max_logit_scale))
        images = self.normalize(torch.stack([x["image"] for x in batched_inputs]))
        u = F.normalize(self.image(images).float(), dim=-1)
        t = F.normalize(self.text([x["caption"] for x in batched_inputs]).float(), dim=-1)
        return {"loss_contrastive": contrastive_loss(u, t, self.logit_scale.exp())}

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise RGB images (..., 3, H, W), 0..255, on the model's device."""
        return normalize_pixels(images.to(self.device), self.pixel_mean, self.pixel_std)

    @torch.no_grad()
    def _predict(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        image = sample["image"] if self.input_format == "RGB" else sample["image"].flip(0)
        pixels = self.normalize(image[None])
        height, width = pixels.shape[-2:]
        embeddings = self.text_embeddings()
        return segment_by_patches(
            self.windows.maps(self.image.patches, pixels),
            self.windows,
            (height, width),
            (sample.get("height", height), sample.get("width", width)),
            embeddings["text"],
            embeddings["classes"],
            len(self.vocabulary or ()),
            scale=float(self.logit_scale.exp()),
            max_dense_classes=self.max_dense_classes,
        )

    def patch_probe(self) -> PatchProbe:
        """See `ProvidesPatchProbe`: the patches of whole images, or of the windows of evaluation."""
        return MapProbe(
            self.image.patches, self.normalize, self.image.tower.stride, window=self.windows.window
        )
