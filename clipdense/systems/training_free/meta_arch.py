"""Segmentation into any classes with a CLIP that was never trained for it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.backbone.prompting import build_fixed_prompts
from clipdense.clip import ClipModel
from clipdense.clip.patch_embedder import load_patch_embedder
from clipdense.clip.prompts import ClassPrompts
from clipdense.clip.tables import TextTable, find_table
from clipdense.clip.text import TextBank, TextEmbedder
from clipdense.clip.vocabulary import Vocabulary, canonical
from clipdense.data.image import read_labels
from clipdense.evaluation.probes import MapProbe, PatchProbe
from clipdense.inference import (
    Refinements,
    RefineSettings,
    class_probabilities,
    confident_labels,
    max_over_synonyms,
    pamr_weights,
    propagate_pixels,
    refine_by_prompts,
    refine_masks,
    suppress_absent_classes,
    suppress_small_classes,
)
from clipdense.open_vocabulary import OpenVocabularyModel, TextEmbeddings
from clipdense.paths import datasets_root
from clipdense.systems.training_free.config import option_pairs
from clipdense.systems.training_free.corrclip import correct_labels
from clipdense.systems.training_free.encoder import Cosines, DenseEncoder, Memo, WindowSettings
from clipdense.systems.training_free.examples import mix_examples, region_means
from clipdense.systems.training_free.features import build_features
from clipdense.systems.training_free.methods import METHODS
from clipdense.systems.training_free.names import protocol_names
from clipdense.systems.training_free.sam import SamModel

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["ScoreSettings", "ZeroShotSegmentor"]

CHUNK = 64
"""Names whose full-size maps are held at a time, for large vocabularies."""


@dataclass(frozen=True)
class ScoreSettings:
    """From cosines to labels.

    Attributes:
        logit_scale: factor of the cosines in the softmax; 0: CLIP's learned scale.
        prob_threshold: pixels whose best class score is lower are background, or have no class.
        area_threshold: see `suppress_small_classes`; 0 keeps all classes.
        class_threshold: classes that no pixel scores at least so high are left out (RADSeg); 0 keeps all.
        normalize: divide class scores by their sum, after the labels are taken.
        pamr_steps: steps of PAMR; 0 leaves it out.
        pamr_dilations: see `clipdense.inference.pamr`.
        pixel_propagation: propagate scores over the pixels of the image (LPOSS+).
        sam_refinement: refine labels by SAM (Trident).
    """

    logit_scale: float = 40.0
    prob_threshold: float = 0.0
    area_threshold: float = 0.0
    class_threshold: float = 0.0
    normalize: bool = False
    pamr_steps: int = 0
    pamr_dilations: tuple[int, ...] = (8, 16)
    pixel_propagation: bool = False
    sam_refinement: RefineSettings | None = None


@META_ARCH_REGISTRY.register()
class ZeroShotSegmentor(OpenVocabularyModel, nn.Module):
    """Open-vocabulary semantic segmentation without training.

    1. The class names are embedded with prompt templates, one embedding for each name of a class.
    2. A method (`METHODS`) changes CLIP's last block so that its patches keep local content; the patches of
       each window are compared with the names.
    3. The cosines of the windows are put together, resized to the image, and optionally refined.
    4. Softmax over all names, then the maximum over the names of a class; thresholds reject pixels and
       classes.

    The model has no trainable parameters and needs no weight file beside the CLIP of ``MODEL.CLIP``.

    Attributes:
        complete_without_weights: see `clipdense.open_vocabulary.protocols.CompleteWithoutWeights`.
    """

    complete_without_weights = True

    @configurable
    def __init__(
        self,
        *,
        encoder: DenseEncoder,
        scores: ScoreSettings | None = None,
        templates: str | Sequence[str] = "clip_80",
        prompts: ClassPrompts | None = None,
        background: str = "",
        text_table: Path | None = None,
        names: Mapping[tuple[tuple[str, ...], ...], Vocabulary] | None = None,
        regions: str = "",
        input_format: str = "RGB",
        max_dense_classes: int = 256,
    ) -> None:
        """
        Args:
            encoder: CLIP with a method.
            scores: from cosines to labels.
            templates: prompt templates (`clipdense.clip.templates.get`).
            prompts: trained contexts of class names, instead of templates; see `build_fixed_prompts`.
            background: names, separated by bars, that replace those of a class called "background".
            text_table: file with precomputed embeddings of the class names, see `TextTable.load`; the CLIP
                then needs no text tower.
            names: synonyms of a vocabulary -> the names to embed instead, class by class.
            regions: source of region ids (CorrCLIP): a folder of label maps named as the images, or "sam".
            input_format: order of the channels of images, "RGB" or "BGR".
            max_dense_classes: with more classes, only labels and no class maps are returned; 0: no limit.

        Raises:
            ValueError: If there is neither a text tower nor a table, or regions come from a SAM that is not
                set.
        """
        super().__init__()
        self.encoder = encoder
        self.scores = scores or ScoreSettings()
        self.background = background
        self.names = dict(names or {})
        self.regions = regions
        self.input_format = input_format
        self.max_dense_classes = max_dense_classes
        self.text_table = text_table
        self.bank = None if text_table is not None else TextBank(encoder.clip, templates, prompts=prompts)
        if encoder.sam is None and (regions == "sam" or self.scores.sam_refinement is not None):
            raise ValueError("SAM is asked for, but there is none: set MODEL.ZERO_SHOT.SAM.NAME")
        if encoder.method.kind == "corrclip" and not regions:
            raise ValueError(
                "method 'corrclip' needs region ids: set MODEL.ZERO_SHOT.REGIONS to a folder of label maps, "
                "or to sam"
            )
        self.init_vocabulary(None)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, clip: ClipModel | None = None, memo: Memo | None = None
    ) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.ZERO_SHOT`` and ``MODEL.CLIP``.

        Args:
            cfg: the config.
            clip: a CLIP to use instead of that of ``MODEL.CLIP``.
            memo: see `DenseEncoder`.
        """
        keys = cfg.MODEL.ZERO_SHOT
        table = None
        if keys.TEXT_TABLE and cfg.MODEL.PROMPT.WEIGHTS:
            raise ValueError(
                "MODEL.PROMPT.WEIGHTS has no effect with MODEL.ZERO_SHOT.TEXT_TABLE: set one of them"
            )
        if keys.TEXT_TABLE:
            table = find_table(keys.TEXT_TABLE, datasets_root(), key="MODEL.ZERO_SHOT.TEXT_TABLE")
        clip = clip_from_config(cfg, text=table is None) if clip is None else clip
        method = METHODS.get(keys.METHOD)
        features, sam, embedder = None, None, None
        if keys.FEATURES.NAME and method is not None and method.features:
            features = build_features(keys.FEATURES.NAME, keys.FEATURES.PRETRAINED, method.features)
        if keys.EMBEDDER and method is not None and method.embedder:
            embedder = load_patch_embedder(keys.EMBEDDER)
        if keys.SAM.NAME:
            sam = SamModel.create(keys.SAM.NAME, keys.SAM.PRETRAINED)
        refine = RefineSettings(
            coarse_threshold=keys.SAM.COARSE_THRESHOLD,
            minimal_area=keys.SAM.MINIMAL_AREA,
            iou_threshold=keys.SAM.IOU_THRESHOLD,
        )
        return {
            "encoder": DenseEncoder(
                clip,
                keys.METHOD,
                options=option_pairs(keys.OPTIONS),
                windows=WindowSettings(keys.WINDOW, keys.STRIDE, keys.PADDING, keys.BATCH_SIZE),
                refinements=Refinements(keys.PROMPT_DENOISING, keys.KEY_SMOOTHING, keys.KEY_NORM == "tokens"),
                features=features,
                sam=sam,
                embedder=embedder,
                memo=memo,
            ),
            "scores": ScoreSettings(
                keys.LOGIT_SCALE,
                keys.PROB_THRESHOLD,
                keys.AREA_THRESHOLD,
                keys.CLASS_THRESHOLD,
                keys.NORMALIZE_SCORES,
                keys.PAMR_STEPS,
                tuple(keys.PAMR_DILATIONS),
                keys.PIXEL_PROPAGATION,
                refine if keys.SAM.REFINE else None,
            ),
            "templates": keys.TEMPLATES,
            "prompts": None if table is not None else build_fixed_prompts(cfg, clip),
            "background": keys.BACKGROUND,
            "text_table": table,
            "names": protocol_names(cfg),
            "regions": keys.REGIONS,
            "input_format": cfg.INPUT.FORMAT,
            "max_dense_classes": cfg.TEST.MAX_DENSE_CLASSES,
        }

    def patch_probe(self) -> PatchProbe:
        """See `ProvidesPatchProbe`: the patches that the method compares with the names, in its windows."""
        encoder = self.encoder
        return MapProbe(
            encoder.patch_map,
            encoder.clip.normalize,
            encoder.clip.visual.stride,
            window=encoder.windows.window,
        )

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.encoder.clip.logit_scale.device

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        """Embed every name of every class: ``text`` (S, D), unit length, and ``classes`` (S,)."""
        vocabulary = self.names.get(vocabulary.synonyms, vocabulary)
        place = background_class(vocabulary)
        if self.background and place is not None:
            synonyms = list(vocabulary.synonyms)
            synonyms[place] = tuple(name.strip() for name in self.background.split("|") if name.strip())
            vocabulary = Vocabulary(tuple(synonyms))
        embedder: TextEmbedder | None = self.bank
        if self.text_table is not None:
            dim = self.encoder.clip.embed_dim
            embedder = TextTable.load(self.text_table, vocabulary, dim=dim)
        assert embedder is not None
        text, classes = embedder.per_synonym(vocabulary)
        return {"text": text, "classes": classes}

    @torch.no_grad()
    def embed_region(
        self, sample: Mapping[str, Any], box: tuple[float, float, float, float] | None
    ) -> tuple[Tensor, Tensor]:
        """Embed a region of a picture; see `clipdense.open_vocabulary.ExampleEncoder`."""
        image = sample["image"].to(self.device)
        rgb = image if self.input_format == "RGB" else image.flip(0)
        pixels = self.encoder.clip.normalize(rgb[None])
        size = sample.get("height", image.shape[1]), sample.get("width", image.shape[2])
        axes = torch.eye(self.encoder.clip.embed_dim, device=self.device)
        scale = self.scores.logit_scale or float(self.encoder.clip.logit_scale.exp())
        return region_means(self.encoder(pixels, axes, scale, self._regions(sample, pixels)), size, box)

    def encode_examples(
        self, vocabulary: Vocabulary, regions: Sequence[tuple[int, Tensor, Tensor]], weight: float
    ) -> TextEmbeddings:
        """Embed a vocabulary with examples; see `clipdense.open_vocabulary.ExampleEncoder`."""
        words = self.encode_vocabulary(vocabulary, training=False)
        text, classes = mix_examples(words["text"], words["classes"], regions, weight)
        return {"text": text, "classes": classes}

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Segment images.

        Args:
            batched_inputs: Detectron2's dicts with ``image`` (3, h, w) in 0..255, optional ``height`` and
                ``width`` of the output, and, for label maps of regions, ``file_name``.

        Returns:
            For each image ``sem_seg_labels`` (H, W), -1 for no class, and, up to ``max_dense_classes``,
            ``sem_seg`` (K, H, W) with class scores in 0..1.

        Raises:
            RuntimeError: If the model is in training mode: nothing of it can be trained.
        """
        if self.training:
            raise RuntimeError("ZeroShotSegmentor has nothing to train: use it with --eval-only")
        embeddings = self.text_embeddings()
        return [self._segment(sample, embeddings["text"], embeddings["classes"]) for sample in batched_inputs]

    @torch.no_grad()
    def _segment(self, sample: dict[str, Any], text: Tensor, classes: Tensor) -> dict[str, Any]:
        image = sample["image"].to(self.device)
        rgb = image if self.input_format == "RGB" else image.flip(0)
        pixels = self.encoder.clip.normalize(rgb[None])
        size = sample.get("height", image.shape[1]), sample.get("width", image.shape[2])
        settings, count = self.scores, len(self.vocabulary or ())
        scale = settings.logit_scale or float(self.encoder.clip.logit_scale.exp())
        regions = self._regions(sample, pixels)
        cosines = self.encoder(pixels, text, scale, regions)
        refine = _PixelRefinement(pixels, rgb, size, settings)
        place = background_class(self.vocabulary)
        background = -1 if place is None else place
        limit = self.max_dense_classes
        if limit and count > limit and not (settings.area_threshold or settings.class_threshold):
            labels, best = _streamed_labels(cosines, classes, scale, refine)
            labels = labels.masked_fill(best < settings.prob_threshold, background)
            return {"sem_seg_labels": self._corrected(labels, regions)}
        logits = refine(cosines.fold())
        if settings.pixel_propagation:  # LPOSS+ compares scores without a softmax
            scores = max_over_synonyms(logits, classes, count)
        else:
            scores = class_probabilities(logits, classes, count, scale)
        if settings.class_threshold:
            scores = suppress_absent_classes(scores, settings.class_threshold).clamp(min=0)
        if settings.area_threshold:
            scores = suppress_small_classes(scores, settings.area_threshold, max(background, 0))
        labels = confident_labels(scores, settings.prob_threshold, background)
        if settings.sam_refinement is not None:
            labels, scores = self._refined(labels, scores, pixels, settings.sam_refinement, background)
        if settings.normalize:
            scores = scores / scores.sum(0).clamp(min=1e-12)
        output: dict[str, Any] = {"sem_seg_labels": self._corrected(labels, regions)}
        if not limit or count <= limit:
            output["sem_seg"] = scores
        return output

    def _refined(
        self, labels: Tensor, scores: Tensor, pixels: Tensor, settings: RefineSettings, background: int
    ) -> tuple[Tensor, Tensor]:
        sam = self.encoder.sam
        assert sam is not None
        settings = replace(settings, frame=sam.side)
        embeddings = sam.embed(pixels, self.encoder.statistics)
        labels, scores = refine_by_prompts(
            labels, scores, lambda prompts: sam.decode(embeddings, prompts), settings
        )
        return labels, scores

    def _regions(self, sample: Mapping[str, Any], pixels: Tensor) -> Tensor | None:
        """Return region ids (H, W) at the size of the input image, if the method reads any."""
        if self.encoder.method.kind != "corrclip":
            return None
        if self.regions == "sam":
            assert self.encoder.sam is not None
            return self.encoder.sam.regions(pixels, self.encoder.statistics)
        if "file_name" not in sample:
            raise ValueError(
                "MODEL.ZERO_SHOT.REGIONS names a folder, but the sample has no file_name to find its map by"
            )
        path = Path(self.regions, Path(os.fspath(sample["file_name"])).stem + ".png")
        if not path.is_file():
            raise FileNotFoundError(f"MODEL.ZERO_SHOT.REGIONS: no label map {path}")
        ids = torch.from_numpy(read_labels(path).astype("int64")).to(pixels)
        return F.interpolate(ids[None, None], pixels.shape[-2:], mode="nearest")[0, 0].long()

    def _corrected(self, labels: Tensor, regions: Tensor | None) -> Tensor:
        """Give each region its most frequent label (CorrCLIP)."""
        if regions is None:
            return labels
        size = (labels.shape[0], labels.shape[1])
        resized = F.interpolate(regions[None, None].double(), size, mode="nearest")[0, 0].long()
        return correct_labels(labels, resized)


class _PixelRefinement:
    """Resizing to the output size and the refinements that read the image, for any of the names."""

    def __init__(self, pixels: Tensor, rgb: Tensor, size: tuple[int, int], settings: ScoreSettings) -> None:
        self.size, self.settings, self.rgb = size, settings, rgb
        self.weights: Tensor | None = None
        if settings.pamr_steps:
            resized = F.interpolate(pixels.float(), size, mode="bilinear", align_corners=False)
            self.weights = pamr_weights(resized, settings.pamr_dilations)

    def __call__(self, maps: Tensor) -> Tensor:
        """Refine maps (S, h, w) of the input image to (S, H, W) of the output."""
        if self.settings.pixel_propagation:
            maps = propagate_pixels(self.rgb.float() / 255, maps).float()
        maps = F.interpolate(maps[None], self.size, mode="bilinear", align_corners=False)
        if self.weights is not None:
            dilations = self.settings.pamr_dilations
            maps = refine_masks(self.weights, maps, steps=self.settings.pamr_steps, dilations=dilations)
        return maps[0]


def _streamed_labels(
    cosines: Cosines, classes: Tensor, scale: float, refine: _PixelRefinement
) -> tuple[Tensor, Tensor]:
    """Return labels (H, W) and their scores without holding the maps of all names."""
    best = labels = total = torch.empty(0)
    for start in range(0, len(classes), CHUNK):
        maps = scale * refine(cosines.fold(slice(start, start + CHUNK)))
        top, index = maps.max(0)
        mass = maps.logsumexp(0)
        if not start:
            best, labels, total = top, classes[index], mass
            continue
        labels = torch.where(top > best, classes[start + index], labels)
        best, total = torch.maximum(top, best), torch.logaddexp(total, mass)
    return labels, (best - total).exp()


def background_class(vocabulary: Vocabulary | None) -> int | None:
    """Return the class that is called "background", or None."""
    if vocabulary is None:
        return None
    for i, name in enumerate(vocabulary.names):
        if canonical(name) == "background":
            return i
    return None
