"""`PromptedCLIP`: image classification by a frozen CLIP with learned prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.backbone.prompting import build_class_prompts, build_visual_prompts
from clipdense.clip import ClipModel, TowerRequest
from clipdense.clip.image_prompts import alignment_loss
from clipdense.clip.prompt_files import prompt_state
from clipdense.clip.prompts import ClassPrompts, require_text_tower
from clipdense.clip.templates import NAME_RULES
from clipdense.clip.text import TextBank
from clipdense.clip.visual_prompts import VisualPrompts
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.classes import dataset_vocabulary
from clipdense.open_vocabulary import OpenVocabularyModel, TextEmbeddings
from clipdense.open_vocabulary.build import label_vocabulary

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["PromptedCLIP"]


@META_ARCH_REGISTRY.register()
class PromptedCLIP(OpenVocabularyModel, nn.Module):
    """Classification of images by a CLIP whose prompts are the only parameters that learn.

    With image embedding g and class embeddings t_k, p = softmax_k(exp(logit_scale) cos(g, t_k)). Contexts of
    class names (CoOp, CoCoOp, pre-model, ICPC), tokens of the image tower (VPT), or both are trained by
    cross-entropy. Without any, this is CLIP's zero-shot classifier with hand-written templates.

    Source: CoOp (Zhou et al., IJCV 2022), section 3; CoCoOp (Zhou et al., CVPR 2022), section 3; Visual
        Prompt Tuning (Jia et al., ECCV 2022), section 3.
    """

    @configurable
    def __init__(
        self,
        *,
        clip: ClipModel,
        prompts: ClassPrompts | None = None,
        visual_prompts: VisualPrompts | None = None,
        templates: str = "single",
        dense: str = "plain",
        alignment_weight: float = 0.0,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """
        Args:
            clip: a CLIP with a text tower; frozen.
            prompts: contexts of class names; None: ``templates``.
            visual_prompts: tokens of the image tower, a ViT; None: none.
            templates: prompt templates without contexts, see `TextBank`.
            dense: mode of the dense map that pre-model prompting reads.
            alignment_weight: factor of `alignment_loss` over the images of a batch.
            vocabulary: classes of the training data; None if there are none.

        Raises:
            ValueError: If the CLIP has no text tower, or its image tower lacks the dense mode.
        """
        super().__init__()
        require_text_tower(clip)
        self.clip = clip.requires_grad_(False)
        self.prompts, self.visual_prompts = prompts, visual_prompts
        self.alignment_weight = alignment_weight
        self.bank: TextBank | None = None
        if prompts is None or not prompts.image_dependent:
            self.bank = TextBank(clip, templates, synonyms="first", prompts=prompts)
        reads_map = prompts is not None and prompts.reads_map and bool(clip.visual.dense_modes)
        if reads_map and dense not in clip.visual.dense_modes:
            raise clip.visual.cannot(
                f"MODEL.PROMPTED_CLIP.DENSE {dense!r}", f"its modes are {', '.join(clip.visual.dense_modes)}"
            )
        self.request = TowerRequest(pooled=True, dense=dense if reads_map else None)
        self.init_vocabulary(vocabulary)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the arguments from ``MODEL.CLIP``, ``MODEL.PROMPT`` and ``MODEL.PROMPTED_CLIP``."""
        clip, vocabulary, keys = clip_from_config(cfg), label_vocabulary(cfg), cfg.MODEL.PROMPTED_CLIP
        classes = () if vocabulary is None else vocabulary.names
        prompts = build_class_prompts(cfg, clip, classes)
        if prompts is not None and prompts.classes:
            for name in cfg.DATASETS.TEST:  # else evaluation would fail, after the training
                prompts.contexts_of(dataset_vocabulary(cfg, name).names, None, None)
        return {
            "clip": clip,
            "prompts": prompts,
            "visual_prompts": build_visual_prompts(cfg, clip.visual),
            "templates": keys.TEMPLATES,
            "dense": keys.DENSE,
            "alignment_weight": keys.ALIGNMENT_WEIGHT,
            "vocabulary": vocabulary,
        }

    @property
    def device(self) -> torch.device:
        """Device of the model, to which inputs are moved."""
        return self.clip.logit_scale.device

    def train(self, mode: bool = True) -> PromptedCLIP:
        """Set the mode of the prompts; CLIP stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        self.clear_text_cache()  # the prompts have changed
        return self

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        """Embed classes as ``classes`` (K, D), or tokenize them as ``tokens`` (K, L) for image-dependent
        contexts; see `OpenVocabularyModel`.
        """
        if self.bank is not None:
            return {"classes": self.bank(vocabulary)}
        return {"tokens": self._tokens(vocabulary.names)}

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Classify images.

        Args:
            batched_inputs: dicts with ``image`` (3, S, S) uint8 RGB and, in training, ``label``.

        Returns:
            In training, ``loss_cls`` and, with a weight, ``loss_alignment``. In evaluation, for each image,
            ``class_scores`` (K,), logits.

        Raises:
            ValueError: In training, if there is nothing to train.
        """
        images = self.clip.normalize(torch.stack([x["image"] for x in batched_inputs]).float())
        hook = {} if self.visual_prompts is None else {"hook": self.visual_prompts}
        out = self.clip.visual(images, self.request, **hook)
        g, z = out.pooled, out.dense if self.request.dense else None  # (B, D), (B, D, h, w)
        t = self._training_text(g, z) if self.training else self._text(g, z)  # (B or 1, K, D)
        cosine = torch.einsum(
            "bd,bkd->bk", F.normalize(g, dim=-1), F.normalize(t, dim=-1).expand(len(g), -1, -1)
        )
        logits = self.clip.logit_scale.exp() * cosine
        if not self.training:
            return [{"class_scores": scores} for scores in logits]
        labels = torch.tensor([x["label"] for x in batched_inputs], device=self.device)
        losses = {"loss_cls": F.cross_entropy(logits, labels)}
        if self.alignment_weight:
            losses["loss_alignment"] = self.alignment_weight * alignment_loss(logits.T[None], labels[None])
        return losses

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the prompts alone, for MODEL.PROMPT.WEIGHTS of any system; see `prompt_state`.

        Raises:
            ValueError: If there are no prompts.
        """
        if self.prompts is None and self.visual_prompts is None:
            raise ValueError(f"there are no prompts to export: {_NOTHING}")
        return prompt_state(self.prompts, self.visual_prompts, self.clip.name)

    def _training_text(self, g: Tensor, z: Tensor | None) -> Tensor:
        """Embed the classes of the labels with gradients to the contexts, (B or 1, K, D)."""
        if self.prompts is None:
            if self.visual_prompts is None:
                raise ValueError(f"PromptedCLIP has nothing to train: {_NOTHING}")
            return self.training_text_embeddings()["classes"][None]
        if self.label_vocabulary is None:
            raise ValueError("PromptedCLIP has no classes to train: set DATASETS.TRAIN")
        names = self.label_vocabulary.names
        tokens = self._tokens(names).to(self.device)
        return self.prompts.encode(require_text_tower(self.clip), tokens, names, g, z)

    def _text(self, g: Tensor, z: Tensor | None) -> Tensor:
        """Embed the evaluation vocabulary, (B or 1, K, D)."""
        text = self.text_embeddings()
        if self.bank is not None:
            return text["classes"][None]
        assert self.prompts is not None and self.vocabulary is not None
        tower = require_text_tower(self.clip)
        return self.prompts.encode(tower, text["tokens"], self.vocabulary.names, g, z)

    def _tokens(self, names: Sequence[str]) -> Tensor:
        """Tokenize class names as the contexts expect them, (K, L).

        Raises:
            ValueError: If names are too long for the text tower; lists them.
        """
        assert self.prompts is not None
        texts = [self.prompts.template.format(NAME_RULES["spaces"](name)) for name in names]
        return self.clip.tokenize(texts, require_text_tower(self.clip).context_length - self.prompts.length)


_NOTHING = "set MODEL.PROMPT.METHOD (contexts, cocoop, ...) or MODEL.PROMPT.VISUAL.N_TOKENS"
