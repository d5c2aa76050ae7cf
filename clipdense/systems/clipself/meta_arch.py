"""`CLIPSelf`: a CLIP whose dense map learns from its own image embeddings of crops."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip import ClipModel, TowerRequest
from clipdense.clip.tables import TextTable
from clipdense.clip.towers import Tower
from clipdense.clip.towers.resnet import ResNetTower
from clipdense.clip.towers.transformer import TransformerTower
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.checks import dataset_classes
from clipdense.regions import pool_boxes
from clipdense.systems.clipself.loss import concept_loss, cosine_loss, sample_concepts

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["CLIPSelf", "unlock"]

MAX_LOGIT_SCALE = math.log(100.0)


@META_ARCH_REGISTRY.register()
class CLIPSelf(nn.Module):
    """CLIPSelf (Wu et al., ICLR 2024), Sec. 3.

    The student's dense map of an image is pooled over regions (RoIAlign on the unit map) and meets the
    frozen teacher's image embeddings of the same regions, cut from the image; the teacher is the student at
    the start. The loss is 1 - cosine, mean over regions.

    What is not trained: the text tower, the teacher, the student below its unlocked groups, its final norm
    and projection, statistics of BatchNorm, and what the dense map does not depend on, such as queries and
    keys of the last block. (Where queries, keys and values are one tensor, as in OpenAI's ViTs, weight decay
    still reaches all of it, as in the released code.)

    Attributes:
        student, teacher: `ClipModel`; the teacher has no text tower.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    concepts: Tensor | None

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
        multiscale: tuple[int, ...] = (),
        concepts: Tensor | None = None,
        num_concepts: int = 100,
    ) -> None:
        """
        Args:
            clip: the model to train.
            mode: last-block mode of the dense map.
            unlocked_groups: see `unlock`.
            alpha: share of the student in what is evaluated and exported; 1 or more for all.
            weight: of the loss.
            embedding_weight: of 1 - cosine between the image embeddings of the crops.
            multiscale: sides in pixels, one of which each batch is resized to; none leaves it as it is.
            concepts: (K, D) concept embeddings: RegionCLIP's region-noun loss takes the place of
                distillation.
            num_concepts: that each batch is compared with, see `sample_concepts`.

        Raises:
            ValueError: see `unlock`; a side that the tower's stride does not divide.
        """
        super().__init__()
        if odd := [side for side in multiscale if side % clip.visual.stride]:
            raise ValueError(
                f"MODEL.CLIPSELF.MULTISCALE: {odd} are no multiples of the stride {clip.visual.stride}"
            )
        self.teacher = ClipModel(
            clip.name,
            deepcopy(clip.visual),
            None,
            deepcopy(clip.logit_scale),
            deepcopy(clip.logit_bias),
            clip.config,
        ).requires_grad_(False)
        self.student = clip.requires_grad_(False)
        unlock(clip.visual, unlocked_groups, TowerRequest(dense=mode, pooled=embedding_weight > 0))
        self.mode, self.alpha, self.weight = mode, alpha, weight
        self.embedding_weight, self.multiscale, self.num_concepts = embedding_weight, multiscale, num_concepts
        self.register_buffer(
            "concepts", None if concepts is None else F.normalize(concepts, dim=1), persistent=False
        )
        for name, value in (("pixel_mean", clip.pixel_mean), ("pixel_std", clip.pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1) * 255, persistent=False)
        self._ensemble: list[ClipModel] = []  # in a list: not a part of this module
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments from ``MODEL.CLIP`` and ``MODEL.CLIPSELF``.

        Raises:
            ValueError: a position grid, which the exported file could not say; and see `clip_from_config`.
        """
        keys = cfg.MODEL.CLIPSELF
        if cfg.MODEL.CLIP.POSITION_GRID:
            raise ValueError("MODEL.CLIP.POSITION_GRID: the exported CLIP keeps its own grid; set it to 0")
        clip = clip_from_config(cfg)
        return {
            "clip": clip,
            "mode": keys.MODE,
            "unlocked_groups": keys.UNLOCKED_GROUPS,
            "alpha": keys.ALPHA,
            "weight": keys.WEIGHT,
            "embedding_weight": keys.EMBEDDING_WEIGHT,
            "multiscale": tuple(keys.MULTISCALE),
            "concepts": _concept_table(cfg, clip.embed_dim) if keys.CONCEPTS else None,
            "num_concepts": keys.NUM_CONCEPTS,
        }

    @property
    def device(self) -> torch.device:
        """Where inputs are moved to."""
        return self.pixel_mean.device

    @property
    def clip(self) -> ClipModel:
        """The student; in evaluation mode the ensemble of student and teacher."""
        if self.training or self.alpha >= 1:
            return self.student
        if not self._ensemble:
            self._ensemble.append(self.ensemble())
        return self._ensemble[0]

    def train(self, mode: bool = True) -> CLIPSelf:
        """The teacher, and BatchNorms, always stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        for module in self.student.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        self._ensemble.clear()
        return self

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses of a batch.

        Args:
            batched_inputs: see `CLIPSelfMapper`.

        Returns:
            In training ``{"loss_distillation"}``, with an embedding weight also ``"loss_embedding"``, or
            ``{"loss_concepts"}``; else ``{"clip": self.clip}`` for every input, which evaluators of a CLIP
            measure.

        Raises:
            ValueError: images that the stride does not divide, or regions that are not what the loss needs.
        """
        if not self.training:
            return [{"clip": self.clip} for _ in batched_inputs]
        x = self.normalize(torch.stack([sample["image"] for sample in batched_inputs]))
        if self.multiscale:
            side = self.multiscale[int(torch.randint(len(self.multiscale), ()))]
            x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        if x.shape[-1] % self.student.visual.stride:
            raise ValueError(
                f"INPUT.CLIPSELF.IMAGE_SIZE {x.shape[-1]} is no multiple of the stride "
                f"{self.student.visual.stride} of {self.student.name}"
            )
        with torch.no_grad():
            self.student.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        dense = self.student.visual(x, TowerRequest(dense=self.mode)).dense
        boxes = [sample["boxes"].to(self.device) for sample in batched_inputs]
        pooling = "clipself_raw" if self.concepts is None else "clipself"
        regions = pool_boxes(dense, boxes, scale=(dense.shape[3], dense.shape[2]), pooling=pooling)
        needed = "crops" if self.concepts is None else "concepts"
        if needed not in batched_inputs[0]:
            raise ValueError(
                f"the loss needs {needed} of the regions: INPUT.CLIPSELF.REGIONS is concepts if and only if "
                "MODEL.CLIPSELF.CONCEPTS names a table"
            )
        given = torch.cat([sample[needed] for sample in batched_inputs])
        if self.concepts is not None:
            return {"loss_concepts": self.weight * self._concept_loss(regions, given)}
        crops = self.normalize(given)
        with torch.no_grad():
            embeddings = self.teacher.encode_image(crops)
        losses = {"loss_distillation": self.weight * cosine_loss(regions, embeddings)}
        if self.embedding_weight:
            own = self.student.encode_image(crops)
            losses["loss_embedding"] = self.embedding_weight * cosine_loss(own, embeddings)
        return losses

    def normalize(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 -> what the towers take."""
        return (pixels.to(self.device, non_blocking=True).float() - self.pixel_mean) / self.pixel_std

    def _concept_loss(self, regions: Tensor, concepts: Tensor) -> Tensor:
        assert self.concepts is not None
        sampled = sample_concepts(concepts, len(self.concepts), self.num_concepts)
        column = torch.zeros(len(self.concepts), dtype=torch.long)
        column[sampled] = torch.arange(len(sampled))
        scale = self.student.logit_scale.exp()
        embeddings = self.concepts[sampled.to(self.device)]
        return concept_loss(regions, column[concepts].to(self.device), embeddings, scale)

    @torch.no_grad()
    def ensemble(self) -> ClipModel:
        """alpha student + (1 - alpha) teacher, weight by weight (WiSE-FT, Wortsman et al., 2022); the text
        tower is shared."""
        student, teacher, alpha = self.student, self.teacher, min(self.alpha, 1.0)
        scale, bias = deepcopy(student.logit_scale), deepcopy(student.logit_bias)
        model = ClipModel(student.name, deepcopy(student.visual), student.text, scale, bias, student.config)
        own = dict(teacher.named_parameters())
        for name, parameter in model.named_parameters():
            if name in own:
                parameter.requires_grad_(False).copy_(torch.lerp(own[name], parameter, alpha))
        return model.eval()

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The ensemble alone: what `load_clip(file)` takes."""
        model = self.ensemble()
        return model.state_dict(), model.file_metadata()


def unlock(tower: Tower, count: int, want: TowerRequest) -> None:
    """Make the last groups of an image tower trainable, but for what ``want`` does not depend on.

    Args:
        tower: of frozen parameters.
        count: groups: blocks of a transformer; of a ResNet its four stages and the attention pool. -1: all.
        want: what the loss is computed from.

    Raises:
        ValueError: a tower of another family; 0 groups, with which nothing would be trained, or more than
            there are.
    """
    if isinstance(tower, TransformerTower):
        groups = list(tower.blocks)
    elif isinstance(tower, ResNetTower):
        groups = [getattr(tower, name) for name in ("layer1", "layer2", "layer3", "layer4", "attnpool")]
    else:
        raise ValueError(f"CLIPSelf trains transformers and ResNets, not {type(tower).__name__}")
    if count != -1 and not 1 <= count <= len(groups):
        raise ValueError(
            f"MODEL.CLIPSELF.UNLOCKED_GROUPS = {count}: expected 1 to {len(groups)}, or -1 for all "
            f"{len(groups)} groups of {type(tower).__name__}"
        )
    parameters = [p for group in groups[-count if count > 0 else 0 :] for p in group.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    image = torch.zeros(1, 3, tower.stride, tower.stride, device=parameters[0].device)
    with torch.enable_grad():
        out = tower(image, want)
        total = out.dense.sum() + (out.pooled.sum() if want.pooled else 0)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def _concept_table(cfg: CfgNode, dim: int) -> Tensor:
    """Embeddings (K, D) of the classes of the training data, in their order."""
    classes = [c for name in cfg.DATASETS.TRAIN[:1] for c in dataset_classes(name, "thing") or ()]
    if not classes:
        raise ValueError("MODEL.CLIPSELF.CONCEPTS needs training data with classes")
    vocabulary = Vocabulary.from_names(classes, separator=None)
    return TextTable.load(Path(cfg.MODEL.CLIPSELF.CONCEPTS), vocabulary, dim=dim)(vocabulary)
