"""Prediction on single images with a trained model."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from clipdense.backbone.score_map import score_classes, score_maps
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.datasets.synonyms import add_synonyms
from clipdense.data.image import MAX_PIXELS, ImageSource, load_image
from clipdense.data.mappers import map_image
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.denormals import flush_denormals
from clipdense.engine.device import run_model
from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import RunConfig, run_config
from clipdense.open_vocabulary import (
    CompleteWithoutWeights,
    OpenVocabularyModel,
    require_open_vocabulary,
)
from clipdense.run.buckets import AHEAD, predict_buckets
from clipdense.run.config import add_clipdense_config
from clipdense.run.keys import config_keys, config_value
from clipdense.run.memory import (
    available_memory,
    describe_out_of_memory,
    is_out_of_memory,
    within_memory,
)
from clipdense.run.prediction import Prediction, complete_output
from clipdense.run.predictor_classes import check_head_classes, known_metadata, register_stored_classes
from clipdense.run.setup import LoadedConfig, available_device, complete_config, read_config
from clipdense.run.sources import Source, expand_source, is_video, read_pixels
from clipdense.run.tiles import predict_tiles
from clipdense.run.videos import Video
from clipdense.run.weights import check_weight_classes
from clipdense.run.words import (
    Example,
    VocabularyLike,
    append_background,
    apply_thresholds,
    class_thresholds,
    embed_examples,
    parse_example,
    remove_background,
    with_examples,
)

from detectron2.config import CfgNode, get_cfg
from detectron2.data.catalog import Metadata
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["Predictor", "SwitchableOutputs"]

logger = logging.getLogger(__name__)

Output = dict[str, Any]


@runtime_checkable
class SwitchableOutputs(Protocol):
    """Meta-architecture whose outputs are switched on by config keys.

    Attributes:
        output_keys: kind of output ("panoptic", "instances", "semantic") -> full name of its config key.
    """

    output_keys: ClassVar[Mapping[str, str]]

    def select_outputs(self, kinds: Collection[str]) -> None:
        """Compute only these kinds of output, without a change of their values."""


class Predictor:
    """Trained model that predicts on images, one by one or in batches.

    An image is a file, a PIL image of any mode, or an array (see `clipdense.data.image.load_image`). It is
    resized as in evaluation. An output is the dictionary that Detectron2's models return for an image, in
    pixels of the original, upright image: ``instances`` and, if the model predicts them, ``sem_seg`` (or
    ``sem_seg_labels``) and ``panoptic_seg``.

    An open-vocabulary model predicts the classes of the test dataset, or those of `set_vocabulary`. A
    semantic or panoptic model always predicts some class, even if none of them is in the image. Background
    classes prevent that: where a background class has the highest score, ``sem_seg`` is 0 for all classes,
    ``sem_seg_labels`` is -1 and the segment id 0; instances of background classes are removed.

    Args:
        config: config file (.yaml, or .py for a LazyConfig; the configs of the package are found by name), a
            config object, which is not changed, or the result of `clipdense.run.setup.read_config`. The keys
            of a bare config object that differ from their defaults count as set by the user.
        weights: weight file; default ``MODEL.WEIGHTS`` (``train.init_checkpoint``). The config keys that it
            needs are set unless the user has set them. A model that is `CompleteWithoutWeights` needs none.
        opts: overrides: KEY VALUE pairs, or ``key=value`` for a LazyConfig.
        device: default: the device of the config, or the CPU if that is a GPU and none is available.
        score_threshold: instances with a lower score are removed, 0..1; None keeps the model's threshold.
        vocabulary: classes to predict, see `set_vocabulary`; None for those of the test dataset.
        background: background classes, see `set_vocabulary`.
        output: the only kind of output ("panoptic", "instances" or "semantic") that a model with
            `SwitchableOutputs` computes, which saves time and memory; None leaves the outputs as configured.

    Attributes:
        cfg: the config, with all overrides.
        model: the model in evaluation mode.
        metadata: class names: those of the vocabulary if one was given, otherwise those of the test dataset
            or, for a closed vocabulary, those stored in the weight file.

    Raises:
        ConfigError: If the config is wrong or names no weights or no classes, the weights were trained on
            other classes, the mapper cannot prepare single images, or a vocabulary is given to a model with a
            closed one.
        FileNotFoundError: If the weight file does not exist.
        CheckpointError: If the weights do not match the model, or lack some of its parameters.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | LoadedConfig | Any,
        weights: str | os.PathLike[str] | None = None,
        opts: Iterable[object] = (),
        device: str | None = None,
        score_threshold: float | None = None,
        vocabulary: VocabularyLike | None = None,
        background: VocabularyLike | None = None,
        output: str | None = None,
    ) -> None:
        loaded = _load(config, weights, [str(word) for word in opts])
        self.cfg = loaded.cfg
        self.score_threshold = score_threshold
        run = run_config(self.cfg)
        _prepare(run, loaded, device, output)
        options = run.options()
        if not options.weights and not isinstance(_architecture(run), CompleteWithoutWeights):
            raise ConfigError(
                "no trained weights are named: give e.g. MODEL.WEIGHTS output/demo/model_final.pth (in a "
                "LazyConfig train.init_checkpoint=...)"
            )
        self._mapper = run.build_test_mapper()
        requested = None if vocabulary is None else Vocabulary.parse(vocabulary)
        self._num_classes: int | None = None
        self._thresholds: torch.Tensor | None = None
        self._has_examples = False
        self.model: Any = run.build_model().eval()
        self._precision: str = run.precision
        if output and isinstance(self.model, SwitchableOutputs) and output in self.model.output_keys:
            self.model.select_outputs([output])
        if requested is not None or background is not None:
            _require_open_vocabulary(self.model)
        checkpointer = TrainingCheckpointer(self.model, "", options.weights_skip, options.allow_pickle)
        content = checkpointer.load_weights(options.weights, complete=True, file=loaded.weights)
        stored = content.get("metadata", {})
        if requested is None:
            known = self._use_known_classes(run, {**options.metadata, **stored})
            requested = None if background is None else known
        if requested is not None:
            self.set_vocabulary(requested, background)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Predictor:
        """Load a model by a name of any kind.

        Args:
            name: folder of a training or of a hub (``config.yaml`` and weights), config file, file of
                converted weights, CLIP (``shapes-rn``, ``ViT-B-16:openai`` or ``ViT-B-16:file.pt``; segments
                without training), or hub id ``organisation/name``, which is downloaded.
            options: arguments of `Predictor`, such as ``vocabulary``.

        Raises:
            FileNotFoundError: If the name is nothing of this kind; the message lists what it may be.
            ConnectionError: If files have to be downloaded and cannot.
        """
        from clipdense.run.pretrained import load_pretrained

        return load_pretrained(cls, name, **options)

    def set_vocabulary(
        self,
        vocabulary: VocabularyLike | None,
        background: VocabularyLike | None = None,
        *,
        examples: Sequence[Example | str] = (),
        example_weight: float = 1.0,
    ) -> None:
        """Set the classes that an open-vocabulary model predicts, and the class names of `metadata`.

        The model is not rebuilt; only names that are new to it are encoded.

        Args:
            vocabulary: argument of `Vocabulary.parse`: "cat|kitten, red car" (bars separate synonyms), the
                path of a class-list file (.txt, .json), a list of names, or a `Vocabulary`. All classes are
                things unless it tells things from stuff.
            background: further classes, which are removed from outputs; same forms as ``vocabulary``.
            examples: pictures of objects that stand for classes, `Example` or
                ``chair=photo.jpg:x0,y0,x1,y1``; a name that ``vocabulary`` lacks is added. ``vocabulary``
                may be None then. Several examples of a class are averaged.
            example_weight: share of the examples in the embedding of a class, 0..1; the rest is its words'.

        Raises:
            ConfigError: If the model has a closed vocabulary, or cannot embed examples.
            FileNotFoundError: If a class-list file does not exist.
            ValueError: If it is not a vocabulary, or the model cannot embed a name. The previous vocabulary
                stays.
        """
        _require_open_vocabulary(self.model)
        shown = [parse_example(e) if isinstance(e, str) else e for e in examples]
        vocabulary = with_examples(None if vocabulary is None else Vocabulary.parse(vocabulary), shown)
        vocabulary = replace(vocabulary, thing=vocabulary.thing or (True,) * len(vocabulary))
        names = list(vocabulary.names)
        things = [i for i, thing in enumerate(vocabulary.thing or ()) if thing]
        complete = vocabulary if background is None else append_background(vocabulary, background)
        if self._has_examples:
            self.model.clear_text_cache()  # embeddings of the same words with other examples
        samples = [(e, map_image(self._mapper, self._pixels(e.image))) for e in shown]
        embeddings = embed_examples(self.model, complete, samples, example_weight) if samples else None
        self._has_examples = embeddings is not None
        self.model.set_vocabulary(complete, embeddings)
        self._num_classes = None if background is None else len(names)
        self.metadata = Metadata(
            thing_classes=names,
            # as in Detectron2's panoptic metadata, both lists name every class
            stuff_classes=names,
            thing_dataset_id_to_contiguous_id={i: i for i in things},
        )

    def set_thresholds(
        self, threshold: float | None = None, classes: Mapping[str, float] | Iterable[str] = ()
    ) -> None:
        """Set the scores below which nothing is reported ("none of these").

        Args:
            threshold: of all classes, in the unit of the model's scores; None: the model's own.
            classes: thresholds of single classes, by name, or as ``NAME=0.3``.

        Raises:
            ValueError: If a name is not a class, or a value is not in 0..1.
        """
        names = self.metadata.get("thing_classes") or self.metadata.get("stuff_classes")
        self._thresholds = class_thresholds(names, threshold, classes)

    def predict(
        self, source: Source, *, kind: str = "", batch_size: int = 1, tile: int = 0
    ) -> Prediction | list[Prediction] | Iterator[Prediction]:
        """Predict on a source of any kind.

        Args:
            source: an image: file, PIL image, array (H, W, 3) RGB, or tensor (3, H, W) RGB;
                many: a list of images, a tensor (B, 3, H, W), a folder, or a glob; or a video file.
            kind: "panoptic", "instances" or "semantic": what is drawn and listed; "": the first that the
                model has. Of a model that only labels pixels, instances are the connected areas of a class.
            batch_size: number of images in a batch.
            tile: side of tiles in pixels; images that are larger are predicted tile by tile, at their full
                resolution, and the results merged. 0: images are resized as in evaluation.

        Returns:
            A `Prediction` of an image, a list of many, or an iterator over the frames of a video, which reads
            one frame at a time.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a source is not an image, see `load_image`.
        """
        if is_video(source):
            video = Video(os.fspath(source))
            return (replace(found, frame=i) for i, found in enumerate(self.stream(video, kind, 1, tile)))
        images = expand_source(source)
        if not isinstance(images, list):
            return next(self.stream([images], kind, 1, tile))
        return list(self.stream(images, kind, batch_size, tile))

    def stream(
        self, images: Iterable[Any], kind: str = "", batch_size: int = 1, tile: int = 0
    ) -> Iterator[Prediction]:
        """Yield the prediction of each image; arguments as of `predict`. An image that fails is an error."""
        images = iter(images)
        ahead = batch_size * AHEAD if batch_size > 1 else 1
        while part := [read_pixels(image, self.max_pixels) for image in islice(images, ahead)]:
            outputs = self.predict_pixels([pixels for pixels, _ in part], tile, batch_size)
            for (pixels, name), output in zip(part, outputs, strict=True):
                if isinstance(output, Exception):
                    raise output
                yield self.wrap(pixels, output, kind, name)

    def predict_pixels(
        self, images: Sequence[npt.NDArray[np.uint8]], tile: int = 0, batch_size: int = 1
    ) -> list[Output | Exception]:
        """Predict on images (H, W, 3) uint8 RGB, in batches of one size; one that does not fit gets a
        MemoryError."""
        outputs: list[Output | Exception] = [{}] * len(images)
        large = [i for i, image in enumerate(images) if tile and max(image.shape[:2]) > tile]
        for i in large:
            outputs[i] = predict_tiles(self.__call__, images[i], tile)
        small = [i for i in range(len(images)) if i not in set(large)]
        samples = [self._load_sample(images[i]) for i in small]
        for i, output in zip(
            small, predict_buckets(self.model, samples, batch_size, self._predict_each), strict=True
        ):
            outputs[i] = output
        return outputs

    def wrap(
        self, pixels: npt.NDArray[np.uint8], output: Output, kind: str = "", source: str = ""
    ) -> Prediction:
        """Apply the thresholds to an output, derive ``kind`` if it is missing, and return the prediction."""
        if self._thresholds is not None:
            output = apply_thresholds(output, self._thresholds)
        return Prediction(pixels, complete_output(output, kind, self.metadata), self.metadata, kind, source)

    def __call__(self, image: ImageSource) -> Output:
        """Predict on one image.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is not an image, see `load_image`.
        """
        return self._predict([self._load_sample(image)])[0]

    def batch(self, images: Iterable[ImageSource], batch_size: int = 1) -> Iterator[Output | Exception]:
        """Predict on many images with a progress bar, and yield the outputs in their order.

        An image that cannot be read does not stop the others: its error is yielded instead of an output.
        Images share a batch if the model pads them to one size; eight batches are read ahead for that. The
        output of an image thus does not depend on the others. If the memory does not suffice for a batch, its
        images are predicted one by one, and those that do not fit on a GPU on the CPU; an image that does not
        fit either gets a MemoryError. On Linux, this holds for main memory too: an image that needs more than
        is available does not end the process.

        Args:
            images: any number; not all are read at once.
            batch_size: largest number of images in a batch.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        remaining = iter(images)
        total = len(images) if isinstance(images, Sized) else None
        with tqdm(total=total, desc="Predicting", unit="image", disable=None) as bar:
            while part := list(islice(remaining, batch_size * AHEAD if batch_size > 1 else 1)):
                samples = [self._load_sample_or_error(image) for image in part]
                readable = [sample for sample in samples if not isinstance(sample, Exception)]
                outputs = iter(predict_buckets(self.model, readable, batch_size, self._predict_each))
                for sample in samples:
                    yield sample if isinstance(sample, Exception) else next(outputs)
                    bar.update()

    @property
    def max_pixels(self) -> int:
        """Largest image that is read, in pixels (INPUT.MAX_PIXELS)."""
        return getattr(self._mapper, "max_pixels", MAX_PIXELS)

    @property
    def score_classes(self) -> tuple[str, ...]:
        """Names of the classes of `score_map`.

        Raises:
            ValueError: If the model's backbone has no score map.
        """
        return score_classes(self.model)

    def score_map(self, image: ImageSource) -> tuple[npt.NDArray[np.float32], tuple[str, ...]]:
        """Compute the backbone's class scores at every position of an image.

        Returns:
            Scores (K, h, w) over the whole image without its padding, and the K class names.

        Raises:
            ValueError: If the model's backbone has no score map, or the image cannot be read.
        """
        return score_maps(self.model, [self._load_sample(image)])[0], self.score_classes

    def _use_known_classes(self, run: RunConfig, stored: dict[str, Any]) -> Vocabulary | None:
        """Set the classes of the dataset or the weights; return those of an open-vocabulary model."""
        is_open = isinstance(self.model, OpenVocabularyModel)
        self.metadata = known_metadata(run, stored, prefer_stored=not is_open)
        if not is_open:
            check_head_classes(run, self.metadata, stored)
            return None
        vocabulary = Vocabulary.from_metadata(self.metadata, separator="," if run.split_names else None)
        vocabulary = add_synonyms(vocabulary) if run.synonyms else vocabulary
        self.model.set_vocabulary(vocabulary)
        return vocabulary

    def _pixels(self, image: ImageSource) -> npt.NDArray[np.uint8]:
        return load_image(image, self._mapper.image_format, max_pixels=self.max_pixels)

    def _load_sample(self, image: ImageSource) -> dict[str, Any]:
        return map_image(self._mapper, self._pixels(image))

    def _load_sample_or_error(self, image: ImageSource) -> dict[str, Any] | Exception:
        try:
            return self._load_sample(image)
        except Exception as error:
            if is_out_of_memory(error):
                return describe_out_of_memory()
            if isinstance(error, (OSError, ValueError)):
                return error
            raise

    def _predict_each(self, samples: list[dict[str, Any]]) -> list[Output | Exception]:
        """Predict on a batch, in smaller pieces if the memory does not suffice."""
        outputs = self._predict_if_it_fits(samples)
        if outputs is not None:
            return list(outputs)
        if len(samples) > 1:
            return [output for sample in samples for output in self._predict_each([sample])]
        device = next(self.model.parameters()).device
        if device.type != "cpu":
            logger.warning("An image does not fit on %s; it is predicted on the CPU.", device)
            self.model.to("cpu")
            try:
                outputs = self._predict_if_it_fits(samples)
            finally:
                self.model.to(device)
        return [describe_out_of_memory(samples[0])] if outputs is None else list(outputs)

    def _predict_if_it_fits(self, samples: list[dict[str, Any]]) -> list[Output] | None:
        try:
            on_cpu = next(self.model.parameters()).device.type == "cpu"
            with within_memory(available_memory() if on_cpu else None):
                return self._predict(samples)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _predict(self, samples: list[dict[str, Any]]) -> list[Output]:
        if not samples:
            return []
        # not inference_mode: callers may want to change the outputs in place
        with torch.no_grad(), flush_denormals():
            outputs: list[Output] = run_model(self.model, samples, self._precision)
            if self._num_classes is not None:
                outputs = [remove_background(output, self._num_classes) for output in outputs]
        if self.score_threshold is not None:
            for output in outputs:
                if "instances" in output:
                    instances = output["instances"]
                    output["instances"] = instances[instances.scores >= self.score_threshold]
        return outputs


def _load(config: Any, weights: str | os.PathLike[str] | None, opts: list[str]) -> LoadedConfig:
    """Load the config with all overrides and the keys that the weights need."""
    path = os.fspath(config) if isinstance(config, (str, os.PathLike)) else ""
    explicit: Iterable[str] = ()
    if isinstance(config, LoadedConfig):
        config, explicit = config.cfg, config.explicit
    elif isinstance(config, CfgNode):
        defaults = get_cfg()
        add_clipdense_config(defaults)
        explicit = [k for k in config_keys(config) if config_value(config, k) != config_value(defaults, k)]
    weights = None if weights is None else os.fspath(weights)
    if path:
        return read_config(path, opts, weights)
    config = copy.deepcopy(config)
    if isinstance(config, CfgNode):
        config.defrost()
    return complete_config(config, opts, explicit, weights)


def _prepare(run: RunConfig, loaded: LoadedConfig, device: str | None, output: str | None) -> None:
    """Set the device and the output, and check the classes of the datasets against those of the weights."""
    run.device = device or available_device(run.device)
    architecture = _architecture(run)
    if isinstance(architecture, SwitchableOutputs) and output and output in architecture.output_keys:
        run.cfg.merge_from_list([architecture.output_keys[output], True])
    register_stored_classes(run, loaded.weights)
    run.freeze()
    with suppress(FileNotFoundError):  # own data are only needed for their class names, if at all
        run.register_datasets()
    check_weight_classes(run, loaded.weights)


def _architecture(run: RunConfig) -> Any:
    """Return the class of the meta-architecture; None for a LazyConfig."""
    name = config_value(run.cfg, "MODEL.META_ARCHITECTURE")
    return META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None


def _require_open_vocabulary(model: Any) -> None:
    kinds = sorted(
        name
        for name, kind in META_ARCH_REGISTRY
        if isinstance(kind, type) and issubclass(kind, OpenVocabularyModel)
    )
    try:
        require_open_vocabulary(model, ", ".join(kinds))
    except ValueError as error:
        raise ConfigError(str(error)) from error
