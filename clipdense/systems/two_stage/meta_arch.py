"""OVSeg, zsseg and ZegFormer: mask proposals, classified by their queries and by CLIP's view of their
crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipdense.backbone.prompting import build_fixed_prompts
from clipdense.clip.prompts import AffixPrompts
from clipdense.clip.text import LearnedPrompts, TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.maskformer import (
    EmbeddingHead,
    MaskFormer,
    MaskFormerHead,
    MaskPrediction,
    MaskProposals,
    OpenVocabularyMaskFormer,
)
from clipdense.maskformer.open_vocabulary import mask_source_from_config, output_size
from clipdense.open_vocabulary import Proposals, TextEmbeddings
from clipdense.open_vocabulary.build import label_vocabulary
from clipdense.regions import LazyMaps, RegionEncoder, cosine_logits
from clipdense.systems.two_stage.build import build_encoder
from clipdense.systems.two_stage.queries import QueryClassifier
from clipdense.systems.two_stage.scores import Scoring

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["OVSeg"]

_TEXT = "encoder.clip.text."


@META_ARCH_REGISTRY.register()
class OVSeg(OpenVocabularyMaskFormer):
    """Two-stage open-vocabulary segmentation (OVSeg, Liang et al., CVPR 2023; zsseg, Xu et al., ECCV 2022;
    ZegFormer, Ding et al., CVPR 2022).

    1. A mask proposal network predicts masks m_q and query embeddings v_q, without classes.
    2. v_q is compared with the text embeddings t_k and "no object": p_q = softmax(tau cos(v_q, t)).
    3. CLIP embeds the crop of the image that m_q cuts out, which is compared with t_k as well.
    4. Both scores are fused (`Scoring`), and the masks are merged to segmentations (`merge_queries`).

    CLIP is frozen. Training fits the proposal network and "no object" to the text of the training classes.
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
        fixed_prompts: LearnedPrompts | None = None,
        scoring: Scoring | None = None,
        keep_encoder: bool = False,
        crop_scale: float = 100.0,
        vocabulary: Vocabulary | None = None,
        mask_source: Proposals | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            encoder: CLIP's branch for crops; its CLIP also has the text encoder.
            classifier: Classifier of the query embeddings that the head predicts.
            templates: Prompt templates of the text for queries.
            train_templates: The same in training; "": `templates`.
            crop_templates: Prompt templates of the text for crops; "": `templates`.
            prompts: Learned context around class names, a part of the weights; None: templates alone.
            fixed_prompts: Learned context of a file of its own, instead of `prompts`; not stored in
                checkpoints.
            scoring: Fusion of both scores; default: OVSeg's.
            keep_encoder: Keep this encoder when weights are loaded, except its text tower.
            crop_scale: Factor of the cosines of crops; 0: CLIP's learned scale.
            vocabulary: Classes of the training data; None if there are none.
            mask_source: See `OpenVocabularyMaskFormer`; such masks are classified by their crops alone.
            kwargs: Arguments of `MaskFormer`.
        """
        super().__init__(**kwargs)
        self.encoder = encoder.requires_grad_(False)
        self.classifier = classifier
        self.prompts = prompts if prompts is None else prompts.requires_grad_(False)
        self.scoring = Scoring() if scoring is None else scoring
        self.keep_encoder = keep_encoder
        self.mask_source = mask_source
        self.crop_scale = crop_scale
        names = [templates, train_templates or templates, crop_templates or templates]
        context = fixed_prompts if prompts is None else prompts
        banks = {name: TextBank(encoder.clip, name, prompts=context) for name in dict.fromkeys(names)}
        self.query_bank, self.train_bank, self.crop_bank = (banks[name] for name in names)
        self.init_vocabulary(vocabulary)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.TWO_STAGE``, and `MaskFormer`'s from their keys."""
        arguments, keys = MaskFormer.from_config(cfg), cfg.MODEL.TWO_STAGE
        encoder = build_encoder(cfg)
        clip = encoder.clip
        embed = EmbeddingHead(
            cfg.MODEL.MASK_FORMER.HIDDEN_DIM, keys.EMBED_HIDDEN_DIM, clip.embed_dim, keys.EMBED_LAYERS
        )
        merging = replace(
            arguments["merging"],
            resize_masks_first=False,
            best_masks=keys.BEST_MASKS,
            best_mask_threshold=encoder.rule.probability_threshold,
            calibration=keys.CALIBRATION,
        )
        before, after = keys.PROMPT_CONTEXT
        assert clip.text is not None
        fixed = build_fixed_prompts(cfg, clip)
        if fixed is not None and (before or after):
            raise ValueError(
                "MODEL.PROMPT.WEIGHTS and MODEL.TWO_STAGE.PROMPT_CONTEXT both describe the context of class "
                "names: set PROMPT_CONTEXT [0, 0], or leave out WEIGHTS"
            )
        return arguments | {
            "head": MaskFormerHead(cfg, arguments["backbone"].output_shape(), class_embed=embed),
            "merging": merging,
            "encoder": encoder,
            "classifier": QueryClassifier(clip.embed_dim, normalize_no_object=keys.NORMALIZE_NO_OBJECT),
            "templates": keys.TEMPLATES,
            "train_templates": keys.TRAIN_TEMPLATES,
            "crop_templates": keys.CROP_TEMPLATES,
            "prompts": AffixPrompts(before, after, clip.text.width) if before or after else None,
            "fixed_prompts": fixed,
            "scoring": Scoring.from_config(keys.SCORES),
            "keep_encoder": bool(keys.ADAPTED_CLIP),
            "crop_scale": keys.CROP_SCALE,
            "vocabulary": label_vocabulary(cfg),
            "mask_source": mask_source_from_config(cfg),
        }

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        """Embed classes as ``queries`` and, for evaluation, as ``crops``: (K, D), unit length; see
        `OpenVocabularyModel`.
        """
        if training:
            return {"queries": self.train_bank(vocabulary)}
        return {"queries": self.query_bank(vocabulary), "crops": self.crop_bank(vocabulary)}

    def losses(self, batched_inputs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Compare queries with the text of the training classes and compute `MaskFormer`'s losses."""
        images = self.preprocess_image(batched_inputs)
        text = self.training_text_embeddings()["queries"]
        prediction = self._classify_layers(self.predict(images), text)
        return self.criterion(prediction, self.padded_targets(batched_inputs, images))

    def classify(
        self, proposals: MaskProposals, batched_inputs: Sequence[dict[str, Any]]
    ) -> Sequence[Tensor]:
        """Fuse the scores of queries and crops; (Q, K + 1) for each image, background last.

        With Q queries, V of which have a crop, and K classes: query logits (Q, K + 1), crop embeddings (V,
        D), crop logits (V, K).
        """
        text, base, scoring = self.text_embeddings(), self.base_flags(), self.scoring
        if self.mask_source is None:
            query_logits = self.classifier(proposals.require_query_embeddings(), text["queries"]).float()
        else:  # masks without queries
            query_logits = proposals.mask_logits.new_zeros(
                *proposals.mask_logits.shape[:2], len(text["crops"]) + 1
            )
            scoring = replace(scoring, source="clip", clip_background=False, min_query_score=0.0)
        if scoring.source == "proposals":
            return query_logits.softmax(-1).unbind()
        scale = self.crop_scale or self.encoder.clip.logit_scale.exp()
        query_masks = [scoring.query_mask(logits) for logits in query_logits]
        crops = self.encoder.embed_images(
            [self._rgb(sample["image"]) for sample in batched_inputs],
            [self._mask_values(proposals, b) for b in range(len(batched_inputs))],
            query_masks,
        )
        scores = []
        for logits, query_mask, (embeddings, valid) in zip(query_logits, query_masks, crops, strict=True):
            crop_logits = cosine_logits(embeddings, text["crops"], scale)
            scores.append(scoring(logits, crop_logits, valid, base, query_mask))
        return scores

    def propose_masks(self, sample: dict[str, Any]) -> Tensor:
        """Predict the binary masks that the crops of one image are cut with; needs no vocabulary.

        Args:
            sample: With ``image`` (3, h, w) in 0 .. 255; optional ``height`` and ``width`` of the output in
                pixels, by default the image's.

        Returns:
            (Q, height, width) bool, the pixels above the crop rule's threshold.
        """
        rule, masks = self.encoder.rule, self.propose([sample]).masks(0)
        masks = masks.resize(output_size(sample, masks.shape[1:]))
        values = masks if rule.padded_logits else masks.apply(torch.sigmoid)
        return values.apply(lambda values: values > rule.threshold).compute()

    def prepare_state(self, state: dict[str, Tensor]) -> None:
        """Load hook: clear cached text embeddings; keep ADAPTED_CLIP. See `LoadHook`."""
        super().prepare_state(state)
        if self.keep_encoder:
            own = {f"encoder.{key}": value for key, value in self.encoder.state_dict().items()}
            for key in [key for key in state if key.startswith("encoder.") and not key.startswith(_TEXT)]:
                del state[key]
            state.update({key: value for key, value in own.items() if not key.startswith(_TEXT)})

    def _classify_layers(self, prediction: MaskPrediction, text: Tensor) -> MaskPrediction:
        aux = [self._classify_layers(layer, text) for layer in prediction.aux]
        logits = self.classifier(prediction.require_query_embeddings(), text)
        return replace(prediction, class_logits=logits, aux=aux)

    def _mask_values(self, proposals: MaskProposals, b: int) -> LazyMaps:
        """Resize the masks of image b to the values that the crop rule's threshold applies to."""
        if self.encoder.rule.padded_logits:
            return proposals.padded_masks(b)
        return proposals.masks(b).apply(torch.sigmoid)

    def _rgb(self, image: Tensor) -> Tensor:
        image = image.to(self.device, non_blocking=True)
        return image if self.input_format == "RGB" else image.flip(0)
