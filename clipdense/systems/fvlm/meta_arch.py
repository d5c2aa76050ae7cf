"""F-VLM and F-ViT: a detector of any words on a frozen CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.backbone import JOINT, FrozenCLIPTrunk
from clipdense.clip.text import TextBank, TextEmbedder
from clipdense.clip.vocabulary import Vocabulary
from clipdense.open_vocabulary.trained_on import TrainedOn
from clipdense.systems.fvlm.roi_heads import CLIP_EMBEDDING, FVLMROIHeads
from clipdense.systems.fvlm.words import BACKGROUND, build_text, known_rows, training_vocabulary

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_proposal_generator
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.structures import ImageList, Instances

__all__ = ["FVLM"]

_TEXT_KEY = "roi_heads.box_predictor.cls_score.text"


@META_ARCH_REGISTRY.register()
class FVLM(TrainedOn, GeneralizedRCNN):
    """A detector whose classes are any words (Kuo et al., F-VLM, ICLR 2023; F-ViT: Wu et al., CLIPSelf, ICLR
    2024).

    The trunk is a frozen CLIP; pyramid, RPN and heads are trained on the base classes. In evaluation the
    detector's scores of each proposal, p, are fused with CLIP's own, q, which it gives to the region of its
    frozen map: base classes trust p more, novel classes q.

    Attributes:
        vocabulary: the classes of evaluation.
    """

    @configurable
    def __init__(
        self,
        *,
        text: TextEmbedder | None = None,
        vocabulary: Vocabulary | None = None,
        square_size: int = 0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            text: embeds words; None: only those of training can be looked for.
            vocabulary: of the training data, whose classes the labels count.
            square_size: side of the squares that images are padded to at least, in pixels; 0: none.
            kwargs: of `GeneralizedRCNN`; the backbone holds a `FrozenCLIPTrunk`, the heads are
                `FVLMROIHeads`.

        Raises:
            ValueError: another backbone.
        """
        super().__init__(**kwargs)
        find_trunk(self.backbone)
        self._text = text
        self._labels = vocabulary
        self.square_size = square_size
        self.set_trained_on(vocabulary)
        self.vocabulary = vocabulary

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone: Backbone = build_backbone(cfg)
        text, vocabulary = build_text(cfg), training_vocabulary(cfg)
        background, base = None, None
        if text is None or vocabulary is None:
            classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES if vocabulary is None else len(vocabulary)
            rows = torch.zeros(classes, find_trunk(backbone).tower.embed_dim)
        else:
            rows = _embed(text, vocabulary)
        if cfg.MODEL.FVLM.BACKGROUND == "text":
            background = rows.new_zeros(1, rows.shape[1]) if text is None else _embed(text, BACKGROUND)
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
            "roi_heads": FVLMROIHeads(cfg, shapes, text=rows, background=background, base=base),
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "text": text,
            "vocabulary": vocabulary,
            "square_size": cfg.MODEL.FVLM.SQUARE_SIZE,
        }

    @property
    def trunk(self) -> FrozenCLIPTrunk:
        """The frozen CLIP in the backbone."""
        return find_trunk(self.backbone)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Look for other classes in evaluation. Only their embeddings are made, and those are kept.

        Base is what shares a name with a base class of training. Nothing else is built anew, and training
        keeps its own classes.

        Raises:
            ValueError: names that cannot be embedded; the vocabulary stays as it was.
        """
        heads: FVLMROIHeads = self.roi_heads
        if self._text is None:
            text = known_rows(vocabulary, self.trained_on, heads.box_predictor.cls_score.text)
        else:
            if isinstance(self._text, TextBank):
                self._text.clip.to(self.device)
            text = self._text(vocabulary).to(self.device)
        vocabulary = self.seen_in_training(vocabulary)
        base = None if vocabulary.base is None else torch.tensor(vocabulary.base, device=self.device)
        heads.set_classes(text, base)
        self.vocabulary = vocabulary

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """As `GeneralizedRCNN`: losses in training, ``instances`` of the vocabulary's classes otherwise.

        Labels count the classes of the training data; those of its novel classes are left out.
        """
        if self.training:
            if self.trained_on is not self._labels:  # the weights now learn other classes than they knew
                self.set_trained_on(self._labels)
            if self._labels is not None and self._labels.base is not None:
                batched_inputs = [self._base_only(sample) for sample in batched_inputs]
        return super().forward(batched_inputs)

    def inference(
        self,
        batched_inputs: Sequence[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> Any:
        """As `GeneralizedRCNN.inference`."""
        if detected_instances is not None:
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, features, None)
        boxes = [p.proposal_boxes.tensor for p in proposals]
        embeddings = self.trunk.embed_boxes(features[JOINT], boxes)
        for proposal, embedding in zip(proposals, embeddings.split([len(b) for b in boxes]), strict=True):
            proposal.set(CLIP_EMBEDDING, embedding)
        results, _ = self.roi_heads(images, features, proposals, None)
        if not do_postprocess:
            return results
        return GeneralizedRCNN._postprocess(results, batched_inputs, images.image_sizes)

    def preprocess_image(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalised images, padded with zeros to one size, right and below."""
        images = super().preprocess_image(batched_inputs)
        if not self.square_size:
            return images
        height, width = images.tensor.shape[-2:]
        side = max(self.square_size, height, width)
        return ImageList(F.pad(images.tensor, (0, side - width, 0, side - height)), images.image_sizes)

    def before_load(self, state: dict[str, Tensor]) -> None:
        """Called with a checkpoint's tensors, which it may change, before they are loaded.

        What was trained on which classes is as the checkpoint says. No weight depends on the classes, so a
        detector can be trained further on others, or none of its own: where words can be embedded, their
        embeddings are this model's.
        """
        self.restore_trained_on(state, self._labels)
        if self._text is not None:
            state[_TEXT_KEY] = self.roi_heads.box_predictor.cls_score.text

    def _base_only(self, sample: dict[str, Any]) -> dict[str, Any]:
        assert self._labels is not None and self._labels.base is not None
        instances = sample["instances"]
        known = torch.tensor(self._labels.base, device=instances.gt_classes.device)
        return sample | {"instances": instances[known[instances.gt_classes]]}


def find_trunk(backbone: Backbone) -> FrozenCLIPTrunk:
    """The frozen CLIP in a backbone. Raises ValueError where there is none."""
    found = next((m for m in backbone.modules() if isinstance(m, FrozenCLIPTrunk)), None)
    if found is None:
        raise ValueError(
            f"FVLM needs a frozen CLIP below its {type(backbone).__name__}: set MODEL.TRUNK.NAME "
            "FrozenCLIPTrunk or InterpolatedTrunk"
        )
    return found


def _embed(text: TextEmbedder, vocabulary: Vocabulary) -> Tensor:
    """Embeddings (K, D); only their shape where the model is built on the meta device."""
    if text.device.type == "meta":
        return torch.empty(len(vocabulary), text.dim)
    return text(vocabulary).cpu()
