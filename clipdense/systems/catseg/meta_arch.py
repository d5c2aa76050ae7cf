"""CAT-Seg: open-vocabulary semantic segmentation by cost aggregation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.clip.finetune import (
    ALL_EXCEPT_POSITIONS,
    FineTuneRule,
    apply_rule,
    apply_text_rule,
    freeze_unused,
)
from clipdense.clip.model import ClipModel
from clipdense.clip.towers import Tower, TowerRequest
from clipdense.clip.vocabulary import Vocabulary
from clipdense.inference import merge_class_maps
from clipdense.open_vocabulary import OpenVocabularyModel, TextEmbeddings
from clipdense.open_vocabulary.build import label_vocabulary
from clipdense.systems.catseg.cost import AggregationSettings, CostAggregator, CostLogits
from clipdense.systems.catseg.loss import IgnoredPixels, class_map_loss
from clipdense.systems.catseg.prompts import PromptEncoder
from clipdense.systems.catseg.sed_decoder import SEDAggregator
from clipdense.systems.catseg.views import (
    WindowSettings,
    merge_view,
    merge_windows,
    resize,
    square_view,
    window_views,
)

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["CATSeg", "FineTune", "guidance_upsampling"]

FineTune = Literal["attention", "full", "image", "none"]

_ATTENTION = FineTuneRule(attention="qv", attention_biases=False)
_RULES: dict[str, tuple[FineTuneRule, FineTuneRule]] = {  # of the image and of the text tower
    "attention": (_ATTENTION, _ATTENTION),
    "full": (ALL_EXCEPT_POSITIONS, ALL_EXCEPT_POSITIONS),
    "image": (ALL_EXCEPT_POSITIONS, FineTuneRule()),
}
_PADDING_MULTIPLE = 32  # of published CAT-Seg


@META_ARCH_REGISTRY.register()
class CATSeg(OpenVocabularyModel, nn.Module):
    """Open-vocabulary semantic segmentation by cost aggregation (CAT-Seg, Cho et al., CVPR 2024).

    1. CLIP embeds every position of an image, V (h, w), and the prompts of every class, t_k.
    2. Their cosines are the cost volume C_k(i) = cos(V(i), t_k).
    3. A network aggregates it over space and over classes, and upsamples it to logits (`CostAggregator`).
    4. Each class is trained by binary cross-entropy, together with a few parameters of both towers of CLIP.

    Images are resized to squares. In evaluation the scores of windows and of the whole image may be averaged.
    """

    @configurable
    def __init__(
        self,
        *,
        clip: ClipModel,
        aggregator: CostAggregator | SEDAggregator,
        upsampling: nn.ModuleList,
        prompts: PromptEncoder,
        resolution: int = 384,
        dense: str = "value",
        guidance: Sequence[int] = (3, 7),
        finetune: FineTune = "attention",
        pooling: tuple[int, int] = (2, 2),
        evaluation: AggregationSettings | None = None,
        windows: WindowSettings | None = None,
        views_per_forward: int = 5,
        ignored_pixels: IgnoredPixels = "excluded",
        squeeze_padding: bool = False,
        ignore_label: int = 255,
        input_format: str = "RGB",
        max_dense_classes: int = 0,
        max_dense_bytes: int = 0,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """
        Args:
            clip: both towers.
            aggregator: from the cost volume to logits.
            upsampling: maps of the guidance to 2 and 4 times the size of the dense map, see
                `guidance_upsampling`.
            prompts: encoder of class names by the text tower of ``clip``.
            resolution: side of the square images that CLIP takes, in pixels.
            dense: mode of CLIP's dense map.
            guidance: taps of the image tower that guide the decoder.
            finetune: parameters of CLIP that learn: "attention" (weights of queries and values), "full",
                "image" (all of the image tower) or "none"; position tables never learn.
            pooling: average pooling before the class attention, in training.
            evaluation: settings of the aggregator in evaluation.
            windows: views in evaluation; default: the whole image.
            views_per_forward: number of views that are processed at a time.
            ignored_pixels: see `class_map_loss`.
            squeeze_padding: pad images to multiples of 32 pixels before they are resized (published).
            ignore_label: label of pixels without annotation.
            input_format: order of the channels, "RGB" or "BGR".
            max_dense_classes: number of classes above which the output has labels instead of one map per
                class; 0: no limit.
            max_dense_bytes: the same as a number of bytes of the maps; 0: no limit.
            vocabulary: classes of the training data; None if there are none.

        Raises:
            ValueError: If the tower lacks the dense mode or the parameters that shall learn, or the
                resolution is not a multiple of its stride.
        """
        super().__init__()
        tower = clip.visual
        if dense not in tower.dense_modes:
            why = tower.why_no_dense or f"its modes are {', '.join(tower.dense_modes)}"
            raise tower.cannot(f"MODEL.CAT_SEG.DENSE {dense!r}", why)
        if resolution % tower.stride:
            raise ValueError(
                f"MODEL.CAT_SEG.RESOLUTION {resolution} is not a multiple of the stride {tower.stride}"
            )
        self.clip, self.aggregator, self.guidance_upsampling = clip, aggregator, upsampling
        self.prompts = prompts
        self.resolution = resolution
        self.request = TowerRequest(taps=tuple(guidance), dense=dense)
        self.training_settings = AggregationSettings(pooling=pooling)
        self.evaluation = evaluation or AggregationSettings()
        self.windows = windows or WindowSettings()
        self.views_per_forward = views_per_forward
        self.ignored_pixels: IgnoredPixels = ignored_pixels
        self.padding_multiple = _PADDING_MULTIPLE if squeeze_padding else 0
        self.ignore_label, self.input_format = ignore_label, input_format
        self.max_dense_classes, self.max_dense_bytes = max_dense_classes, max_dense_bytes
        self._text_state: tuple[tuple[int, int], ...] = ()
        self._set_trainable(finetune)
        self.init_vocabulary(vocabulary)
        self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the constructor arguments from ``MODEL.CAT_SEG`` and ``MODEL.CLIP``."""
        keys, arguments = cfg.MODEL.CAT_SEG, cls.shared_arguments(cfg)
        clip = arguments["clip"]
        if keys.REJECTION.SCORES not in ("cost", "heads"):
            raise ValueError(
                f"MODEL.CAT_SEG.REJECTION.SCORES must be cost or heads, not {keys.REJECTION.SCORES!r}"
            )
        return arguments | {
            "aggregator": CostAggregator(
                clip.embed_dim,
                prompts=len(arguments["prompts"]),
                hidden_dim=keys.HIDDEN_DIM,
                layers=keys.LAYERS,
                heads=keys.HEADS,
                window=keys.WINDOW,
                max_classes=keys.MAX_CLASSES,
                image_guidance_dim=keys.IMAGE_GUIDANCE_DIM,
                text_guidance_dim=keys.TEXT_GUIDANCE_DIM,
                guidance_dims=keys.GUIDANCE_DIMS,
                decoder_guidance_dims=keys.DECODER_GUIDANCE_DIMS,
                decoder_dims=keys.DECODER_DIMS,
                rejection_heads=keys.REJECTION.SCORES == "heads",
            ),
            "upsampling": guidance_upsampling(clip.visual, keys.GUIDANCE, keys.GUIDANCE_DIMS),
        }

    @classmethod
    def shared_arguments(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the constructor arguments except the aggregator and the upsampling of its guidance."""
        keys, clip = cfg.MODEL.CAT_SEG, clip_from_config(cfg)
        test, windows = keys.TEST, keys.TEST.WINDOWS
        return {
            "clip": clip,
            "prompts": PromptEncoder(clip, keys.TEMPLATES, keys.SYNONYMS),
            "resolution": keys.RESOLUTION,
            "dense": keys.DENSE,
            "guidance": keys.GUIDANCE,
            "finetune": keys.FINETUNE,
            "pooling": tuple(keys.POOLING),
            "evaluation": AggregationSettings(tuple(test.POOLING), test.MAX_MAPS, keys.REJECTION.TOPK),
            "windows": WindowSettings(windows.ENABLED, windows.IMAGE_SIZE, windows.SIZE, windows.STRIDE),
            "views_per_forward": test.VIEWS_PER_FORWARD,
            "ignored_pixels": keys.IGNORED_PIXELS,
            "squeeze_padding": keys.SQUEEZE_PADDING,
            "ignore_label": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "input_format": cfg.INPUT.FORMAT,
            "max_dense_classes": cfg.TEST.MAX_DENSE_CLASSES,
            "max_dense_bytes": cfg.TEST.MAX_DENSE_MEGABYTES * 2**20,
            "vocabulary": label_vocabulary(cfg),
        }

    def train(self, mode: bool = True) -> CATSeg:
        """Keep CLIP in evaluation mode: its running statistics are constant, and it drops nothing."""
        super().train(mode)
        self.clip.eval()
        return self

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Compute the losses in training, and class maps otherwise.

        Args:
            batched_inputs: each with ``image`` (3, h, w) in 0..255. In training also ``sem_seg`` (h, w).
                Otherwise optional ``height`` and ``width`` of the output in pixels, by default the image's.

        Returns:
            A dict of losses, or for each image ``sem_seg`` (K, H, W), scores in 0..1 of each class by
            itself, or ``sem_seg_labels`` (H, W) of a large vocabulary or image.
        """
        images = [self.preprocess_image(sample["image"]) for sample in batched_inputs]
        if self.training:
            return self.losses(images, batched_inputs)
        if self.windows.enabled:
            views = torch.stack([window_views(image, self.windows) for image in images])
        else:
            views = torch.stack([self._square(image)[None] for image in images])
        logits = self.view_logits(views.flatten(0, 1), self.text_embeddings()["prompts"])
        samples = zip(logits.unflatten(0, views.shape[:2]), images, batched_inputs, strict=True)
        return [self.merge(maps, image.shape[-2:], sample) for maps, image, sample in samples]

    def preprocess_image(self, image: Tensor) -> Tensor:
        """Normalise an image (3, h, w) in 0..255 with the statistics of CLIP, RGB."""
        image = image.to(self.clip.logit_scale.device, non_blocking=True)
        return self.clip.normalize(image.flip(0) if self.input_format == "BGR" else image)

    def losses(self, images: Sequence[Tensor], batched_inputs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Compute the losses of normalised images.

        Raises:
            ValueError: If there is no training vocabulary, or a label exceeds it.
        """
        labels = [self._labels(sample) for sample in batched_inputs]
        views = torch.stack([self._square(image) for image in images])
        output = self.aggregate(views, self._training_text(), self.training_settings)
        loss = partial(
            class_map_loss, labels=labels, ignore_label=self.ignore_label, ignored=self.ignored_pixels
        )
        rejection = {f"loss_rejection_{i}": loss(logits) for i, logits in enumerate(output.rejection)}
        return {"loss_sem_seg": loss(output.logits), **rejection}

    def view_logits(self, views: Tensor, text: Tensor) -> Tensor:
        """Compute logits (V, K, H, W), float32, of normalised square views (V, 3, s, s), a few at a time."""
        parts = resize(views, self.resolution).split(self.views_per_forward)
        return torch.cat([self.aggregate(part, text, self.evaluation).logits.float() for part in parts])

    def aggregate(self, images: Tensor, text: Tensor, settings: AggregationSettings) -> CostLogits:
        """Run CLIP and the aggregator.

        Args:
            images: normalised (B, 3, resolution, resolution).
            text: prompt embeddings (K, P, D).
            settings: of the aggregator.
        """
        out = self.clip.visual(images, self.request)
        guidance = [up(tap) for up, (tap, _) in zip(self.guidance_upsampling, out.taps, strict=True)]
        result: CostLogits = self.aggregator(out.dense, text, guidance, settings)
        return result

    def merge(self, logits: Tensor, image_size: torch.Size, sample: dict[str, Any]) -> dict[str, Tensor]:
        """Merge the logits (views, K, h, w) of one image to its output, a few classes at a time."""
        size = (sample.get("height", image_size[0]), sample.get("width", image_size[1]))

        def scores(classes: slice) -> Tensor:
            part = logits[:, classes]
            return (
                merge_windows(part, self.windows, size) if self.windows.enabled else merge_view(part[0], size)
            )

        return merge_class_maps(
            scores,
            logits.shape[1],
            size,
            chunk=max(1, (self.evaluation.max_maps or logits.shape[1]) // len(logits)),
            max_dense_classes=self.max_dense_classes,
            max_dense_bytes=self.max_dense_bytes,
        )

    def encode_vocabulary(self, vocabulary: Vocabulary, training: bool) -> TextEmbeddings:
        """Embed the prompts of classes as ``prompts`` (K, P, D), unit length; see `OpenVocabularyModel`."""
        return {"prompts": self.prompts(vocabulary)}

    def set_vocabulary(self, vocabulary: Vocabulary, embeddings: TextEmbeddings | None = None) -> None:
        """Set the evaluation vocabulary; see `OpenVocabularyModel`."""
        self._forget_outdated_text()
        super().set_vocabulary(vocabulary, embeddings)

    def text_embeddings(self) -> TextEmbeddings:
        """Return the embeddings of the evaluation vocabulary for the current weights of the text tower."""
        self._forget_outdated_text()
        return super().text_embeddings()

    def _forget_outdated_text(self) -> None:
        """Clear the cached text if training has changed the text tower since it was encoded."""
        state = tuple((p.data_ptr(), p._version) for p in self.prompts.text.parameters())
        if state != self._text_state:
            self.clear_text_cache()
            self._text_state = state

    def _training_text(self) -> Tensor:
        """Embed the classes of the labels, with gradients if the text tower learns."""
        if self.label_vocabulary is None or not any(p.requires_grad for p in self.prompts.text.parameters()):
            return self.training_text_embeddings()["prompts"]
        return self.prompts(self.label_vocabulary)

    def _square(self, image: Tensor) -> Tensor:
        return square_view(image, self.resolution, self.padding_multiple)

    def _labels(self, sample: dict[str, Any]) -> Tensor:
        if "sem_seg" not in sample:
            raise ValueError(
                f"{sample.get('file_name', 'an image')} has no semantic label map, which CATSeg is trained "
                "on: choose a dataset with sem_seg_file_name in DATASETS.TRAIN"
            )
        labels: Tensor = sample["sem_seg"]  # on the host, if it comes from a loader: no wait for the device
        known = labels[labels != self.ignore_label]
        count = 0 if self.label_vocabulary is None else len(self.label_vocabulary)
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < count:
            raise ValueError(
                f"{sample.get('file_name', 'an image')} has labels {int(known.min())} to {int(known.max())}, "
                f"but DATASETS.TRAIN has {count} classes and void is {self.ignore_label} "
                "(MODEL.SEM_SEG_HEAD.IGNORE_VALUE)"
            )
        return labels.to(self.clip.logit_scale.device, torch.long, non_blocking=True)

    def _set_trainable(self, finetune: str) -> None:
        """Freeze the parameters of CLIP that do not learn, or that the loss does not depend on."""
        if finetune not in get_args(FineTune):
            raise ValueError(
                f"MODEL.CAT_SEG.FINETUNE must be one of {', '.join(get_args(FineTune))}, not {finetune!r}"
            )
        self.clip.requires_grad_(False)
        if finetune == "none":
            return
        image, text = _RULES[finetune]
        apply_rule(self.clip.visual, image)
        freeze_unused(self.clip.visual, TowerRequest(dense=self.request.dense))
        apply_text_rule(self.prompts.text, text)


def guidance_upsampling(tower: Tower, taps: Sequence[int], widths: Sequence[int]) -> nn.ModuleList:
    """Build the layers that bring early maps to 2 and 4 times the size of the dense map.

    A ViT has one size for all maps, which transposed convolutions enlarge (published). A ResNet or ConvNeXt
    has maps of these sizes, which are only projected.

    Args:
        tower: the image tower.
        taps: the tap of each size.
        widths: channels of the results.

    Raises:
        ValueError: If there are not two taps, the tower lacks one, or its size does not fit.
    """
    if len(taps) != 2 or any(tap not in tower.tap_channels for tap in taps):
        raise ValueError(
            f"MODEL.CAT_SEG.GUIDANCE {list(taps)}: expected two among {list(tower.tap_channels)}"
        )
    layers = nn.ModuleList()
    for tap, factor, width in zip(taps, (2, 4), widths, strict=True):
        scale, remainder = divmod(factor * tower.tap_strides[tap], tower.stride)
        if remainder or scale not in (1, 2, 4):
            fitting = [t for t, stride in tower.tap_strides.items() if factor * stride == tower.stride]
            raise ValueError(
                f"MODEL.CAT_SEG.GUIDANCE: tap {tap} of a {type(tower).__name__} has stride "
                f"{tower.tap_strides[tap]}, which does not give a map of {factor} times the size at stride "
                f"{tower.stride}; choose tap {', '.join(map(str, fitting)) or 'of another tower'}"
            )
        channels = tower.tap_channels[tap]
        layers.append(
            nn.ConvTranspose2d(channels, width, scale, scale) if scale > 1 else nn.Conv2d(channels, width, 1)
        )
    return layers
