"""FC-CLIP and ODISE: masks, classified by their queries and by CLIP's view of the pixels inside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.backbone import JOINT, find_frozen_clip
from clipdense.backbone.prompting import build_fixed_prompts
from clipdense.clip.model import ClipModel
from clipdense.clip.prompts import ClassPrompts
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.maskformer import (
    MaskFormer,
    MaskFormerHead,
    MaskPrediction,
    MaskProposals,
    OpenVocabularyMaskFormer,
    SetCriterion,
    Targets,
)
from clipdense.maskformer.open_vocabulary import mask_source_from_config
from clipdense.open_vocabulary import Proposals, TextEmbeddings
from clipdense.open_vocabulary.build import label_vocabulary
from clipdense.systems.mask_pooling.build import build_classifier, build_clip, build_query_head
from clipdense.systems.mask_pooling.ensemble import Ensemble, with_objectness
from clipdense.systems.mask_pooling.grounding import GroundingLoss
from clipdense.systems.mask_pooling.pooling import MaskPolicy
from clipdense.systems.mask_pooling.queries import MAX_SCALE, SynonymClassifier, max_logits
from clipdense.systems.mask_pooling.region_heads import (
    RegionEmbeddings,
    RegionHead,
    embed_dense_regions,
    embed_token_regions,
    token_tower,
)

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList

__all__ = ["FCCLIP", "ClassLogits"]


@dataclass(kw_only=True)
class DenseProposals(MaskProposals):
    """`MaskProposals` with the backbone's maps of the same images.

    Attributes:
        features: The maps by name; "joint" among them if the backbone has a CLIP.
    """

    features: dict[str, Tensor]


@dataclass(frozen=True)
class ClassLogits:
    """Logits of both classifiers for the masks of one image.

    Attributes:
        in_vocabulary: (Q, K + 1), void last; None for masks that are not the network's.
        out_of_vocabulary: (Q, K); None if there is no such classifier.
        valid: (Q,) bool, the masks with a cell of CLIP's map.
    """

    in_vocabulary: Tensor | None
    out_of_vocabulary: Tensor | None
    valid: Tensor

    def fuse(self, ensemble: Ensemble, base: Tensor | None) -> Tensor:
        """Fuse both to scores (Q, K + 1), void last; see `Ensemble`."""
        if self.in_vocabulary is not None:
            return ensemble(self.in_vocabulary, self.out_of_vocabulary, self.valid, base)
        assert self.out_of_vocabulary is not None
        # without a query there is no void; a mask without a cell has no class
        return F.pad(self.out_of_vocabulary.softmax(-1) * self.valid[:, None], (0, 1)) + F.pad(
            (~self.valid)[:, None].float(), (self.out_of_vocabulary.shape[1], 0)
        )


@META_ARCH_REGISTRY.register()
class FCCLIP(OpenVocabularyMaskFormer):
    """Open-vocabulary panoptic segmentation with one frozen CLIP (FC-CLIP, Yu et al., NeurIPS 2023), on a
    ResNet, a ConvNeXt or a ViT, distilled with CLIPSelf or not; and ODISE's heads (Xu et al., CVPR 2023) on
    any backbone.

    1. The frozen backbone computes the pyramid for the mask network and CLIP's last map, in one forward.
    2. The network predicts masks m_q and queries x_q. The pixel decoder's map, pooled inside m_q, is added to
       x_q, which gives v_q; in-vocabulary logits are s cos(v_q, t_k), and those of void s cos(v_q, t_void).
    3. CLIP's map, pooled inside m_q, gives u_q; out-of-vocabulary logits are s_CLIP cos(u_q, t_k).
    4. Both are fused (`Ensemble`), and the masks are merged to segmentations (`merge_queries`).

    A class with several names has the logit of the best one.
    """

    @configurable
    def __init__(
        self,
        *,
        clip: ClipModel,
        classifier: SynonymClassifier,
        ensemble: Ensemble,
        region_head: RegionHead = "dense",
        masks: MaskPolicy = "fcclip",
        grounding: GroundingLoss | None = None,
        templates: str = "ovseg_14",
        prompts: ClassPrompts | None = None,
        out_loss_weight: float = 0.0,
        vocabulary: Vocabulary | None = None,
        mask_source: Proposals | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            clip: CLIP whose text encoder embeds class names; frozen. With `region_head` "mask_tokens" its
                image tower embeds masks; otherwise the backbone's does, and this one may be absent.
            classifier: Classifier of the query embeddings that the head predicts.
            ensemble: Fusion of both classifiers.
            region_head: How masks are embedded in CLIP's space for the out-of-vocabulary classifier.
            masks: How a mask becomes a region of CLIP's map.
            grounding: Supervision by captions; None: by class labels.
            templates: Prompt templates of class names.
            prompts: Trained contexts of class names, instead of templates; see `build_fixed_prompts`.
            out_loss_weight: Weight of the cross-entropy of ground-truth masks in the out-of-vocabulary
                classifier; 0: none.
            vocabulary: Classes of the training data; None if there are none.
            mask_source: See `OpenVocabularyMaskFormer`; such masks have out-of-vocabulary scores only.
            kwargs: Arguments of `MaskFormer`.

        Raises:
            ValueError: If the backbone or the CLIP cannot embed masks as `region_head`, `mask_source` and
                `out_loss_weight` need it.
        """
        super().__init__(**kwargs)
        self.region_head: RegionHead = region_head
        self.grounding = grounding
        self.out_loss_weight = out_loss_weight
        self.mask_source = mask_source
        self._check_regions(clip)
        if grounding is not None:
            self.make_targets = _without_classes(self.make_targets)
        self.clip = clip.requires_grad_(False)
        self.classifier = classifier
        self.ensemble = ensemble
        self.masks: MaskPolicy = masks
        self.bank = TextBank(clip, templates, prompts=prompts)
        self.init_vocabulary(vocabulary)

    def _check_regions(self, clip: ClipModel) -> None:
        """Raise ValueError if masks cannot be embedded as the settings need it."""
        if self.region_head == "mask_tokens":
            token_tower(clip.visual)
        trunk = find_frozen_clip(self.backbone) if self.region_head == "dense" else None
        if self.mask_source is not None and self.region_head == "none":
            raise ValueError(
                "MODEL.MASK_FORMER.TEST.MASK_SOURCE: only the out-of-vocabulary classifier scores masks "
                "from elsewhere; set MODEL.MASK_POOLING.OUT_OF_VOCABULARY.HEAD to dense or mask_tokens"
            )
        if not self.out_loss_weight:
            return
        key = "MODEL.MASK_POOLING.OUT_OF_VOCABULARY.LOSS_WEIGHT"
        if trunk is None or not trunk.train_tower:
            raise ValueError(
                f"{key} trains the tower of the backbone: set OUT_OF_VOCABULARY.HEAD dense and MODEL."
                "FROZEN_CLIP.TRAIN_TOWER True"
            )
        if self.grounding is not None:
            raise ValueError(f"{key} needs class labels, which GROUNDING does without: set one of them")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.MASK_POOLING``, and `MaskFormer`'s from their keys."""
        arguments, keys = MaskFormer.from_config(cfg), cfg.MODEL.MASK_POOLING
        clip = build_clip(cfg)
        classifier = build_classifier(cfg, clip)
        embed = build_query_head(cfg, classifier.embed_dim)
        grounding = None
        if keys.GROUNDING.ENABLED:
            grounding = GroundingLoss(
                clip,
                weight=keys.GROUNDING.WEIGHT,
                num_phrases=keys.GROUNDING.NUM_PHRASES,
                template=keys.GROUNDING.TEMPLATE,
            )
            arguments["criterion"] = SetCriterion(cfg, num_classes=1)
        return arguments | {
            "head": MaskFormerHead(cfg, arguments["backbone"].output_shape(), class_embed=embed),
            "clip": clip,
            "classifier": classifier,
            "ensemble": Ensemble.from_config(keys.ENSEMBLE),
            "region_head": keys.OUT_OF_VOCABULARY.HEAD,
            "masks": keys.OUT_OF_VOCABULARY.MASKS,
            "grounding": grounding,
            "templates": keys.TEMPLATES,
            "prompts": build_fixed_prompts(cfg, clip),
            "out_loss_weight": keys.OUT_OF_VOCABULARY.LOSS_WEIGHT,
            "vocabulary": label_vocabulary(cfg),
            "mask_source": mask_source_from_config(cfg),
        }

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        """Embed all names as ``rows`` (N, D), unit length, with their ``classes`` (N,). See
        `OpenVocabularyModel`.
        """
        rows, classes = self.bank.per_synonym(vocabulary)
        return {"rows": rows, "classes": classes}

    def losses(self, batched_inputs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Compare queries with the text of the training classes, or with captions, and compute the losses."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        prediction: MaskPrediction = self.head(features)
        targets = self.padded_targets(batched_inputs, images)
        losses: dict[str, Tensor] = {}
        if self.out_loss_weight:
            losses["loss_regions"] = self.out_loss_weight * self._region_loss(features, targets)
        if self.grounding is None:
            prediction = self._classify_layers(prediction, self.training_text_embeddings())
        else:
            phrases = [sample["phrases"] for sample in batched_inputs]
            losses |= self.grounding(prediction, phrases, self.classifier)
        return losses | self.criterion(prediction, targets)

    def propose(self, batched_inputs: Sequence[dict[str, Any]]) -> DenseProposals:
        """Predict the masks of a batch, or take those of `mask_source`, and keep CLIP's map."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if self.mask_source is None:
            prediction: MaskPrediction = self.head(features)
        else:
            prediction = MaskPrediction(mask_logits=self.source_logits(batched_inputs, images))
        return DenseProposals(
            mask_logits=prediction.mask_logits.float(),
            class_logits=prediction.class_logits,
            query_embeddings=prediction.query_embeddings,
            padded_size=(images.tensor.shape[-2], images.tensor.shape[-1]),
            image_sizes=[(h, w) for h, w in images.image_sizes],
            features=features,
        )

    def classify(
        self, proposals: MaskProposals, batched_inputs: Sequence[dict[str, Any]]
    ) -> Sequence[Tensor]:
        """Fuse both classifiers; (Q, K + 1) for each image, void last."""
        base = self.base_flags()
        return [logits.fuse(self.ensemble, base) for logits in self.class_logits(proposals, batched_inputs)]

    def class_logits(
        self, proposals: MaskProposals, batched_inputs: Sequence[dict[str, Any]]
    ) -> list[ClassLogits]:
        """Compute the logits of both classifiers for the masks of each image, before they are fused."""
        assert isinstance(proposals, DenseProposals)
        text, batch = self.text_embeddings(), len(proposals.mask_logits)
        assert self.vocabulary is not None
        rows, classes, num_classes = text["rows"], text["classes"], len(self.vocabulary)
        inside: Sequence[Tensor | None] = [None] * batch
        if proposals.query_embeddings is not None:
            logits = self.classifier(proposals.query_embeddings, rows, classes, num_classes).float()
            if proposals.class_logits is not None:
                logits = with_objectness(logits[..., :-1], proposals.class_logits.float())
            inside = logits.unbind()
        valid = torch.ones(proposals.mask_logits.shape[:2], dtype=torch.bool, device=self.device)
        outside: Sequence[Tensor | None] = [None] * batch
        if self.region_head != "none":
            regions = self.embed_regions(proposals, batched_inputs)
            valid = regions.valid
            outside = self._region_logits(regions.embeddings, text, num_classes).unbind()
        return [ClassLogits(p, q, v) for p, q, v in zip(inside, outside, valid, strict=True)]

    def embed_regions(
        self, proposals: DenseProposals, batched_inputs: Sequence[dict[str, Any]]
    ) -> RegionEmbeddings:
        """Embed the masks of a batch in CLIP's space, as `region_head` says."""
        if self.region_head == "mask_tokens":
            images = [self._rgb(sample["image"]) for sample in batched_inputs]
            padded = ImageList.from_tensors(images, self.size_divisibility).tensor
            return embed_token_regions(self.clip, padded, proposals.mask_logits, self.masks)
        trunk, joint = find_frozen_clip(self.backbone), proposals.features[JOINT]
        return embed_dense_regions(trunk, joint, proposals.mask_logits, self.masks)

    def _region_logits(
        self, embeddings: Tensor, text: TextEmbeddings, num_classes: int | None = None
    ) -> Tensor:
        """Compare region embeddings (..., D) with all names and return class logits (..., K)."""
        return max_logits(self.region_name_logits(embeddings, text["rows"]), text["classes"], num_classes)

    def region_name_logits(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        """Compare region embeddings (..., D) with unit text embeddings of names (N, D): logits (..., N)."""
        scale = self.clip.logit_scale.exp().clamp(max=MAX_SCALE)
        return scale * (F.normalize(embeddings.float(), dim=-1) @ rows.T)

    def _region_loss(self, features: Mapping[str, Tensor], targets: Sequence[Targets]) -> Tensor:
        """Compute the cross-entropy of the ground-truth masks in the out-of-vocabulary classifier."""
        text, trunk = self.training_text_embeddings(), find_frozen_clip(self.backbone)
        logits, labels = [], []
        for b, (classes, masks) in enumerate(targets):
            inside = (2.0 * masks.float() - 1)[None]
            regions = embed_dense_regions(trunk, features[JOINT][b : b + 1], inside, self.masks)
            logits.append(self._region_logits(regions.embeddings[regions.valid], text))
            labels.append(classes[regions.valid[0]])
        found = torch.cat(labels)
        return F.cross_entropy(torch.cat(logits), found, reduction="sum") / max(len(found), 1)

    def _rgb(self, image: Tensor) -> Tensor:
        image = image.to(self.device, non_blocking=True).float()
        return image if self.input_format == "RGB" else image.flip(0)

    def _classify_layers(self, prediction: MaskPrediction, text: TextEmbeddings) -> MaskPrediction:
        aux = [self._classify_layers(layer, text) for layer in prediction.aux]
        logits = self.classifier(prediction.require_query_embeddings(), text["rows"], text["classes"])
        return replace(prediction, class_logits=logits, aux=aux)


def _without_classes(make_targets: Callable[..., Targets]) -> Callable[..., Targets]:
    """Label all masks of `make_targets` as class 0, "object"."""

    def make(sample: dict[str, Any], ignore_label: int = 255) -> Targets:
        labels, masks = make_targets(sample, ignore_label)
        return Targets(torch.zeros_like(labels), masks)

    return make
