"""Prediction on single images with a trained model."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from clipdense.backbone.score_map import score_classes, score_maps
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.heads import head_classes
from clipdense.data.image import MAX_PIXELS, ImageSource, load_image
from clipdense.data.mappers import map_image
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.denormals import flush_denormals
from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import RunConfig, run_config
from clipdense.open_vocabulary import (
    CompleteWithoutWeights,
    OpenVocabularyModel,
    require_open_vocabulary,
)
from clipdense.run.config import add_clipdense_config
from clipdense.run.keys import config_keys, config_value
from clipdense.run.memory import (
    available_memory,
    describe_out_of_memory,
    is_out_of_memory,
    within_memory,
)
from clipdense.run.setup import LoadedConfig, available_device, complete_config, read_config
from clipdense.run.weights import check_weight_classes

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["Predictor", "SwitchableOutputs", "remove_background"]

logger = logging.getLogger(__name__)

_CLASS_LISTS = ("thing_classes", "stuff_classes")

Output = dict[str, Any]
VocabularyLike = Vocabulary | str | Path | Sequence[str | Sequence[str]]


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
        self.model: Any = run.build_model().eval()
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

    def set_vocabulary(self, vocabulary: VocabularyLike, background: VocabularyLike | None = None) -> None:
        """Set the classes that an open-vocabulary model predicts, and the class names of `metadata`.

        The model is not rebuilt; only names that are new to it are encoded.

        Args:
            vocabulary: argument of `Vocabulary.parse`: "cat|kitten, red car" (bars separate synonyms), the
                path of a class-list file (.txt, .json), a list of names, or a `Vocabulary`. All classes are
                things unless it tells things from stuff.
            background: further classes, which are removed from outputs; same forms as ``vocabulary``.

        Raises:
            ConfigError: If the model has a closed vocabulary.
            FileNotFoundError: If a class-list file does not exist.
            ValueError: If it is not a vocabulary, or the model cannot embed a name. The previous vocabulary
                stays.
        """
        vocabulary = Vocabulary.parse(vocabulary)
        _require_open_vocabulary(self.model)
        vocabulary = replace(vocabulary, thing=vocabulary.thing or (True,) * len(vocabulary))
        names = list(vocabulary.names)
        things = [i for i, thing in enumerate(vocabulary.thing or ()) if thing]
        self.model.set_vocabulary(vocabulary if background is None else _append(vocabulary, background))
        self._num_classes = None if background is None else len(names)
        self.metadata = Metadata(
            thing_classes=names,
            # as in Detectron2's panoptic metadata, both lists name every class
            stuff_classes=names,
            thing_dataset_id_to_contiguous_id={i: i for i in things},
        )

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
        Images of a batch are padded to one size, which changes their scores slightly. If the memory does not
        suffice for a batch, its images are predicted one by one, and those that do not fit on a GPU on the
        CPU; an image that does not fit either gets a MemoryError. On Linux, this holds for main memory too:
        an image that needs more than is available does not end the process.

        Args:
            images: read one batch at a time.
            batch_size: number of images in a batch.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        remaining = iter(images)
        total = len(images) if isinstance(images, Sized) else None
        with tqdm(total=total, desc="Predicting", unit="image", disable=None) as bar:
            while part := list(islice(remaining, batch_size)):
                samples = [self._load_sample_or_error(image) for image in part]
                outputs = iter(self._predict_each([s for s in samples if not isinstance(s, Exception)]))
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
        self.metadata = _metadata(run, stored, prefer_stored=not is_open)
        if not is_open:
            _check_head_classes(run, self.metadata, stored)
            return None
        vocabulary = Vocabulary.from_metadata(self.metadata, separator="," if run.split_names else None)
        self.model.set_vocabulary(vocabulary)
        return vocabulary

    def _load_sample(self, image: ImageSource) -> dict[str, Any]:
        pixels = load_image(image, self._mapper.image_format, max_pixels=self.max_pixels)
        return map_image(self._mapper, pixels)

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
            outputs: list[Output] = self.model(samples)
            if self._num_classes is not None:
                outputs = [remove_background(output, self._num_classes) for output in outputs]
        if self.score_threshold is not None:
            for output in outputs:
                if "instances" in output:
                    instances = output["instances"]
                    output["instances"] = instances[instances.scores >= self.score_threshold]
        return outputs


def remove_background(output: Output, num_classes: int) -> Output:
    """Remove the classes after the first ``num_classes`` from an output.

    Args:
        output: output of a model for one image, with background classes last. It is not changed.
        num_classes: number of classes to keep.

    Returns:
        The output without background classes: ``sem_seg`` is 0 where one had the highest score,
        ``sem_seg_labels`` -1, the segment id 0; their instances and segments are gone.
    """
    output = dict(output)
    if "instances" in output:
        output["instances"] = output["instances"][output["instances"].pred_classes < num_classes]
    if "sem_seg" in output:
        scores = output["sem_seg"]
        output["sem_seg"] = scores[:num_classes] * (scores.argmax(dim=0) < num_classes)
    if "sem_seg_labels" in output:
        labels = output["sem_seg_labels"]
        output["sem_seg_labels"] = labels.where(labels < num_classes, -1)
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        kept = [segment for segment in segments if segment["category_id"] < num_classes]
        known = torch.isin(ids, ids.new_tensor([segment["id"] for segment in kept]))
        output["panoptic_seg"] = ids * known, kept
    return output


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
    run.freeze()
    with suppress(FileNotFoundError):  # own data are only needed for their class names, if at all
        run.register_datasets()
    check_weight_classes(run, loaded.weights)


def _architecture(run: RunConfig) -> Any:
    """Return the class of the meta-architecture; None for a LazyConfig."""
    name = config_value(run.cfg, "MODEL.META_ARCHITECTURE")
    return META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None


def _append(vocabulary: Vocabulary, background: VocabularyLike) -> Vocabulary:
    """Append background classes to a vocabulary, as stuff."""
    further = Vocabulary.parse(background)
    base, thing = vocabulary.base, vocabulary.thing or ()
    rest = (False,) * len(further)
    return Vocabulary(vocabulary.synonyms + further.synonyms, base and base + rest, thing + rest)


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


def _check_head_classes(run: RunConfig, metadata: Metadata, stored: dict[str, Any]) -> None:
    """Check that a closed-vocabulary head has as many classes as there are names from the dataset."""
    if not isinstance(run.cfg, CfgNode):
        return
    for head in head_classes(run.cfg):
        names, count = metadata.get(f"{head.kind}_classes"), config_value(run.cfg, head.key)
        # panoptic metadata list every class as a thing too
        panoptic = bool(metadata.get("thing_classes") and metadata.get("stuff_classes"))
        if names and not stored.get(f"{head.kind}_classes") and not panoptic and len(names) != count:
            raise ConfigError(
                f"{head.key} = {count}, but the dataset names {len(names)} classes "
                f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}): name the dataset that the "
                "model was trained on in DATASETS.TEST"
            )


def _metadata(run: RunConfig, stored: dict[str, Any], prefer_stored: bool) -> Metadata:
    """Return the metadata of the first dataset that names classes, completed by the classes of the weights.

    Args:
        run: settings of the run.
        stored: metadata in the weight file.
        prefer_stored: whether the classes of the weights replace those of the dataset.
    """
    names = run.dataset_names
    entries = [MetadataCatalog.get(name).as_dict() for name in names if name in MetadataCatalog.list()]
    known: dict[str, Any] = next((e for e in entries if any(e.get(kind) for kind in _CLASS_LISTS)), {})
    if prefer_stored or not known:
        known |= {kind: list(stored[kind]) for kind in _CLASS_LISTS if stored.get(kind)}
    if not any(known.get(kind) for kind in _CLASS_LISTS):
        raise ConfigError(
            f"no class names: neither the weights nor the datasets ({', '.join(names) or 'none is named'}) "
            "list any. Register the dataset that the model was trained on (DATASETS.COCO_JSON), set "
            "train.metadata.thing_classes in a LazyConfig, or give a vocabulary to an open-vocabulary model."
        )
    return Metadata(**known)
