"""F-VLM and F-ViT: open-vocabulary detection on a frozen CLIP backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.backbone import JOINT, FrozenCLIPTrunk, find_frozen_clip
from clipdense.clip.text import TextBank, TextEmbedder
from clipdense.clip.vocabulary import Vocabulary
from clipdense.open_vocabulary import OpenVocabularyModel, TextEmbeddings
from clipdense.open_vocabulary.build import label_vocabulary
from clipdense.systems.fvlm.roi_heads import FVLMROIHeads
from clipdense.systems.fvlm.text import BACKGROUND, build_text_embedder, embed_on_cpu, select_rows

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_proposal_generator
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.structures import ImageList, Instances

__all__ = ["FVLM"]

_TEXT_KEY = "roi_heads.box_predictor.cls_score.text"


@META_ARCH_REGISTRY.register()
class FVLM(OpenVocabularyModel, GeneralizedRCNN):
    """Open-vocabulary detector on a frozen CLIP (F-VLM, Kuo et al., ICLR 2023; F-ViT, Wu et al., CLIPSelf,
    ICLR 2024).

    The backbone is a frozen CLIP; pyramid, RPN and heads are trained on the base classes. In evaluation, the
    detector's class scores p of each proposal are fused with CLIP's own scores q, which come from pooling the
    region on CLIP's frozen feature map. The fusion weights p more for base classes, and q for novel ones.
    """

    roi_heads: FVLMROIHeads

    @configurable
    def __init__(
        self,
        *,
        text_embedder: TextEmbedder | None = None,
        vocabulary: Vocabulary | None = None,
        square_size: int = 0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            text_embedder: embeds class names; None: only classes whose embeddings are in the weights can be
                named.
            vocabulary: classes of the training data, which the labels count.
            square_size: side in pixels of the squares that images are padded to; 0: no such padding.
            kwargs: arguments of `GeneralizedRCNN`; the backbone contains a `FrozenCLIPTrunk`, and
                ``roi_heads`` are `FVLMROIHeads`.

        Raises:
            ValueError: If the backbone has no `FrozenCLIPTrunk`.
        """
        super().__init__(**kwargs)
        find_frozen_clip(self.backbone)
        self.text_embedder = text_embedder
        self.square_size = square_size
        self.init_vocabulary(vocabulary)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone: Backbone = build_backbone(cfg)
        embedder, vocabulary = build_text_embedder(cfg), label_vocabulary(cfg)
        background, base = None, None
        if embedder is None or vocabulary is None:
            num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES if vocabulary is None else len(vocabulary)
            text = torch.zeros(num_classes, find_frozen_clip(backbone).tower.embed_dim)
        else:
            text = embed_on_cpu(embedder, vocabulary)
        if cfg.MODEL.FVLM.BACKGROUND == "text":
            background = text.new_zeros(1, text.shape[1])
            if embedder is not None:
                background = embed_on_cpu(embedder, BACKGROUND)
        elif cfg.MODEL.FVLM.BACKGROUND != "learned":
            raise ValueError(
                f"MODEL.FVLM.BACKGROUND must be text or learned, not {cfg.MODEL.FVLM.BACKGROUND!r}"
            )
        if vocabulary is not None and vocabulary.base is not None:
            base = torch.tensor(vocabulary.base)
        shapes = backbone.output_shape()
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": FVLMROIHeads(cfg, shapes, text=text, background=background, base=base),
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "text_embedder": embedder,
            "vocabulary": vocabulary,
            "square_size": cfg.MODEL.FVLM.SQUARE_SIZE,
        }

    @property
    def trunk(self) -> FrozenCLIPTrunk:
        """Frozen CLIP in the backbone."""
        return find_frozen_clip(self.backbone)

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        """Embed classes as ``classes`` (K, D), unit length; see `OpenVocabularyModel`."""
        if self.text_embedder is None:
            stored = self.roi_heads.box_predictor.cls_score.text
            return {"classes": select_rows(vocabulary, self.training_vocabulary, stored)}
        if isinstance(self.text_embedder, TextBank):
            self.text_embedder.clip.to(self.device)
        return {"classes": self.text_embedder(vocabulary)}

    def evaluation_classes(self) -> tuple[Tensor, Tensor | None]:
        """Return the text embeddings t and the base flags of the evaluation vocabulary.

        Returns:
            text: (K, D), unit length. Without a vocabulary, these are the embeddings in the weights.
            base: (K,) bool; None if base and novel are not known, so that all classes are fused as novel
                (F-VLM's code without a base indicator).
        """
        if self.vocabulary is None:
            predictor = self.roi_heads.box_predictor
            return predictor.cls_score.text, predictor.class_weight[:-1] > 0
        return self.text_embeddings()["classes"], self.base_flags()

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Return the losses in training, otherwise ``instances`` of the vocabulary's classes for each image.

        Args:
            batched_inputs: as for `GeneralizedRCNN`. Labels count the classes of the training data; objects
                of novel classes are removed from them.
        """
        labels = self.label_vocabulary
        if self.training and labels is not None and labels.base is not None:
            base = torch.tensor(labels.base)
            batched_inputs = [keep_base_objects(sample, base) for sample in batched_inputs]
        return super().forward(batched_inputs)

    def inference(
        self,
        batched_inputs: Sequence[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> Any:
        """Detect objects of the vocabulary (F-VLM, section 3.3); arguments as `GeneralizedRCNN.inference`.

        R proposals of all images, K classes, C and D the dimensions of a region feature and of the joint
        space.
        """
        if detected_instances is not None:
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        heads, predictor = self.roi_heads, self.roi_heads.box_predictor
        text, base = self.evaluation_classes()  # (K, D), (K,)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, features, None)
        boxes = [found.proposal_boxes for found in proposals]

        # p: the detector's scores
        regions = heads.pool_regions(features, boxes)  # (R, C)
        logits, deltas = predictor(regions, text)  # (R, K + 1), (R, 4)
        p = logits.float().softmax(1)

        # q: CLIP's scores of the same regions
        embeddings = self.trunk.embed_regions(features[JOINT], boxes=[b.tensor for b in boxes])  # (R, D)
        q = predictor.clip_probabilities(embeddings, text)  # (R, K + 1)

        scores = predictor.fuse(p, q, base).split([len(b) for b in boxes])
        decoded = predictor.predict_boxes((logits, deltas), proposals)
        results = [
            predictor.detect(*found) for found in zip(decoded, scores, images.image_sizes, strict=True)
        ]
        results = heads.forward_with_given_boxes(features, results)  # masks, if there is a mask head
        if not do_postprocess:
            return results
        return GeneralizedRCNN._postprocess(results, batched_inputs, images.image_sizes)

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalise images and pad them with zeros to one size, at the right and the bottom."""
        images = super().preprocess_image(batched_inputs)
        if not self.square_size:
            return images
        height, width = images.tensor.shape[-2:]
        side = max(self.square_size, height, width)
        return ImageList(F.pad(images.tensor, (0, side - width, 0, side - height)), images.image_sizes)

    def prepare_state(self, state: dict[str, Tensor]) -> None:
        """Keep this model's own text embeddings when weights are loaded; see `LoadHook`.

        No trained tensor depends on the classes, so a detector can be trained further on other classes.
        Without a text embedder, the embeddings of the file are loaded.
        """
        super().prepare_state(state)
        if self.text_embedder is not None:
            state[_TEXT_KEY] = self.roi_heads.box_predictor.cls_score.text


def keep_base_objects(sample: dict[str, Any], base: Tensor) -> dict[str, Any]:
    """Return a training sample without the objects of novel classes; ``base`` (K,) bool."""
    instances = sample["instances"]
    return sample | {"instances": instances[base.to(instances.gt_classes.device)[instances.gt_classes]]}
