"""DeepLab heads whose classifier is the text embeddings of the class names: MaskCLIP+'s targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.backbone.prompting import build_fixed_prompts
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary, canonical
from clipdense.data.classes import class_names
from clipdense.systems.maskclip_plus.labels import hardest_pixels, labelled_cross_entropy

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.projects.deeplab import DeepLabV3PlusHead

__all__ = ["DeepLabV2TextHead", "DeepLabV3PlusTextHead", "HardPixels", "TextClassifier"]

Features = Mapping[str, Tensor]


@dataclass(frozen=True)
class HardPixels:
    """Settings of `hardest_pixels`; a threshold of 0 keeps every pixel."""

    threshold: float = 0.0
    min_kept: int = 100000


class TextClassifier(nn.Module):
    """Frozen text embeddings t as a 1 x 1 convolution on features f that are not normalised: <f, t>.

    Attributes:
        text: (K, D), L2-normalised; part of the checkpoint, so that no text tower is needed afterwards.
        background: (D,) learned embedding of one class, or None.
    """

    text: Tensor

    def __init__(self, text: Tensor, learned_class: int | None = None) -> None:
        """
        Args:
            text: (K, D), L2-normalised.
            learned_class: class whose embedding is learned, and normalised before use; None: none.
        """
        super().__init__()
        self.register_buffer("text", text)
        self.learned_class = learned_class
        self.background = None if learned_class is None else nn.Parameter(torch.randn(text.shape[1]))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, D, h, w) to logits (B, K, h, w)."""
        text = self.text
        if self.background is not None:
            text = text.clone()
            text[self.learned_class] = F.normalize(self.background, dim=0)
        return F.conv2d(features, text[:, :, None, None].to(features))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> TextClassifier:
        """Embed the classes of the datasets with the CLIP of ``MODEL.CLIP``.

        Raises:
            ValueError: If MODEL.SEM_SEG_HEAD.NUM_CLASSES is not their number, or the background is to be
                learned and no class is called background.
        """
        keys, names = cfg.MODEL.MASKCLIP_PLUS, class_names(cfg, "stuff_classes")
        if len(names) != cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}, but the datasets "
                f"have {len(names)} classes: set it to that"
            )
        learned = None
        if keys.BACKGROUND == "learned":
            learned = next((i for i, name in enumerate(names) if canonical(name) == "background"), None)
            if learned is None:
                raise ValueError(
                    "MODEL.MASKCLIP_PLUS.BACKGROUND is learned, but no class is called background: set it to "
                    "text"
                )
        clip = clip_from_config(cfg)
        if clip.logit_scale.is_meta:
            return cls(torch.zeros(len(names), clip.embed_dim), learned)
        vocabulary = Vocabulary.from_names(names, separator=None)
        bank = TextBank(clip, keys.TEMPLATES, prompts=build_fixed_prompts(cfg, clip))
        return cls(bank(vocabulary).cpu(), learned)


def _hard_pixels(cfg: CfgNode) -> HardPixels:
    keys = cfg.MODEL.MASKCLIP_PLUS.OHEM
    return HardPixels(keys.THRESHOLD, keys.MIN_KEPT)


