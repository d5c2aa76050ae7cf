"""MaskFormer and Mask2Former: segmentation as classification of masks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.data.heads import HeadClasses, register_head_classes
from clipdense.inference.merging import instance_inference, panoptic_inference, semantic_inference
from clipdense.maskformer.criterion import SetCriterion
from clipdense.maskformer.head import MaskFormerHead
from clipdense.maskformer.prediction import Targets
from clipdense.maskformer.targets import TARGETS, pad_targets

from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList

__all__ = ["MaskFormer"]

register_head_classes("MaskFormer", HeadClasses("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "stuff"))


@META_ARCH_REGISTRY.register()
class MaskFormer(nn.Module):
    """A set of masks, each with a class (Cheng et al., MaskFormer, NeurIPS 2021; Mask2Former, CVPR 2022).

    Which of the two it is, is said by its parts and settings.
    """

    output_keys: ClassVar[dict[str, str]] = {
        "panoptic": "MODEL.MASK_FORMER.TEST.PANOPTIC_ON",
        "instances": "MODEL.MASK_FORMER.TEST.INSTANCE_ON",
        "semantic": "MODEL.MASK_FORMER.TEST.SEMANTIC_ON",
    }
    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        criterion: SetCriterion,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        size_divisibility: int = 32,
        targets: str = "semantic",
        ignore_label: int = 255,
        things: Collection[int] = (),
        semantic_on: bool = True,
        panoptic_on: bool = False,
        instance_on: bool = False,
        proposals_on: bool = False,
        object_mask_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        pixel_threshold: float = 0.0,
        topk: int = 100,
        resize_masks_first: bool = False,
    ) -> None:
        """
        Args:
            head: from the backbone's maps to a `MaskPrediction`.
            pixel_mean, pixel_std: per channel, of pixels in 0..255.
            input_format: order of the channels, "RGB" or "BGR".
            size_divisibility: images are padded to multiples of it.
            targets: "semantic" or "panoptic", what is learned from.
            ignore_label: void in semantic maps.
            things: the classes (contiguous) of countable things.
            semantic_on, panoptic_on, instance_on, proposals_on: the outputs.
            object_mask_threshold, overlap_threshold, pixel_threshold: see `panoptic_inference`.
            topk: instances of an image.
            resize_masks_first: resize mask logits to the output's size, rather than semantic scores; always
                so with panoptic or instance segmentation.

        Raises:
            ValueError: unknown ``targets``.
        """
        super().__init__()
        if targets not in TARGETS:
            raise ValueError(f"MODEL.MASK_FORMER.TARGETS is {targets!r}, none of {', '.join(TARGETS)}")
        self.backbone = backbone
        self.head = head
        self.criterion = criterion
        self.input_format = input_format
        self.size_divisibility = size_divisibility
        self.make_targets: Callable[..., Targets] = TARGETS[targets]
        self.ignore_label = ignore_label
        self.things = frozenset(things)
        self.semantic_on, self.panoptic_on, self.instance_on = semantic_on, panoptic_on, instance_on
        self.proposals_on = proposals_on
        self.panoptic_settings = {
            "object_mask_threshold": object_mask_threshold,
            "overlap_threshold": overlap_threshold,
            "pixel_threshold": pixel_threshold,
        }
        self.topk = topk
        self.resize_masks_first = resize_masks_first or panoptic_on or instance_on
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Constructor arguments from ``MODEL.*``; things are those of the first data set."""
        backbone: Backbone = build_backbone(cfg)
        keys, test = cfg.MODEL.MASK_FORMER, cfg.MODEL.MASK_FORMER.TEST
        datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        metadata = MetadataCatalog.get(datasets[0]) if datasets else None
        things = {} if metadata is None else metadata.get("thing_dataset_id_to_contiguous_id", {})
        return {
            "backbone": backbone,
            "head": MaskFormerHead(cfg, backbone.output_shape()),
            "criterion": SetCriterion(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "size_divisibility": keys.SIZE_DIVISIBILITY,
            "targets": keys.TARGETS,
            "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "things": things.values(),
            "semantic_on": test.SEMANTIC_ON,
            "panoptic_on": test.PANOPTIC_ON,
            "instance_on": test.INSTANCE_ON,
            "proposals_on": test.PROPOSALS_ON,
            "object_mask_threshold": test.OBJECT_MASK_THRESHOLD,
            "overlap_threshold": test.OVERLAP_THRESHOLD,
            "pixel_threshold": test.PIXEL_THRESHOLD,
            "topk": cfg.TEST.DETECTIONS_PER_IMAGE,
            "resize_masks_first": test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE,
        }

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: each with ``image`` (3, H, W) of 0..255; in training also ``sem_seg`` (H, W), or
                ``pan_seg`` (H, W) and ``segments_info``; otherwise ``height`` and ``width`` of the output, by
                default the image's.

        Returns:
            In training the losses. Otherwise a list of dicts, with those of these that are on:
            ``sem_seg`` (K, H, W) class scores, ``panoptic_seg`` (ids (H, W) int32, segments), ``instances``,
            ``proposal_masks`` (Q, h, w) probabilities at the input's size.
        """
        images = self.preprocess_image(batched_inputs)
        prediction = self.head(self.backbone(images.tensor))
        if self.training:
            targets = [self._targets(sample) for sample in batched_inputs]
            size = (images.tensor.shape[-2], images.tensor.shape[-1])
            return self.criterion(prediction, pad_targets(targets, size))
        masks = F.interpolate(
            prediction.mask_logits.float(),
            size=images.tensor.shape[-2:],
            mode="bilinear",
            align_corners=False,
        )
        return [
            self.postprocess(logits, mask, image_size, sample)
            for logits, mask, image_size, sample in zip(
                prediction.require_class_logits().float(),
                masks,
                images.image_sizes,
                batched_inputs,
                strict=True,
            )
        ]

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalised images, padded with zeros to one size, right and below."""
        images = [
            (sample["image"].to(self.device) - self.pixel_mean) / self.pixel_std for sample in batched_inputs
        ]
        return ImageList.from_tensors(images, self.size_divisibility)

    def postprocess(
        self, logits: Tensor, masks: Tensor, image_size: tuple[int, int], sample: dict[str, Any]
    ) -> dict[str, Any]:
        """Outputs of one image.

        Args:
            logits: (Q, K + 1).
            masks: mask logits (Q, H, W) of the padded image.
            image_size: height and width without padding.
            sample: says the size of the output.
        """
        height, width = sample.get("height", image_size[0]), sample.get("width", image_size[1])
        output: dict[str, Any] = {}
        if self.proposals_on:
            output["proposal_masks"] = masks[:, : image_size[0], : image_size[1]].sigmoid()
        if self.resize_masks_first:
            masks = sem_seg_postprocess(masks, image_size, height, width)
        if self.semantic_on:
            scores = semantic_inference(logits, masks)
            if not self.resize_masks_first:
                scores = sem_seg_postprocess(scores, image_size, height, width)
            output["sem_seg"] = scores
        if self.panoptic_on:
            output["panoptic_seg"] = panoptic_inference(logits, masks, self.things, **self.panoptic_settings)
        if self.instance_on:
            things = self.things if self.panoptic_on else None
            output["instances"] = instance_inference(logits, masks, topk=self.topk, things=things)
        return output

    def _targets(self, sample: dict[str, Any]) -> Targets:
        labels, masks = self.make_targets(sample, self.ignore_label)
        if len(labels) and int(labels.max()) >= self.criterion.num_classes:
            raise ValueError(
                f"{sample.get('file_name', 'an image')} has class {int(labels.max())}, but there are "
                f"{self.criterion.num_classes} (MODEL.SEM_SEG_HEAD.NUM_CLASSES) and void is "
                f"{self.ignore_label} (MODEL.SEM_SEG_HEAD.IGNORE_VALUE)"
            )
        return Targets(labels.to(self.device), masks.to(self.device))
