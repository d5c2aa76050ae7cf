"""`MaskCLIPPlus`: any segmentor, trained on the labels of a frozen MaskCLIP and then on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.backbone.prompting import build_fixed_prompts
from clipdense.clip import ClipModel
from clipdense.clip.prompts import ClassPrompts
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.classes import class_names
from clipdense.data.heads import register_head_classes
from clipdense.inference import DenseMap, Refinements, dense_map, map_cosines
from clipdense.systems.maskclip_plus.distillation import DistillableSegmentor, feature_distance
from clipdense.systems.maskclip_plus.labels import UNLABELLED, fill_labels, pseudo_labels, suppress_labels

from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage

__all__ = ["LabelRules", "MaskCLIPPlus", "Setting"]

Setting = Literal["annotation_free", "zero_shot"]


@dataclass(frozen=True)
class LabelRules:
    """Which pixels are labelled by a model, and by which one.

    Attributes:
        setting: "annotation_free": all pixels; "zero_shot": those of unseen classes.
        unseen: labels of the unseen classes; read in the setting zero_shot only.
        keep_ignored: annotation_free: pixels that a label map ignores stay ignored.
        self_training_from: first iteration, counted from 1, with the model's own predictions; 0: never.
        min_score: see `pseudo_labels`.
        ignore_value: label of pixels that have no loss.
    """

    setting: Setting = "annotation_free"
    unseen: tuple[int, ...] = ()
    keep_ignored: bool = False
    self_training_from: int = 0
    min_score: float = 0.0
    ignore_value: int = 255

    def __post_init__(self) -> None:
        if self.setting not in ("annotation_free", "zero_shot"):
            raise ValueError(
                f"MODEL.MASKCLIP_PLUS.SETTING must be annotation_free or zero_shot, not {self.setting!r}"
            )
        if self.setting == "zero_shot" and not self.unseen:
            raise ValueError(
                "MODEL.MASKCLIP_PLUS.SETTING is zero_shot, but no class is unseen: list them in "
                "MODEL.MASKCLIP_PLUS.UNSEEN"
            )

    def self_training(self, iteration: int) -> bool:
        """Return whether the labels of an iteration, counted from 1, are the model's own predictions."""
        return 0 < self.self_training_from <= iteration

    def given_labels(self, sample: dict[str, Any]) -> Tensor:
        """Return the labels (H, W) of a sample that may be used; the other pixels are `UNLABELLED`."""
        labels: Tensor | None = sample.get("sem_seg")
        if self.setting == "zero_shot":
            if labels is None:
                raise KeyError(
                    f"{sample.get('file_name', 'an image')} has no 'sem_seg': the setting zero_shot trains "
                    "on label maps; annotation_free needs none"
                )
            return suppress_labels(labels, self.unseen)
        free = torch.full(sample["image"].shape[-2:], UNLABELLED, dtype=torch.int64)
        if self.keep_ignored and labels is not None:
            free[labels == self.ignore_value] = self.ignore_value
        return free