def _losses(head: Any, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Compute "loss_sem_seg" of logits (B, K, h, w) for labels (B, H, W)."""
    logits = F.interpolate(logits.float(), targets.shape[-2:], mode="bilinear", align_corners=False)
    settings: HardPixels = head.hard_pixels
    kept = targets != head.ignore_value
    if settings.threshold:
        kept = hardest_pixels(
            logits,
            targets,
            threshold=settings.threshold,
            min_kept=settings.min_kept,
            ignore_value=head.ignore_value,
        )
    return {"loss_sem_seg": head.loss_weight * labelled_cross_entropy(logits, targets, kept)}


@SEM_SEG_HEADS_REGISTRY.register()
class DeepLabV2TextHead(nn.Module):
    """DeepLabv2's atrous pyramid, summed, with the text embeddings as classifier.

    Sources: Chen et al., DeepLab, TPAMI 2017; Zhou et al., MaskCLIP, ECCV 2022, section 3.4.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        classifier: TextClassifier,
        dilations: Sequence[int] = (6, 12, 18, 24),
        norm: str = "BN",
        dropout: float = 0.1,
        ignore_value: int = 255,
        loss_weight: float = 1.0,
        hard_pixels: HardPixels | None = None,
    ) -> None:
        """
        Args:
            input_shape: the trunk's maps; the last one is used.
            classifier: the text embeddings.
            dilations: of the branches, 3 x 3 convolutions with as many channels as an embedding.
            norm: norm of every convolution, a name that Detectron2 knows.
            dropout: rate at which whole channels are dropped before the classifier, in 0..1.
            ignore_value: label of pixels that have no loss.
            loss_weight: factor of the loss.
            hard_pixels: None: every pixel has a loss.
        """
        super().__init__()
        self.in_feature, shape = max(input_shape.items(), key=lambda item: item[1].stride or 0)
        self.classifier, self.dropout = classifier, nn.Dropout2d(dropout)
        self.ignore_value, self.loss_weight = ignore_value, loss_weight
        self.hard_pixels = hard_pixels or HardPixels()
        width = classifier.text.shape[1]
        branches = [
            Conv2d(
                shape.channels,
                width,
                kernel_size=3,
                padding=dilation,
                dilation=dilation,
                bias=not norm,
                norm=get_norm(norm, width),
                activation=F.relu,
            )
            for dilation in dilations
        ]
        for branch in branches:
            nn.init.kaiming_normal_(branch.weight, mode="fan_out", nonlinearity="relu")
        self.branches = nn.ModuleList(branches)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        keys = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {name: input_shape[name] for name in keys.IN_FEATURES},
            "classifier": TextClassifier.from_config(cfg),
            "dilations": tuple(keys.ASPP_DILATIONS),
            "norm": keys.NORM,
            "dropout": keys.DROPOUT,
            "ignore_value": keys.IGNORE_VALUE,
            "loss_weight": keys.LOSS_WEIGHT,
            "hard_pixels": _hard_pixels(cfg),
        }

    def forward(self, features: Features, targets: Tensor | None = None) -> Any:
        """Return None and the losses in training, else logits (B, K, h, w) and no losses."""
        if self.training:
            assert targets is not None
            return None, self.losses(self.layers(features), targets)
        return self.layers(features), {}

    def embed(self, features: Features) -> Tensor:
        """Map the last map to features (B, D, h, w) that the text is compared with."""
        x = features[self.in_feature]
        return torch.stack([branch(x) for branch in self.branches]).sum(0)

    def classify(self, embedded: Tensor) -> Tensor:
        """Map features (B, D, h, w) to logits (B, K, h, w)."""
        logits: Tensor = self.classifier(self.dropout(embedded))
        return logits

    def layers(self, features: Features) -> Tensor:
        """Map the last map to logits (B, K, h, w)."""
        return self.classify(self.embed(features))

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Compute "loss_sem_seg" of logits (B, K, h, w) for labels (B, H, W)."""
        return _losses(self, predictions, targets)


@SEM_SEG_HEADS_REGISTRY.register()
class DeepLabV3PlusTextHead(DeepLabV3PlusHead):
    """Detectron2's DeepLabV3+ head, whose predictor gives features, with the text embeddings as classifier.

    Sources: Chen et al., ECCV 2018; Zhou et al., MaskCLIP, ECCV 2022, section 3.4.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        classifier: TextClassifier,
        dropout: float = 0.1,
        hard_pixels: HardPixels | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: the trunk's maps.
            classifier: the text embeddings.
            dropout: rate at which whole channels are dropped before the classifier, in 0..1.
            hard_pixels: None: every pixel has a loss.
            kwargs: arguments of `DeepLabV3PlusHead`.
        """
        super().__init__(input_shape, **kwargs | {"num_classes": classifier.text.shape[1]})
        # Detectron2 starts a classifier near 0; these are features
        nn.init.kaiming_normal_(self.predictor.weight, mode="fan_out")
        self.classifier, self.channel_dropout = classifier, nn.Dropout2d(dropout)
        self.hard_pixels = hard_pixels or HardPixels()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        return arguments | {
            "train_size": None,  # pool over the whole map, for images of any size
            "classifier": TextClassifier.from_config(cfg),
            "dropout": cfg.MODEL.SEM_SEG_HEAD.DROPOUT,
            "hard_pixels": _hard_pixels(cfg),
        }

    def embed(self, features: Features) -> Tensor:
        """Map the trunk's maps to features (B, D, h, w) that the text is compared with."""
        embedded: Tensor = super().layers(features)
        return embedded

    def classify(self, embedded: Tensor) -> Tensor:
        """Map features (B, D, h, w) to logits (B, K, h, w)."""
        logits: Tensor = self.classifier(self.channel_dropout(embedded))
        return logits

    def layers(self, features: Features) -> Tensor:
        """Map the trunk's maps to logits (B, K, h, w)."""
        return self.classify(self.embed(features))

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Compute "loss_sem_seg" of logits (B, K, h, w) for labels (B, H, W)."""
        return _losses(self, predictions, targets)
