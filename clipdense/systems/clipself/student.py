"""The part that CLIPSelf and its RegionCLIP baseline share: a CLIP whose dense map is fine-tuned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip import ClipModel, TowerRequest
from clipdense.clip.finetune import apply_rule, freeze_unused, top_rule
from clipdense.clip.towers import Tower
from clipdense.clip.windows import dense_map
from clipdense.evaluation.probes import CLIPProbe
from clipdense.regions import pool_boxes

from detectron2.config import CfgNode

__all__ = ["MAX_LOGIT_SCALE", "DenseStudent", "unlock"]

MAX_LOGIT_SCALE = math.log(100.0)
"""Upper bound of CLIP's temperature parameter; the lower bound is 0."""


class DenseStudent(nn.Module):
    """A CLIP whose dense map is fine-tuned on regions, and its frozen copy from before the training.

    Trained are the unlocked groups of the image tower, except what the loss does not depend on, such as
    queries and keys of the last block. Everything else is frozen: the text tower, the groups below, the final
    norm and projection, and the statistics of BatchNorm. (If queries, keys and values are one tensor, as in
    OpenAI's ViTs, weight decay still changes all of it, as in the released code.)

    The evaluated and exported weights are an ensemble of student and teacher, see `ensemble`. The model
    predicts nothing in evaluation; evaluators measure its `dense_probe`.

    Attributes:
        student: `ClipModel` that is trained.
        teacher: `ClipModel` without text tower, the student before the training.
    """

    def __init__(
        self,
        clip: ClipModel,
        *,
        request: TowerRequest,
        unlocked_groups: int = -1,
        alpha: float = 1.0,
        weight: float = 1.0,
        multiscale: Sequence[int] = (),
        window: int = 0,
    ) -> None:
        """
        Args:
            clip: the model to train.
            request: tower outputs that the loss is computed from; its ``dense`` is the mode of the dense map.
            unlocked_groups: see `unlock`.
            alpha: weight of the student in the ensemble; 1 or more: the student alone.
            weight: weight of the loss.
            multiscale: sides in pixels; each batch is resized to one of them at random. Empty: no resizing.
            window: side in pixels of the windows of the dense map, see `dense_map`; 0: the whole image.

        Raises:
            ValueError: If the tower's stride does not divide the window or a side of ``multiscale``; see also
                `unlock`.
        """
        super().__init__()
        stride = clip.visual.stride
        if window % stride:
            raise ValueError(f"MODEL.CLIPSELF.WINDOW {window} is not a multiple of the stride {stride}")
        if invalid := [side for side in multiscale if side % stride]:
            raise ValueError(f"MODEL.CLIPSELF.MULTISCALE: {invalid} are not multiples of the stride {stride}")
        self.teacher = ClipModel(
            clip.name,
            deepcopy(clip.visual),
            None,
            deepcopy(clip.logit_scale),
            deepcopy(clip.logit_bias),
            clip.config,
        ).requires_grad_(False)
        self.student = clip.requires_grad_(False)
        unlock(clip.visual, unlocked_groups, request)
        assert request.dense is not None
        self.mode, self.alpha, self.weight = request.dense, alpha, weight
        self.multiscale, self.window = tuple(multiscale), window
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the shared constructor arguments from ``MODEL.CLIP`` and ``MODEL.CLIPSELF``.

        Raises:
            ValueError: If there is a position grid, which the exported file cannot store; see also
                `clip_from_config`.
        """
        if cfg.MODEL.CLIP.POSITION_GRID:
            raise ValueError("MODEL.CLIP.POSITION_GRID: the exported CLIP keeps its own grid; set it to 0")
        keys = cfg.MODEL.CLIPSELF
        return {
            "clip": clip_from_config(cfg),
            "mode": keys.MODE,
            "unlocked_groups": keys.UNLOCKED_GROUPS,
            "alpha": keys.ALPHA,
            "weight": keys.WEIGHT,
            "multiscale": tuple(keys.MULTISCALE),
            "window": keys.WINDOW,
        }

    @property
    def device(self) -> torch.device:
        """Device that inputs are moved to."""
        return self.student.logit_scale.device

    def train(self, mode: bool = True) -> DenseStudent:
        """Set the training mode; the teacher and all BatchNorms stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        for module in self.student.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def pool_regions(self, batched_inputs: Sequence[dict[str, Any]], pooling: str) -> Tensor:
        """Pool the student's dense map over the regions of a batch.

        Args:
            batched_inputs: with ``image`` (3, S, S) uint8 and ``boxes`` (n_i, 4), see `CLIPSelfMapper`.
            pooling: name of the pooling, see `pool_boxes`.

        Returns:
            (sum of n_i, D).

        Raises:
            ValueError: If the tower's stride does not divide the size of the images.
        """
        x = self.student.normalize(
            torch.stack([sample["image"] for sample in batched_inputs])
        )  # (B, 3, S, S)
        if self.multiscale:
            side = self.multiscale[int(torch.randint(len(self.multiscale), ()))]
            x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        if x.shape[-1] % self.student.visual.stride:
            raise ValueError(
                f"INPUT.CLIPSELF.IMAGE_SIZE {x.shape[-1]} is not a multiple of the stride "
                f"{self.student.visual.stride} of {self.student.name}"
            )
        dense = dense_map(self.student.visual, x, self.mode, self.window)  # (B, D, h, w)
        boxes = [sample["boxes"].to(self.device, non_blocking=True) for sample in batched_inputs]
        return pool_boxes(dense, boxes, scale=(dense.shape[3], dense.shape[2]), pooling=pooling)

    @torch.no_grad()
    def ensemble(self) -> ClipModel:
        """Average the weights: alpha * student + (1 - alpha) * teacher (WiSE-FT, Wortsman et al., 2022).

        Returns:
            A new model in evaluation mode; the text tower is shared with the student.
        """
        student, alpha = self.student, min(self.alpha, 1.0)
        scale, bias = deepcopy(student.logit_scale), deepcopy(student.logit_bias)
        scale.clamp_(0, MAX_LOGIT_SCALE)
        model = ClipModel(student.name, deepcopy(student.visual), student.text, scale, bias, student.config)
        initial = dict(self.teacher.named_parameters())
        for name, parameter in model.named_parameters():
            if name in initial:
                parameter.requires_grad_(False).copy_(torch.lerp(initial[name], parameter, alpha))
        return model.eval()

    def dense_probe(self) -> CLIPProbe:
        """Provide the features of the ensemble for evaluators."""
        return CLIPProbe(self.ensemble(), window=self.window)

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the ensemble as tensors and metadata of a file that `load_clip` reads."""
        model = self.ensemble()
        return model.state_dict(), model.file_metadata()


def unlock(tower: Tower, count: int, request: TowerRequest) -> None:
    """Train the last groups of an image tower, except what the requested outputs do not depend on.

    Args:
        tower: image tower; changed in place.
        count: number of groups, from the top, see `top_rule`; -1: all.
        request: outputs that the loss is computed from.

    Raises:
        ValueError: If the number of groups is 0 or larger than there are.
    """
    try:
        rule = top_rule(tower, count)
    except ValueError as error:
        raise ValueError(f"MODEL.CLIPSELF.UNLOCKED_GROUPS {count}: {error}") from error
    apply_rule(tower, rule)
    freeze_unused(tower, request)
