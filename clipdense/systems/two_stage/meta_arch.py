"""OVSeg, zsseg and ZegFormer: mask proposals, named by their queries and by CLIP's view of their crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip import load_clip
from clipdense.clip.mask_prompts import MaskPrompts, load_mask_prompts
from clipdense.clip.prompts import AffixPrompts
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.inference import (
    best_masks,
    instance_inference,
    panoptic_inference,
    semantic_labels,
    semantic_map,
)
from clipdense.maskformer import EmbeddingHead, MaskFormer, MaskFormerHead
from clipdense.maskformer.prediction import MaskPrediction
from clipdense.maskformer.targets import pad_targets
from clipdense.open_vocabulary import OpenVocabularyModel, TextEmbeddings
from clipdense.open_vocabulary.build import label_vocabulary
from clipdense.regions import CropRule, FusionSettings, RegionEncoder, cosine_logits
from clipdense.systems.two_stage.queries import QueryClassifier
from clipdense.systems.two_stage.scores import Scoring

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.postprocessing import sem_seg_postprocess

__all__ = ["OVSeg"]

TEXT = "encoder.clip.text."


@dataclass(frozen=True)
class MaskProposals:
    """Class-agnostic masks of a batch.

    Attributes:
        mask_logits: (B, Q, H, W) at the size of the padded images.
        query_embeddings: (B, Q, D), not normalised, in the space of the text embeddings.
        image_sizes: height and width of each image without padding, in pixels.
    """

    mask_logits: Tensor
    query_embeddings: Tensor
    image_sizes: list[tuple[int, int]]


@META_ARCH_REGISTRY.register()
class OVSeg(OpenVocabularyModel, MaskFormer):
    """Two stages (OVSeg, Liang et al., CVPR 2023; zsseg, Xu et al., ECCV 2022; ZegFormer, Ding et al., CVPR
    2022): class-agnostic masks, each classified twice.

    A query's embedding v is compared with the words: p. The crop that its mask cuts out of the image goes
    through CLIP, and is compared with the words: q. Both are fused. The CLIP is frozen; what is trained are
    the proposals, with the words of the training classes.
    """

    @configurable
    def __init__(
        self,
        *,
        encoder: RegionEncoder,
        classifier: QueryClassifier,
        templates: str = "ovseg_14",
        train_templates: str = "",
        crop_templates: str = "",
        prompts: AffixPrompts | None = None,
        scoring: Scoring | None = None,
        keep_encoder: bool = False,
        crop_scale: float = 100.0,
        calibration: float = 0.0,
        best_masks: bool = False,
        max_dense_classes: int = 256,
        vocabulary: Vocabulary | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            encoder: the CLIP branch; its CLIP has the text tower, too.
            classifier: of queries, whose embeddings the head gives.
            templates: prompt templates of the text for queries.
            train_templates: the same in training; "": `templates`.
            crop_templates: prompt templates of the text for crops; "": `templates`.
            prompts: learned vectors around class names.
            scoring: default: OVSeg's.
            keep_encoder: the encoder of a file that is loaded gives way to this one, but for its text tower.
            crop_scale: cosines of crops are multiplied by it; 0 for CLIP's own scale.
            calibration: taken from the semantic maps of base classes.
            best_masks: make semantic maps of the best query of each class alone, its mask binarised.
            max_dense_classes: beyond, semantic segmentation gives labels only; 0: never.
            vocabulary: of the training data, whose classes the labels count.
            kwargs: of `MaskFormer`.
        """
        super().__init__(**kwargs)
        self.encoder = encoder.requires_grad_(False)
        self.classifier = classifier
        self.prompts = prompts if prompts is None else prompts.requires_grad_(False)
        self.scoring = Scoring() if scoring is None else scoring
        self.keep_encoder = keep_encoder
        self.crop_scale, self.calibration = crop_scale, calibration
        self.best_masks = best_masks
        self.max_dense_classes = max_dense_classes
        names = [templates, train_templates or templates, crop_templates or templates]
        banks = {name: TextBank(encoder.clip, name, prompts=prompts) for name in dict.fromkeys(names)}
        self.query_bank, self.train_bank, self.crop_bank = (banks[name] for name in names)
        self.init_vocabulary(vocabulary)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """As `MaskFormer.from_config`, and ``MODEL.TWO_STAGE``."""
        arguments = MaskFormer.from_config(cfg)
        keys, scores = cfg.MODEL.TWO_STAGE, cfg.MODEL.TWO_STAGE.SCORES
        pickles = {"allow_pickle": cfg.MODEL.ALLOW_PICKLE}
        crop_clip = keys.CROP_CLIP
        clip = (
            load_clip(crop_clip.NAME, crop_clip.PRETRAINED, **pickles)
            if crop_clip.NAME
            else clip_from_config(cfg)
        )
        if clip.text is None:
            raise ValueError(f"'{clip.name}' has no text tower, which names the proposals")
        hidden = cfg.MODEL.MASK_FORMER.HIDDEN_DIM
        embed = EmbeddingHead(hidden, keys.EMBED_HIDDEN_DIM, clip.embed_dim, keys.EMBED_LAYERS)
        mask_prompts = None
        if keys.ADAPTED_CLIP:
            if cfg.MODEL.CLIP.POSITION_GRID and not crop_clip.NAME:
                raise ValueError("MODEL.CLIP.POSITION_GRID: an adapted CLIP keeps its own grid; set it to 0")
            name = crop_clip.NAME or cfg.MODEL.CLIP.NAME
            adapted = load_clip(name, keys.ADAPTED_CLIP, text=False, **pickles)
            clip.visual, clip.logit_scale = adapted.visual, adapted.logit_scale
            mask_prompts = load_mask_prompts(keys.ADAPTED_CLIP, **pickles)
        elif keys.MASK_PROMPTS.DEPTH:
            mask_prompts = MaskPrompts.of(clip.visual, keys.MASK_PROMPTS.DEPTH)
        settings = FusionSettings(scores.ALPHA, scores.BETA)
        return arguments | {
            "head": MaskFormerHead(cfg, arguments["backbone"].output_shape(), class_embed=embed),
            "encoder": RegionEncoder(
                clip,
                CropRule.from_config(cfg.MODEL.TWO_STAGE.CROP),
                mask_prompts=mask_prompts,
                use_mask_prompts=keys.MASK_PROMPTS.ENABLED,
                batch_size=keys.CROP_BATCH_SIZE,
                precision=keys.PRECISION,
                compile=keys.COMPILE,
            ),
            "classifier": QueryClassifier(clip.embed_dim, normalize_no_object=keys.NORMALIZE_NO_OBJECT),
            "templates": keys.TEMPLATES,
            "train_templates": keys.TRAIN_TEMPLATES,
            "crop_templates": keys.CROP_TEMPLATES,
            "prompts": AffixPrompts(*keys.PROMPT_CONTEXT, clip.text.width)
            if any(keys.PROMPT_CONTEXT)
            else None,
            "scoring": Scoring(
                scores.SOURCE,
                scores.FUSION,
                settings,
                scores.EMPTY,
                scores.CLIP_BACKGROUND,
                scores.MIN_QUERY_SCORE,
            ),
            "keep_encoder": bool(keys.ADAPTED_CLIP),
            "crop_scale": keys.CROP_SCALE,
            "calibration": keys.CALIBRATION,
            "best_masks": keys.BEST_MASKS,
            "max_dense_classes": cfg.TEST.MAX_DENSE_CLASSES,
            "vocabulary": label_vocabulary(cfg),
        }

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        """Embed classes as ``queries`` and, for evaluation, as ``crops``: (K, D), unit length; see
        `OpenVocabularyModel`.
        """
        if training:
            return {"queries": self.train_bank(vocabulary)}
        return {"queries": self.query_bank(vocabulary), "crops": self.crop_bank(vocabulary)}

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """As `MaskFormer`: losses in training; otherwise for each image those that are on of ``sem_seg``
        (K, H, W), or ``sem_seg_labels`` (H, W) of a large vocabulary, ``panoptic_seg`` and ``instances``.
        """
        if self.training:
            images = self.preprocess_image(batched_inputs)
            prediction = self.head(self.backbone(images.tensor))
            size = (images.tensor.shape[-2], images.tensor.shape[-1])
            targets = [self._targets(sample) for sample in batched_inputs]
            words = self.training_text_embeddings()["queries"]
            return self.criterion(self._classify(prediction, words), pad_targets(targets, size))
        proposals = self.propose(batched_inputs)
        class_logits = self.classify(proposals.query_embeddings)
        return [
            self.postprocess(logits, mask, image_size, sample)
            for logits, mask, image_size, sample in zip(
                class_logits, proposals.mask_logits, proposals.image_sizes, batched_inputs, strict=True
            )
        ]

    def propose(self, batched_inputs: Sequence[dict[str, Any]]) -> MaskProposals:
        """Predict class-agnostic masks; needs no vocabulary.

        Args:
            batched_inputs: each with ``image`` (3, H, W) in 0 .. 255.
        """
        images = self.preprocess_image(batched_inputs)
        prediction = self.head(self.backbone(images.tensor))
        size = images.tensor.shape[-2:]
        return MaskProposals(
            F.interpolate(prediction.mask_logits.float(), size, mode="bilinear", align_corners=False),
            prediction.require_query_embeddings(),
            [(h, w) for h, w in images.image_sizes],
        )

    def classify(self, query_embeddings: Tensor) -> Tensor:
        """Compare query embeddings (B, Q, D) with the evaluation vocabulary -> class logits (B, Q, K + 1),
        "no object" last."""
        return self.classifier(query_embeddings, self.text_embeddings()["queries"]).float()

    def propose_masks(self, sample: dict[str, Any]) -> Tensor:
        """Predict the binary masks that the crops of one image are cut with.

        Args:
            sample: with ``image`` (3, h, w) in 0 .. 255; optional ``height`` and ``width`` of the output in
                pixels, by default the image's.

        Returns:
            (Q, height, width) bool: the pixels above the crop rule's threshold.
        """
        proposals, rule = self.propose([sample]), self.encoder.rule
        image_size = proposals.image_sizes[0]
        size = sample.get("height", image_size[0]), sample.get("width", image_size[1])
        logits: Tensor = sem_seg_postprocess(proposals.mask_logits[0], image_size, *size)
        return (logits if rule.padded_logits else logits.sigmoid()) > rule.threshold

    def scores(self, logits: Tensor, masks: Tensor, image_size: tuple[int, int], image: Tensor) -> Tensor:
        """Fused scores (Q, K + 1) of one image's proposals.

        Args:
            logits: (Q, K + 1) of the queries.
            masks: mask logits (Q, H, W) of the padded image.
            image_size: height and width without padding.
            image: (3, h, w), as the model's input.
        """
        if self.scoring.source == "proposals":
            return self.scoring(logits, None, None, None)
        if not self.encoder.rule.padded_logits:
            masks = masks[:, : image_size[0], : image_size[1]].sigmoid()
        image = image.to(self.device)
        query_mask = self.scoring.query_mask(logits)
        embeddings, valid = self.encoder(
            image if self.input_format == "RGB" else image.flip(0), masks, query_mask
        )
        scale = self.crop_scale or self.encoder.clip.logit_scale.exp()
        clip = cosine_logits(embeddings, self.text_embeddings()["crops"], scale)
        return self.scoring(logits, clip, valid, self.base_flags(), query_mask)

    def postprocess(
        self, logits: Tensor, masks: Tensor, image_size: tuple[int, int], sample: dict[str, Any]
    ) -> dict[str, Any]:
        """Outputs of one image; arguments as `MaskFormer.postprocess`."""
        scores = self.scores(logits, masks, image_size, sample["image"])
        height, width = sample.get("height", image_size[0]), sample.get("width", image_size[1])
        output: dict[str, Any] = {}
        probabilities = masks[:, : image_size[0], : image_size[1]].sigmoid()
        if self.proposals_on:
            output["proposal_masks"] = probabilities
        if self.semantic_on:
            classes, maps = scores[:, :-1], probabilities
            if self.best_masks:
                rule, best = self.encoder.rule, best_masks(classes)
                limits = masks[:, : image_size[0], : image_size[1]] if rule.padded_logits else probabilities
                classes, maps = classes[best], (limits[best] > rule.threshold).float()
            arguments = classes, maps, (height, width)
            calibration: dict[str, Any] = {"base": self.base_flags(), "calibration": self.calibration}
            if 0 < self.max_dense_classes < scores.shape[1] - 1:
                output["sem_seg_labels"] = semantic_labels(*arguments, **calibration)[0]
            else:
                output["sem_seg"] = semantic_map(*arguments, **calibration)
        if self.panoptic_on or self.instance_on:
            masks = sem_seg_postprocess(masks, image_size, height, width)
            logits = scores.log()  # whose softmax gives them a sum of 1, background included
        if self.panoptic_on:
            output["panoptic_seg"] = panoptic_inference(
                logits, masks, self._things(), **self.panoptic_settings
            )
        if self.instance_on:
            things = self._things() if self.panoptic_on else None
            output["instances"] = instance_inference(logits, masks, topk=self.topk, things=things)
        return output

    def prepare_state(self, state: dict[str, Tensor]) -> None:
        """Load hook: clear cached text embeddings; keep ADAPTED_CLIP. See `LoadHook`."""
        super().prepare_state(state)
        if self.keep_encoder:
            own = {f"encoder.{key}": value for key, value in self.encoder.state_dict().items()}
            for key in [key for key in state if key.startswith("encoder.") and not key.startswith(TEXT)]:
                del state[key]
            state.update({key: value for key, value in own.items() if not key.startswith(TEXT)})

    def _classify(self, prediction: MaskPrediction, words: Tensor) -> MaskPrediction:
        aux = [self._classify(layer, words) for layer in prediction.aux]
        logits = self.classifier(prediction.require_query_embeddings(), words)
        return replace(prediction, class_logits=logits, aux=aux)

    def _things(self) -> frozenset[int]:
        flags = None if self.vocabulary is None else self.vocabulary.thing
        return self.things if flags is None else frozenset(i for i, thing in enumerate(flags) if thing)