@META_ARCH_REGISTRY.register()
class MaskCLIPPlus(nn.Module):
    """A segmentor trained without labels of some classes, or of all.

    In training, a frozen MaskCLIP labels the augmented image; from some iteration on, the segmentor's own
    predictions take its place (self-training), so that the segmentor may become better than its teacher.
    Outputs in evaluation are the segmentor's, and so is the exported file.

    Source: Zhou et al., Extract Free Dense Labels from CLIP, ECCV 2022, section 3.4.
    """

    @configurable
    def __init__(
        self,
        *,
        segmentor: nn.Module,
        clip: ClipModel,
        classes: Sequence[str],
        rules: LabelRules | None = None,
        templates: str = "maskclip_85",
        prompts: ClassPrompts | None = None,
        mode: str = "value",
        refinements: Refinements | None = None,
        distillation: float = 0.0,
        input_format: str = "RGB",
    ) -> None:
        """
        Args:
            segmentor: takes Detectron2's inputs with ``sem_seg``; returns losses in training, and
                ``sem_seg`` in evaluation.
            clip: the teacher; it is frozen.
            classes: K class names, in the order of the labels.
            rules: of the labels.
            templates: prompt templates, see `TextBank`.
            prompts: trained contexts of class names, instead of templates; see `build_fixed_prompts`.
            mode: last-block mode of the teacher's dense map.
            refinements: of the teacher's cosines.
            distillation: weight of "loss_distillation", see `feature_distance`; 0: none.
            input_format: order of the channels of images, "RGB" or "BGR".

        Raises:
            ValueError: If the CLIP has no text tower or not the mode, an unseen class is not a label, or the
                segmentor has no features to distil.
        """
        super().__init__()
        if mode not in clip.visual.dense_modes:
            why = clip.visual.why_no_dense or f"its modes are {', '.join(clip.visual.dense_modes)}"
            raise ValueError(f"MODEL.MASKCLIP_PLUS.MODE {mode!r} does not fit '{clip.name}': {why}")
        self.segmentor, self.clip = segmentor, clip.requires_grad_(False)
        self.rules = rules or LabelRules()
        self.vocabulary = Vocabulary.from_names(classes, separator=None)
        zero_shot = self.rules.setting == "zero_shot"
        self.unlabelled = self.rules.unseen if zero_shot else tuple(range(len(classes)))
        if max(self.unlabelled) >= len(classes):
            raise ValueError(f"unseen label {max(self.unlabelled)}, but there are {len(classes)} classes")
        self.mode, self.refinements, self.input_format = mode, refinements, input_format
        self.distillation = distillation
        if distillation and not hasattr(getattr(segmentor, "sem_seg_head", None), "embed"):
            raise ValueError(
                "MODEL.MASKCLIP_PLUS.DISTILLATION needs features in CLIP's space: set "
                "MODEL.SEM_SEG_HEAD.NAME DeepLabV2TextHead or DeepLabV3PlusTextHead"
            )
        self.bank = TextBank(clip, templates, prompts=prompts)
        self.train()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.MASKCLIP_PLUS`` and ``MODEL.CLIP``.

        Raises:
            ValueError: If an unseen class is none of the datasets'; see also `class_names`.
        """
        keys, names = cfg.MODEL.MASKCLIP_PLUS, class_names(cfg, "stuff_classes")
        clip = clip_from_config(cfg)
        return {
            "segmentor": META_ARCH_REGISTRY.get(keys.SEGMENTOR)(cfg),
            "clip": clip,
            "classes": names,
            "rules": LabelRules(
                setting=keys.SETTING,
                unseen=_unseen(cfg, names) if keys.SETTING == "zero_shot" else (),
                keep_ignored=keys.KEEP_IGNORED,
                self_training_from=keys.SELF_TRAINING_FROM,
                min_score=keys.MIN_SCORE,
                ignore_value=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            ),
            "templates": keys.TEMPLATES,
            "prompts": build_fixed_prompts(cfg, clip),
            "mode": keys.MODE,
            "refinements": Refinements(keys.PROMPT_DENOISING, keys.KEY_SMOOTHING, keys.KEY_NORM == "tokens"),
            "distillation": keys.DISTILLATION,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.clip.logit_scale.device

    @property
    def backbone(self) -> Any:
        """The segmentor's backbone."""
        return self.segmentor.backbone

    def train(self, mode: bool = True) -> MaskCLIPPlus:
        """Set the mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Return the segmentor's losses on the completed labels in training, its outputs in evaluation.

        Args:
            batched_inputs: Detectron2's inputs, with ``sem_seg`` (H, W) in training if there are label maps.
        """
        if not self.training:
            return self.segmentor(batched_inputs)
        iteration = get_event_storage().iter + 1
        if self.rules.self_training(iteration):
            return self.segmentor(self.label(batched_inputs, self.own_scores(batched_inputs)))
        maps = self.teacher_maps(batched_inputs)
        labelled = self.label(batched_inputs, self.teacher_scores(maps))
        return self.distil(labelled, maps) if self.distillation else self.segmentor(labelled)

    def label(
        self, batched_inputs: Sequence[dict[str, Any]], scores: Sequence[Tensor]
    ) -> list[dict[str, Any]]:
        """Return the inputs with completed labels.

        Args:
            batched_inputs: see `forward`.
            scores: (C, H, W) of each image, for the classes `unlabelled`.
        """
        given = [self.rules.given_labels(sample).to(self.device) for sample in batched_inputs]
        return [
            sample
            | {
                "sem_seg": fill_labels(
                    labels, pseudo_labels(s, self.unlabelled, self.rules.min_score), self.rules.ignore_value
                )
            }
            for sample, labels, s in zip(batched_inputs, given, scores, strict=True)
        ]

    def distil(self, labelled: Sequence[dict[str, Any]], maps: Sequence[DenseMap]) -> dict[str, Tensor]:
        """Compute the losses of the labels and "loss_distillation", with one forward of the segmentor."""
        segmentor = cast(DistillableSegmentor, self.segmentor)
        images, targets = segmentor.training_batch(labelled)
        head = segmentor.sem_seg_head
        embedded = head.embed(segmentor.backbone(images))
        losses = head.losses(head.classify(embedded), targets)
        distance = feature_distance(embedded, maps, (images.shape[2], images.shape[3]))
        return losses | {"loss_distillation": self.distillation * distance}

    def teacher_maps(self, batched_inputs: Sequence[dict[str, Any]]) -> list[DenseMap]:
        """Compute CLIP's map of the images: of all if they have one size, else of one after the other."""
        images = [sample["image"].to(self.device) for sample in batched_inputs]
        images = [image if self.input_format == "RGB" else image.flip(0) for image in images]
        sizes = {image.shape for image in images}
        batches = [torch.stack(images)] if len(sizes) == 1 else [image[None] for image in images]
        return [
            dense_map(self.clip, self.clip.normalize(b), mode=self.mode, refinements=self.refinements)
            for b in batches
        ]

    @torch.no_grad()
    def teacher_scores(self, maps: Sequence[DenseMap]) -> list[Tensor]:
        """Score the pixels of each image by MaskCLIP: (C, H, W), for the classes `unlabelled`."""
        text = self.bank(self.vocabulary)[list(self.unlabelled)]
        return [s for found in maps for s in map_cosines(found, text, found.size, self.refinements)]

    @torch.no_grad()
    def own_scores(self, batched_inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
        """Score the pixels of each image by the segmentor in evaluation mode, as `teacher_scores` does.

        Raises:
            ValueError: If the segmentor returns labels only.
        """
        inputs = [
            {"image": sample["image"], "height": sample["image"].shape[1], "width": sample["image"].shape[2]}
            for sample in batched_inputs
        ]
        training = self.segmentor.training
        self.segmentor.eval()
        try:
            outputs = self.segmentor(inputs)
        finally:
            self.segmentor.train(training)
        if "sem_seg" not in outputs[0]:
            raise ValueError(
                f"{type(self.segmentor).__name__} returns labels without scores, which self-training "
                "compares: set TEST.MAX_DENSE_CLASSES and TEST.MAX_DENSE_MEGABYTES to 0"
            )
        return [output["sem_seg"][list(self.unlabelled)] for output in outputs]

    def export_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the segmentor alone, under its own names; load it as ``MODEL.MASKCLIP_PLUS.SEGMENTOR``."""
        return self.segmentor.state_dict(), {"layout": "clipdense"}


def _unseen(cfg: CfgNode, names: Sequence[str]) -> tuple[int, ...]:
    """Return the labels of the unseen classes."""
    chosen = list(cfg.MODEL.MASKCLIP_PLUS.UNSEEN)
    if not chosen and cfg.DATASETS.TRAIN:
        chosen = list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("novel_classes") or ())
    vocabulary = Vocabulary.from_names(names, separator=None)
    try:
        return tuple(sorted(vocabulary.index(name) for name in chosen))
    except ValueError as error:
        raise ValueError(f"MODEL.MASKCLIP_PLUS.UNSEEN: {error}") from None


register_head_classes("MaskCLIPPlus", base_key="MODEL.MASKCLIP_PLUS.SEGMENTOR")
