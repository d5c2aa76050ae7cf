"""MaskFormer and Mask2Former: segmentation by classification of masks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clipdense.data.heads import HeadClasses, register_head_classes
from clipdense.inference import MergeSettings, merge_queries
from clipdense.maskformer.criterion import SetCriterion
from clipdense.maskformer.head import MaskFormerHead
from clipdense.maskformer.prediction import MaskPrediction, MaskProposals, Targets
from clipdense.maskformer.targets import TARGETS, pad_targets
from clipdense.regions import LazyMaps

from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList

__all__ = ["MaskFormer"]

register_head_classes("MaskFormer", HeadClasses("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "stuff"))


@META_ARCH_REGISTRY.register()
class MaskFormer(nn.Module):
    """Prediction of a set of masks, each with a class (MaskFormer, Cheng et al., NeurIPS 2021; Mask2Former,
    Cheng et al., CVPR 2022). The configuration selects the variant.

    A head predicts N mask logits and class scores from the backbone's maps. In training each ground-truth
    mask is matched to one of them; in evaluation they are merged to semantic, panoptic and instance
    segmentation.

    A subclass with other class scores overrides `classify`, and `losses` if it trains them.

    Attributes:
        merging: Outputs and the rules that make them.
        things: Classes (contiguous) of countable things.
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
        merging: MergeSettings | None = None,
    ) -> None:
        """
        Args:
            backbone: From images to feature maps.
            head: From the backbone's maps to a `MaskPrediction`.
            criterion: The losses.
            pixel_mean: Mean of each channel, for pixels in 0 .. 255.
            pixel_std: Standard deviation of each channel.
            input_format: Order of the channels, "RGB" or "BGR".
            size_divisibility: Images are padded to multiples of it.
            targets: "semantic" or "panoptic", the annotation that training uses.
            ignore_label: Void in semantic maps.
            things: See the class.
            merging: See the class; default: semantic segmentation.

        Raises:
            ValueError: If `targets` is unknown.
        """
        super().__init__()
        if targets not in TARGETS:
            raise ValueError(
                f"MODEL.MASK_FORMER.TARGETS must be one of {', '.join(TARGETS)}, not {targets!r}"
            )
        self.backbone = backbone
        self.head = head
        self.criterion = criterion
        self.input_format = input_format
        self.size_divisibility = size_divisibility
        self.make_targets: Callable[..., Targets] = TARGETS[targets]
        self.ignore_label = ignore_label
        self.things = frozenset(things)
        self.merging = merging or MergeSettings()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.*``; things are those of the first dataset."""
        backbone: Backbone = build_backbone(cfg)
        keys, test = cfg.MODEL.MASK_FORMER, cfg.MODEL.MASK_FORMER.TEST
        datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        metadata = MetadataCatalog.get(datasets[0]) if datasets else None
        things = {} if metadata is None else metadata.get("thing_dataset_id_to_contiguous_id", {})
        resize_masks_first = test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE
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
            "merging": MergeSettings(
                semantic_on=test.SEMANTIC_ON,
                panoptic_on=test.PANOPTIC_ON,
                instance_on=test.INSTANCE_ON,
                things_only=test.PANOPTIC_ON,
                proposals_on=test.PROPOSALS_ON,
                object_mask_threshold=test.OBJECT_MASK_THRESHOLD,
                overlap_threshold=test.OVERLAP_THRESHOLD,
                pixel_threshold=test.PIXEL_THRESHOLD,
                topk=cfg.TEST.DETECTIONS_PER_IMAGE,
                resize_masks_first=resize_masks_first or test.PANOPTIC_ON or test.INSTANCE_ON,
                max_dense_classes=cfg.TEST.MAX_DENSE_CLASSES,
                max_dense_bytes=cfg.TEST.MAX_DENSE_MEGABYTES * 2**20,
            ),
        }

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Compute the losses in training, and the enabled outputs otherwise.

        Args:
            batched_inputs: Each with ``image`` (3, h, w) in 0 .. 255. In training also ``sem_seg`` (h, w), or
                ``pan_seg`` (h, w) and ``segments_info``. Otherwise optional ``height`` and ``width`` of the
                output in pixels, by default the image's.

        Returns:
            A dict of losses, or for each image the outputs of `merge_queries`.
        """
        if self.training:
            return self.losses(batched_inputs)
        proposals = self.propose(batched_inputs)
        scores = self.classify(proposals, batched_inputs)
        return [self.merge(scores[b], proposals.masks(b), sample) for b, sample in enumerate(batched_inputs)]

    def select_outputs(self, kinds: Collection[str]) -> None:
        """Compute only these outputs, keys of `output_keys`; they equal those beside other outputs."""
        self.merging = replace(
            self.merging,
            panoptic_on="panoptic" in kinds,
            instance_on="instances" in kinds,
            semantic_on="semantic" in kinds,
            proposals_on=False,
        )

    def losses(self, batched_inputs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Match predictions to ground-truth masks and compute the losses."""
        images = self.preprocess_image(batched_inputs)
        return self.criterion(self.predict(images), self.padded_targets(batched_inputs, images))

    def propose(self, batched_inputs: Sequence[dict[str, Any]]) -> MaskProposals:
        """Predict the masks of a batch, at the stride of the mask features."""
        images = self.preprocess_image(batched_inputs)
        prediction = self.predict(images)
        return MaskProposals(
            mask_logits=prediction.mask_logits.float(),
            class_logits=prediction.class_logits,
            query_embeddings=prediction.query_embeddings,
            padded_size=(images.tensor.shape[-2], images.tensor.shape[-1]),
            image_sizes=[(h, w) for h, w in images.image_sizes],
        )

    def classify(
        self, proposals: MaskProposals, batched_inputs: Sequence[dict[str, Any]]
    ) -> Sequence[Tensor]:
        """Compute the class scores (Q, K + 1) of each image's masks, background last."""
        return proposals.require_class_logits().float().softmax(-1).unbind()

    def merge(self, scores: Tensor, masks: LazyMaps, sample: dict[str, Any]) -> dict[str, Any]:
        """Merge the classified masks of one image to the enabled outputs. See `merge_queries`."""
        image_size = masks.shape[1:]
        return merge_queries(
            scores,
            masks,
            self.merging,
            image_size=image_size,
            output_size=(sample.get("height", image_size[0]), sample.get("width", image_size[1])),
            things=self.things,
        )

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalise images and pad them with zeros, right and below, to one size."""
        images = [
            (sample["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
            for sample in batched_inputs
        ]
        return ImageList.from_tensors(images, self.size_divisibility)

    def predict(self, images: ImageList) -> MaskPrediction:
        """Run the backbone and the head."""
        prediction: MaskPrediction = self.head(self.backbone(images.tensor))
        return prediction

    def padded_targets(self, batched_inputs: Sequence[dict[str, Any]], images: ImageList) -> list[Targets]:
        """Make the ground-truth masks of a batch, at the size of the padded images.

        Raises:
            ValueError: If a label is not a class of the criterion.
        """
        targets = [self._targets(sample) for sample in batched_inputs]
        return pad_targets(targets, (images.tensor.shape[-2], images.tensor.shape[-1]))

    def _targets(self, sample: dict[str, Any]) -> Targets:
        labels, masks = self.make_targets(sample, self.ignore_label)
        if len(labels) and int(labels.max()) >= self.criterion.num_classes:
            raise ValueError(
                f"{sample.get('file_name', 'an image')} has class {int(labels.max())}, but there are "
                f"{self.criterion.num_classes} (MODEL.SEM_SEG_HEAD.NUM_CLASSES) and void is "
                f"{self.ignore_label} (MODEL.SEM_SEG_HEAD.IGNORE_VALUE)"
            )
        return Targets(labels.to(self.device, non_blocking=True), masks.to(self.device, non_blocking=True))
