"""Box classification by cosine similarity to class-name embeddings."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.backbone.prompting import build_fixed_prompts
from clipdense.clip.tables import TextTable, find_table
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.classes import class_names
from clipdense.paths import datasets_root
from clipdense.regions import TextClassifier

from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers


class TextBoxPredictor(FastRCNNOutputLayers):
    """Detectron2's box predictor with a `TextClassifier` for the scores.

    Boxes, losses and inference are Detectron2's.

    Source: ViLD-text, Gu et al., ViLD, ICLR 2022, section 3.2.
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
            input_shape: shape of a region's feature.
            text, background, temperature, learn_temperature: see `TextClassifier`.
            kwargs: arguments of `FastRCNNOutputLayers`.

        Raises:
            ValueError: If the numbers of embeddings and classes differ.
        """
        super().__init__(input_shape, **kwargs)
        if len(text) != self.num_classes:
            raise ValueError(
                f"{len(text)} text embeddings, but MODEL.ROI_HEADS.NUM_CLASSES is {self.num_classes}"
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
    """Return the embeddings (K, D) of the thing classes of the configured datasets.

    Raises:
        ValueError: If no dataset is configured, if the classes of the datasets differ, or if the table lacks
            one of them.
        FileNotFoundError: If the table does not exist.
    """
    vocabulary = Vocabulary.from_names(class_names(cfg), separator=None)
    table: str = cfg.MODEL.TEXT_RCNN.TABLE
    if table and cfg.MODEL.PROMPT.WEIGHTS:
        raise ValueError(
            "MODEL.PROMPT.WEIGHTS has no effect with MODEL.TEXT_RCNN.TABLE, which holds finished embeddings; "
            "set TABLE to ''"
        )
    if table:
        path = find_table(table, datasets_root(), key="MODEL.TEXT_RCNN.TABLE")
        return TextTable.load(path, vocabulary)(vocabulary)
    clip = clip_from_config(cfg)
    bank = TextBank(clip, cfg.MODEL.TEXT_RCNN.TEMPLATES, prompts=build_fixed_prompts(cfg, clip))
    return bank(vocabulary).cpu()
