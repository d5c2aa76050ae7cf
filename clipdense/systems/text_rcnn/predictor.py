"""Box classification by cosine similarity to class-name embeddings."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip.tables import TextTable
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.classes import class_names

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers


class TextClassifier(nn.Module):
    """Logits of K classes and the background from a region feature x (ViLD-text, Gu et al., ICLR 2022,
    section 3.2).

    z = W x + b, logit_k = cos(z, t_k) / tau, with the frozen class embeddings t_1 .. t_K and a learned t_bg.
    """

    text: Tensor

    def __init__(
        self,
        in_features: int,
        text: Tensor,
        *,
        background: str = "learned",
        temperature: float = 0.02,
        learn_temperature: bool = True,
    ) -> None:
        """
        Args:
            in_features: size of x.
            text: (K, D), normalised here.
            background: "learned" (an embedding) or "zero" (a logit of 0).
            temperature: tau at the start, above 0.
            learn_temperature: whether it is trained, as log(1 / tau).
        """
        super().__init__()
        if background not in ("learned", "zero"):
            raise ValueError(f"MODEL.TEXT_RCNN.BACKGROUND must be learned or zero, not {background!r}")
        if temperature <= 0:
            raise ValueError(f"MODEL.TEXT_RCNN.TEMPERATURE must be above 0, not {temperature}")
        self.register_buffer("text", F.normalize(text.float(), dim=1))
        self.project = nn.Linear(in_features, text.shape[1])
        nn.init.normal_(self.project.weight, std=0.01)
        nn.init.zeros_(self.project.bias)
        self.background = nn.Parameter(torch.randn(1, text.shape[1])) if background == "learned" else None
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn_temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Region features (R, C) -> logits (R, K + 1), the background last."""
        z = F.normalize(self.project(x), dim=1)
        if self.background is None:
            return F.pad(z @ self.text.T * self.log_scale.exp(), (0, 1))
        embeddings = torch.cat([self.text, F.normalize(self.background, dim=1)])
        return z @ embeddings.T * self.log_scale.exp()


class TextBoxPredictor(FastRCNNOutputLayers):
    """Detectron2's box predictor with a `TextClassifier` for the scores; boxes, losses and inference are its
    own.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        text: Tensor,
        background: str = "learned",
        temperature: float = 0.02,
        learn_temperature: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: of a region's feature.
            text, background, temperature, learn_temperature: see `TextClassifier`.
            kwargs: of `FastRCNNOutputLayers`.

        Raises:
            ValueError: another number of embeddings than of classes.
        """
        super().__init__(input_shape, **kwargs)
        if len(text) != self.num_classes:
            raise ValueError(
                f"{len(text)} text embeddings for MODEL.ROI_HEADS.NUM_CLASSES {self.num_classes}"
            )
        self.cls_score: nn.Module = TextClassifier(
            cast(nn.Linear, self.bbox_pred).in_features,
            text,
            background=background,
            temperature=temperature,
            learn_temperature=learn_temperature,
        )

    @classmethod
    def from_config(cls, cfg: CN, input_shape: ShapeSpec) -> dict[str, Any]:
        return {
            **super().from_config(cfg, input_shape),
            "text": class_embeddings(cfg),
            "background": cfg.MODEL.TEXT_RCNN.BACKGROUND,
            "temperature": cfg.MODEL.TEXT_RCNN.TEMPERATURE,
            "learn_temperature": cfg.MODEL.TEXT_RCNN.LEARN_TEMPERATURE,
        }


def class_embeddings(cfg: CN) -> Tensor:
    """Embeddings (K, D) of the thing classes of the data sets that ``cfg`` names.

    Raises:
        ValueError: no data set, data sets whose classes differ, or a table that has not all of them.
        FileNotFoundError: no such table.
    """
    vocabulary = Vocabulary.from_names(class_names(cfg), separator=None)
    table: str = cfg.MODEL.TEXT_RCNN.TABLE
    if table:
        return TextTable.load(_find(table), vocabulary)(vocabulary)
    return TextBank(clip_from_config(cfg), cfg.MODEL.TEXT_RCNN.TEMPLATES)(vocabulary).cpu()


def _find(table: str) -> Path:
    """The table itself, or the one of that name below DETECTRON2_DATASETS."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    places = [Path(table).expanduser(), root / table]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"MODEL.TEXT_RCNN.TABLE: there is no {' and no '.join(map(str, dict.fromkeys(places)))}"
        )
    return found
