"""Two trainings of a CLIP's dense map: `CLIPSelf`, and the RegionCLIP baseline of its paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.clip import ClipModel, TowerRequest
from clipdense.clip.tables import TextTable
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.checks import dataset_classes
from clipdense.systems.clipself.loss import concept_loss, cosine_loss, sample_concepts
from clipdense.systems.clipself.student import MAX_LOGIT_SCALE, DenseStudent

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["CLIPSelf", "RegionCLIPBaseline"]


@META_ARCH_REGISTRY.register()
class CLIPSelf(DenseStudent):
    """CLIPSelf (Wu et al., ICLR 2024), Sec. 3.

    The student's dense map of an image is pooled over regions (RoIAlign on the L2-normalised map) and learns
    from the frozen teacher's image embeddings of the same regions, cropped from the image. The teacher is the
    student before the training. The loss is 1 - cosine, averaged over regions.
    """

    @configurable
    def __init__(
        self,
        *,
        clip: ClipModel,
        mode: str = "value",
        unlocked_groups: int = -1,
        alpha: float = 1.0,
        weight: float = 1.0,
        embedding_weight: float = 0.0,
        multiscale: Sequence[int] = (),
        window: int = 0,
    ) -> None:
        """
        Args:
            clip: the model to train.
            mode: last-block mode of the dense map.
            unlocked_groups, alpha, weight, multiscale, window: see `DenseStudent`.
            embedding_weight: weight of 1 - cosine between student's and teacher's embeddings of the crops.

        Raises:
            ValueError: See `DenseStudent`.
        """
        super().__init__(
            clip,
            request=TowerRequest(dense=mode, pooled=embedding_weight > 0),
            unlocked_groups=unlocked_groups,
            alpha=alpha,
            weight=weight,
            multiscale=multiscale,
            window=window,
        )
        self.embedding_weight = embedding_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.CLIP`` and ``MODEL.CLIPSELF``.

        Raises:
            ValueError: If MODEL.CLIPSELF.CONCEPTS is set; see also `DenseStudent.from_config`.
        """
        if cfg.MODEL.CLIPSELF.CONCEPTS:
            raise ValueError(
                "MODEL.CLIPSELF.CONCEPTS is not used by CLIPSelf; set MODEL.META_ARCHITECTURE to "
                "RegionCLIPBaseline, or CONCEPTS to ''"
            )
        return super().from_config(cfg) | {"embedding_weight": cfg.MODEL.CLIPSELF.EMBEDDING_WEIGHT}

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Compute the losses of a batch.

        Args:
            batched_inputs: see `CLIPSelfMapper`, with ``crops``.

        Returns:
            In training ``{"loss_distillation"}``, and ``"loss_embedding"`` if it has a weight. In evaluation
            an empty dict for each input, see `DenseStudent`.

        Raises:
            ValueError: If the inputs have no crops, or the tower's stride does not divide their image size.
        """
        if not self.training:
            return [{} for _ in batched_inputs]
        x = _concatenate(batched_inputs, "crops", "patches or proposals")
        crops = self.student.normalize(x)  # (n, 3, s, s)
        f = self.pool_regions(batched_inputs, "clipself_raw")  # (n, D); the loss normalises
        with torch.no_grad():
            g = self.teacher.encode_image(crops)  # (n, D)
        losses = {"loss_distillation": self.weight * cosine_loss(f, g)}
        if self.embedding_weight:
            losses["loss_embedding"] = self.embedding_weight * cosine_loss(
                self.student.encode_image(crops), g
            )
        return losses


@META_ARCH_REGISTRY.register()
class RegionCLIPBaseline(DenseStudent):
    """The RegionCLIP baseline of CLIPSelf's paper (Wu et al., ICLR 2024, Sec. 4; Zhong et al., CVPR 2022).

    The student's dense map is pooled over boxes with concepts (nouns of captions, matched beforehand) and
    classified by the text embeddings of sampled concepts. There is no distillation; the teacher is only the
    frozen part of the ensemble.

    Attributes:
        concepts: (K, D) L2-normalised concept embeddings.
    """

    concepts: Tensor

    @configurable
    def __init__(
        self,
        *,
        clip: ClipModel,
        concepts: Tensor,
        num_concepts: int = 100,
        mode: str = "value",
        unlocked_groups: int = -1,
        alpha: float = 1.0,
        weight: float = 1.0,
        multiscale: Sequence[int] = (),
        window: int = 0,
    ) -> None:
        """
        Args:
            clip: the model to train.
            concepts: (K, D) concept embeddings, of any length.
            num_concepts: number of concepts that each batch is compared with, see `sample_concepts`.
            mode: last-block mode of the dense map.
            unlocked_groups, alpha, weight, multiscale, window: see `DenseStudent`.

        Raises:
            ValueError: See `DenseStudent`.
        """
        super().__init__(
            clip,
            request=TowerRequest(dense=mode),
            unlocked_groups=unlocked_groups,
            alpha=alpha,
            weight=weight,
            multiscale=multiscale,
            window=window,
        )
        self.num_concepts = num_concepts
        self.register_buffer("concepts", F.normalize(concepts, dim=1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.CLIP`` and ``MODEL.CLIPSELF``.

        Raises:
            ValueError: If MODEL.CLIPSELF.CONCEPTS is empty, or EMBEDDING_WEIGHT is set; see also
                `DenseStudent.from_config`.
        """
        keys = cfg.MODEL.CLIPSELF
        if not keys.CONCEPTS or keys.EMBEDDING_WEIGHT:
            raise ValueError(
                "RegionCLIPBaseline needs MODEL.CLIPSELF.CONCEPTS, a text table with a row for each class of "
                "the training dataset, and MODEL.CLIPSELF.EMBEDDING_WEIGHT 0, as it has no teacher"
            )
        arguments = super().from_config(cfg)
        concepts = _concept_table(cfg, arguments["clip"].embed_dim)
        return arguments | {"concepts": concepts, "num_concepts": keys.NUM_CONCEPTS}

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Compute the loss of a batch.

        Args:
            batched_inputs: see `CLIPSelfMapper`, with ``concepts``.

        Returns:
            In training ``{"loss_concepts"}``. In evaluation an empty dict for each input, see `DenseStudent`.

        Raises:
            ValueError: If the inputs have no concepts, or the tower's stride does not divide their image
                size.
        """
        if not self.training:
            return [{} for _ in batched_inputs]
        concepts = _concatenate(batched_inputs, "concepts", "concepts")  # (n,)
        features = self.pool_regions(batched_inputs, "clipself")  # (n, D), L2-normalised
        sampled = sample_concepts(concepts, len(self.concepts), self.num_concepts)  # (S,)
        return {"loss_concepts": self.weight * self.region_loss(features, concepts, sampled)}

    def region_loss(self, features: Tensor, concepts: Tensor, sampled: Tensor) -> Tensor:
        """Compute `concept_loss` of region features against sampled concepts.

        Args:
            features: (n, D) L2-normalised.
            concepts: (n,) int64, the concept of each region.
            sampled: (S,) int64, distinct concepts, among them those of the regions.
        """
        row = torch.zeros(len(self.concepts), dtype=torch.long)
        row[sampled] = torch.arange(len(sampled))
        scale = self.student.logit_scale.clamp(0, MAX_LOGIT_SCALE).exp()
        embeddings = self.concepts[sampled.to(self.device)]  # (S, D)
        return concept_loss(features, row[concepts].to(self.device), embeddings, scale)


def _concatenate(batched_inputs: Sequence[dict[str, Any]], field: str, regions: str) -> Tensor:
    """Concatenate a field of all inputs; an error names the value of REGIONS that gives it."""
    if field not in batched_inputs[0]:
        raise ValueError(f"the inputs have no {field}: set INPUT.CLIPSELF.REGIONS to {regions}")
    return torch.cat([sample[field] for sample in batched_inputs])


def _concept_table(cfg: CfgNode, dim: int) -> Tensor:
    """Load the embeddings (K, D) of the classes of the training dataset, in their order."""
    classes = [c for name in cfg.DATASETS.TRAIN[:1] for c in dataset_classes(name, "thing") or ()]
    if not classes:
        raise ValueError("MODEL.CLIPSELF.CONCEPTS needs a training dataset with classes; see DATASETS.TRAIN")
    vocabulary = Vocabulary.from_names(classes, separator=None)
    return TextTable.load(Path(cfg.MODEL.CLIPSELF.CONCEPTS), vocabulary, dim=dim)(vocabulary)
