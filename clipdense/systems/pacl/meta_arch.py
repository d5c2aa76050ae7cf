"""`PACL`: training of a patch embedder on a frozen CLIP, zero-shot segmentation and classification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.backbone.prompting import build_fixed_prompts
from clipdense.clip import ClipModel, TowerRequest
from clipdense.clip.patch_embedder import PatchEmbedder, patch_channels
from clipdense.clip.prompts import ClassPrompts, require_text_tower
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.evaluation.probes import MapProbe, PatchProbe
from clipdense.inference import PatchWindows, max_over_synonyms, segment_by_patches
from clipdense.open_vocabulary import OpenVocabularyModel, TextEmbeddings
from clipdense.systems.pacl.alignment import patch_alignment, patch_contrastive_loss

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["PACL"]


@META_ARCH_REGISTRY.register()
class PACL(OpenVocabularyModel, nn.Module):
    """Frozen CLIP with a patch embedder, trained on images with captions.

    1. The image tower gives patches v_t after its final norm; the embedder maps them to e(v_t).
    2. A caption y weights the patches by their cosines with it; phi(x, y) is the weighted mean of the
       cosines (`patch_alignment`).
    3. The symmetric InfoNCE loss compares phi of all pairs of the batch. Only the embedder and the
       temperature are trained.
    4. In evaluation, the cosines of e(v_t) with the class names are resized to the image; the class of an
       image is the one with the largest phi.

    Source: Mukhoti et al., Open Vocabulary Semantic Segmentation with Patch Aligned Contrastive Learning,
        CVPR 2023.
    """

    @configurable
    def __init__(
        self,
        *,
        clip: ClipModel,
        embedder: PatchEmbedder,
        patch_temperature: float = 1.0,
        logit_scale: float = 0.0,
        max_logit_scale: float = 100.0,
        templates: str | Sequence[str] = "single",
        prompts: ClassPrompts | None = None,
        windows: PatchWindows | None = None,
        max_dense_classes: int = 256,
        input_format: str = "RGB",
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """
        Args:
            clip: the CLIP, which is frozen; it needs a text tower.
            embedder: maps its patches to the joint space.
            patch_temperature: see `patch_alignment`.
            logit_scale: initial inverse temperature of the loss; 0: that of the CLIP.
            max_logit_scale: upper bound of it.
            templates: prompt templates of class names, see `TextBank`.
            prompts: trained contexts of class names, instead of templates; see `build_fixed_prompts`.
            windows: sliding windows of evaluation; None: the whole image, padded to whole patches.
            max_dense_classes: with more classes, evaluation gives only labels and no class maps; 0: no limit.
            input_format: order of the channels of images in evaluation, "RGB" or "BGR".
            vocabulary: classes of evaluation before another one is set; None if there are none.

        Raises:
            ValueError: If the CLIP has no text tower, or does not have the mode.
        """
        super().__init__()
        require_text_tower(clip)
        tower = clip.visual
        if (mode := embedder.mode) not in tower.dense_modes:
            why = tower.why_no_dense or f"its modes are {', '.join(tower.dense_modes)}"
            raise tower.cannot(f"patches of mode {mode!r} (MODEL.PACL.MODE)", why)
        self.clip = clip.eval().requires_grad_(False)
        self.embedder = embedder
        initial = torch.tensor(math.log(logit_scale)) if logit_scale else clip.logit_scale.detach().clone()
        self.logit_scale = nn.Parameter(initial)
        self.patch_temperature, self.max_logit_scale = patch_temperature, max_logit_scale
        self.windows = windows or PatchWindows(multiple=tower.stride)
        self.max_dense_classes = max_dense_classes
        self.input_format = input_format
        self.bank = TextBank(clip, templates, prompts=prompts)
        self.init_vocabulary(vocabulary)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the constructor arguments from ``MODEL.CLIP`` and ``MODEL.PACL``."""
        keys, clip = cfg.MODEL.PACL, clip_from_config(cfg)
        embedder = PatchEmbedder(patch_channels(clip.visual), clip.embed_dim, keys.MODE)
        if keys.INIT == "projection":
            embedder.start_from_projection(clip.visual)
        return {
            "clip": clip,
            "embedder": embedder,
            "patch_temperature": keys.PATCH_TEMPERATURE,
            "logit_scale": keys.LOGIT_SCALE,
            "max_logit_scale": keys.MAX_LOGIT_SCALE,
            "templates": keys.TEMPLATES,
            "prompts": build_fixed_prompts(cfg, clip),
            "windows": PatchWindows(keys.WINDOW, keys.STRIDE, keys.BATCH_SIZE, clip.visual.stride),
            "max_dense_classes": cfg.TEST.MAX_DENSE_CLASSES,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        """Device of the model, to which inputs are moved."""
        return self.logit_scale.device

    def train(self, mode: bool = True) -> PACL:
        """Set the mode of the embedder; the CLIP stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        """Embed every name of every class: ``text`` (S, D), unit length, and ``classes`` (S,)."""
        text, classes = self.bank.per_synonym(vocabulary)
        return {"text": text, "classes": classes}

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Compute the loss of a batch, or segment and classify images.

        Args:
            batched_inputs: in training see `CaptionMapper`; in evaluation Detectron2's inputs, with ``image``
                (3, H, W), 0 to 255.

        Returns:
            In training ``loss_contrastive``. In evaluation, for each image, ``sem_seg`` (K, height, width),
            scores in 0..1, or for large vocabularies ``sem_seg_labels`` (height, width); and ``class_scores``
            (K,), the compatibility of the image with the classes. For images of one class, whose inputs have
            a ``label``, the class scores alone.
        """
        if not self.training:
            return [self._predict(sample) for sample in batched_inputs]
        images = self.clip.normalize(torch.stack([x["image"] for x in batched_inputs]))
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(self.max_logit_scale))
            tokens = self.clip.tokenizer([x["caption"] for x in batched_inputs]).to(self.device)
            text = F.normalize(self.clip.encode_text(tokens).float(), dim=-1)
        patches = F.normalize(self.dense_map(images).float(), dim=1).flatten(2).transpose(1, 2)
        loss = patch_contrastive_loss(patches, text, self.logit_scale.exp(), self.patch_temperature)
        return {"loss_contrastive": loss}

    def dense_map(self, images: Tensor) -> Tensor:
        """Embed the patches of normalised images (B, 3, H, W) as (B, D, h, w), not L2-normalised."""
        with torch.no_grad():
            features = self.clip.visual(images, TowerRequest(pre=True, dense=self.embedder.mode)).pre
        e: Tensor = self.embedder(features)
        return e

    @torch.no_grad()
    def _predict(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        image = sample["image"] if self.input_format == "RGB" else sample["image"].flip(0)
        pixels = self.clip.normalize(image[None])
        embeddings, count = self.text_embeddings(), len(self.vocabulary or ())
        text, classes = embeddings["text"], embeddings["classes"]
        height, width = pixels.shape[-2:]
        maps = self.windows.maps(lambda crops: F.normalize(self.dense_map(crops), dim=1), pixels)
        patches = maps.flatten(2).permute(0, 2, 1).flatten(0, 1)[None]  # of all windows
        phi = patch_alignment(patches, text, self.patch_temperature)[0]
        scores = {"class_scores": max_over_synonyms(phi[:, None], classes, count)[:, 0]}
        if "label" in sample:
            return scores
        segmentation = segment_by_patches(
            maps,
            self.windows,
            (height, width),
            (sample.get("height", height), sample.get("width", width)),
            text,
            classes,
            count,
            scale=float(self.logit_scale.exp()),
            max_dense_classes=self.max_dense_classes,
        )
        return segmentation | scores

    def patch_probe(self) -> PatchProbe:
        """See `ProvidesPatchProbe`: the embedded patches of whole images."""
        return MapProbe(
            self.dense_map, self.clip.normalize, self.clip.visual.stride, window=self.windows.window
        )

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Export the embedder alone, in the format of `load_patch_embedder`.

        Returns:
            Its state, and the metadata of the file.
        """
        state = {key: value.contiguous() for key, value in self.embedder.state_dict().items()}
        return state, self.embedder.file_metadata(self.clip.name)
