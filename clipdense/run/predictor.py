"""A trained model for images that belong to no data set."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from clipdense.backbone.score_map import score_classes, score_maps
from clipdense.clip.vocabulary import Vocabulary
from clipdense.data.datasets import register_from_config
from clipdense.data.image import ImageSource, load_image
from clipdense.data.mappers import build_mapper, map_image
from clipdense.engine.build import build_model, trainer_options
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.options import ConfigError
from clipdense.run.config import add_clipdense_config
from clipdense.run.setup import available_device, load_config
from clipdense.run.weights import (
    apply_weight_options,
    check_weight_classes,
    config_keys,
    print_weight_options,
)

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.modeling import META_ARCH_REGISTRY

__all__ = ["Predictor"]

_CLASSES = ("thing_classes", "stuff_classes")

Output = dict[str, Any]
Words = Vocabulary | str | Path | Sequence[str | Sequence[str]]


class Predictor:
    """A model with its weights, built once, that takes images as they come.

    An image is a file, a PIL image of any mode, or an array (see `clipdense.data.image.load_image`); it is
    resized as in evaluation. An open-vocabulary model looks for the classes of the test set, or for any
    others (see `set_vocabulary`). An output is what Detectron2's models give for an image, in pixels of the
    (upright) original: ``instances`` and, from models that have them, ``sem_seg`` (or ``sem_seg_labels``) and
    ``panoptic_seg``.

    A model that compares words calls everything the word that fits best, a single one anything at all.
    Background words are what it may call the rest: where one of them wins, a map has nothing (``sem_seg``
    is 0 for all classes, ``sem_seg_labels`` -1, the segment id 0); instances of them are left out.

    Attributes:
        cfg: the config, overrides included.
        model: in evaluation mode.
        metadata: of the test set, with the classes that the weights were trained for where they note them; or
            with those of the vocabulary that was given.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | Any,
        weights: str | os.PathLike[str] | None = None,
        opts: Iterable[object] = (),
        device: str | None = None,
        score_threshold: float | None = None,
        vocabulary: Words | None = None,
        background: Words | None = None,
    ) -> None:
        """
        Args:
            config: a file (.yaml, or .py for a LazyConfig), also one of the package's configs; or a config
                object, which is left as it is.
            weights: weight file; default ``MODEL.WEIGHTS`` (``train.init_checkpoint``). Config keys that it
                needs are set, where the config says nothing else.
            opts: overrides, KEY VALUE pairs (``key=value`` words for a LazyConfig).
            device: default the config's, or the CPU where that is a GPU and there is none.
            score_threshold: instances below it are left out, 0..1; None for the model's own threshold.
            vocabulary: what an open-vocabulary model looks for, see `set_vocabulary`; None for the classes of
                the test set.
            background: what it may call anything else, see `set_vocabulary`.

        Raises:
            ConfigError: the config is wrong, names no weights or no classes, or other classes than published
                weights; its mapper cannot take an image; or a vocabulary is given to a model that cannot
                change its own.
            FileNotFoundError: no such weights.
            CheckpointError: they do not fit the model, or lack some of it.
        """
        self.cfg = _configure(config, weights, [str(word) for word in opts], device)
        self.score_threshold = score_threshold
        options = trainer_options(self.cfg)
        if not options.weights:
            raise ConfigError(
                "no trained weights are named: give e.g. MODEL.WEIGHTS output/demo/model_final.pth (in a "
                "LazyConfig train.init_checkpoint=...)"
            )
        self._mapper = _build_mapper(self.cfg)
        words = None if vocabulary is None else Vocabulary.parse(vocabulary)
        self._classes: int | None = None
        self.model: Any = build_model(self.cfg).eval()
        if words is not None or background is not None:
            _check_open(self.model)
        checkpointer = TrainingCheckpointer(self.model, "", options.weights_skip, options.allow_pickle)
        noted = checkpointer.load_weights(options.weights, complete=True).get("metadata", {})
        if words is None:
            known = self._take_known_classes({**options.metadata, **noted})
            words = None if background is None else known
        if words is not None:
            self.set_vocabulary(words, background)

    def set_vocabulary(self, vocabulary: Words, background: Words | None = None) -> None:
        """Let an open-vocabulary model look for other classes from now on; `metadata` then names them.

        Nothing is built anew, and text is encoded for names that have not been seen yet only.

        Args:
            vocabulary: what `Vocabulary.parse` takes: "cat|kitten, red car" (bars part synonyms), the path of
                a class-list file (.txt, .json), a list of names, or a `Vocabulary`. Where it does not say
                which classes are things, all are.
            background: words likewise that stand for anything else and are left out of outputs.

        Raises:
            ConfigError: the model's vocabulary is closed.
            FileNotFoundError, ValueError: no such file, or no vocabulary; or a name that the model cannot
                embed. The vocabulary stays as it was.
        """
        vocabulary = Vocabulary.parse(vocabulary)
        _check_open(self.model)
        vocabulary = replace(vocabulary, thing=vocabulary.thing or (True,) * len(vocabulary))
        names = list(vocabulary.names)
        things = [i for i, thing in enumerate(vocabulary.thing or ()) if thing]
        self.model.set_vocabulary(vocabulary if background is None else _joined(vocabulary, background))
        self._classes = None if background is None else len(names)
        self.metadata = Metadata(
            thing_classes=names,
            # as in Detectron2's standard panoptic metadata: both lists name every class
            stuff_classes=names,
            thing_dataset_id_to_contiguous_id={i: i for i in things},
        )

    def __call__(self, image: ImageSource) -> Output:
        """Output for one image.

        Raises:
            FileNotFoundError, BadImageError, ValueError: it cannot be read (see `load_image`).
        """
        return self._predict([self._sample(image)])[0]

    def batch(self, images: Iterable[ImageSource], batch_size: int = 1) -> Iterator[Output | Exception]:
        """Outputs for many images, one by one, in their order, with a progress bar.

        An image that cannot be read does not stop the others: the error comes in its output's place. Images
        that share a batch are padded to one size, which changes scores a little.

        Args:
            images: read when their turn comes.
            batch_size: images at once.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        remaining = iter(images)
        total = len(images) if isinstance(images, Sized) else None
        with tqdm(total=total, desc="Predicting", unit="image", disable=None) as bar:
            while part := list(islice(remaining, batch_size)):
                samples = [self._sample_or_error(image) for image in part]
                outputs = iter(self._predict([s for s in samples if not isinstance(s, Exception)]))
                for sample in samples:
                    yield sample if isinstance(sample, Exception) else next(outputs)
                    bar.update()

    @property
    def score_classes(self) -> tuple[str, ...]:
        """Classes of `score_map`.

        Raises:
            ValueError: the model's backbone gives no score map.
        """
        return score_classes(self.model)

    def score_map(self, image: ImageSource) -> tuple[npt.NDArray[np.float32], tuple[str, ...]]:
        """The backbone's class scores at every position of an image.

        Returns:
            (K, h, w) over the whole image, without the padding, and the K names.

        Raises:
            ValueError: the model's backbone gives no score map.
            FileNotFoundError, BadImageError, ValueError: the image cannot be read.
        """
        return score_maps(self.model, [self._sample(image)])[0], self.score_classes

    def _take_known_classes(self, noted: dict[str, Any]) -> Vocabulary | None:
        """The classes that data sets and weights name; returned as what an open-vocabulary model was told."""
        is_open = _is_open(self.model)
        self.metadata = _metadata(self.cfg, noted, trained_first=not is_open)
        if not is_open:
            return None
        split = not isinstance(self.cfg, CfgNode) or self.cfg.DATASETS.SPLIT_NAMES
        vocabulary = Vocabulary.from_metadata(self.metadata, separator="," if split else None)
        self.model.set_vocabulary(vocabulary)
        return vocabulary

    def _sample(self, image: ImageSource) -> dict[str, Any]:
        return map_image(self._mapper, load_image(image, self._mapper.image_format))

    def _sample_or_error(self, image: ImageSource) -> dict[str, Any] | Exception:
        try:
            return self._sample(image)
        except (OSError, ValueError) as error:
            return error

    def _predict(self, samples: list[dict[str, Any]]) -> list[Output]:
        if not samples:
            return []
        # not inference_mode: who gets a box may want to change it in place
        with torch.no_grad():
            outputs: list[Output] = self.model(samples)
            if self._classes is not None:
                outputs = [_without_background(output, self._classes) for output in outputs]
        if self.score_threshold is not None:
            for output in outputs:
                if "instances" in output:
                    instances = output["instances"]
                    output["instances"] = instances[instances.scores >= self.score_threshold]
        return outputs


def _configure(config: Any, weights: Any, opts: list[str], device: str | None) -> Any:
    """The config with everything in it that the arguments say, and the keys that the weights need."""
    yacs = ["MODEL.WEIGHTS", os.fspath(weights)] if weights is not None else []
    if isinstance(config, CfgNode):
        cfg = config.clone()
        cfg.defrost()
        cfg.merge_from_list([*opts, *yacs])
        defaults = get_cfg()
        add_clipdense_config(defaults)
        # of an object, what differs from its default has been set
        explicit = {key for key in config_keys(cfg) if _value(cfg, key) != _value(defaults, key)}
        apply_weight_options(cfg, explicit | set(opts[::2]))
    elif not isinstance(config, (str, os.PathLike)):
        cfg = LazyConfig.apply_overrides(copy.deepcopy(config), opts)
    else:
        path = os.fspath(config)
        cfg = load_config(path, opts if path.endswith(".py") else [*opts, *yacs])
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device or available_device(cfg.MODEL.DEVICE)
        cfg.freeze()
        with suppress(FileNotFoundError):  # of own data, the class names are needed at most
            register_from_config(cfg)
        check_weight_classes(cfg)
    else:
        cfg.train.device = device or available_device(cfg.train.device)
        if weights is not None:
            cfg.train.init_checkpoint = os.fspath(weights)
            print_weight_options(cfg.train.init_checkpoint, cfg.train.get("allow_pickle", False))
    return cfg


def _value(cfg: CfgNode, key: str) -> Any:
    """What a full key says; an empty dict where it is not there."""
    node: Any = cfg
    for part in key.split("."):
        node = node.get(part, {})
    return node


def _build_mapper(cfg: Any) -> Any:
    """The mapper of evaluation, whose augmentations and image format are used."""
    if isinstance(cfg, CfgNode):
        name, mapper = f"INPUT.MAPPER {cfg.INPUT.MAPPER}", build_mapper(cfg, False)
    else:
        name, node = "dataloader.test.mapper", cfg.get("dataloader", {}).get("test", {}).get("mapper")
        mapper = None if node is None else instantiate(node)
    if not (hasattr(mapper, "augmentations") and hasattr(mapper, "image_format")):
        raise ConfigError(
            f"{name} is no mapper with augmentations and an image format, such as DetectionMapper or "
            "Detectron2's DatasetMapper: how images are resized is not known"
        )
    return mapper


def _joined(vocabulary: Vocabulary, background: Words) -> Vocabulary:
    """The classes, and after them those of the background, which are stuff."""
    words = Vocabulary.parse(background)
    base, thing = vocabulary.base, vocabulary.thing or ()
    rest = (False,) * len(words)
    return Vocabulary(vocabulary.synonyms + words.synonyms, base and base + rest, thing + rest)


def _without_background(output: Output, classes: int) -> Output:
    """An output of the first so many classes, with nothing where a later one won."""
    output = dict(output)
    if "instances" in output:
        output["instances"] = output["instances"][output["instances"].pred_classes < classes]
    if "sem_seg" in output:
        scores = output["sem_seg"]
        output["sem_seg"] = scores[:classes] * (scores.argmax(dim=0) < classes)
    if "sem_seg_labels" in output:
        labels = output["sem_seg_labels"]
        output["sem_seg_labels"] = labels.where(labels < classes, -1)
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        kept = [segment for segment in segments if segment["category_id"] < classes]
        known = torch.isin(ids, ids.new_tensor([segment["id"] for segment in kept]))
        output["panoptic_seg"] = ids * known, kept
    return output


def _is_open(model: Any) -> bool:
    return hasattr(model, "set_vocabulary")


def _check_open(model: Any) -> None:
    if not _is_open(model):
        able = ", ".join(sorted(name for name, kind in META_ARCH_REGISTRY if _is_open(kind)))
        raise ConfigError(
            f"{type(model).__name__} has a closed vocabulary: it was trained to tell a fixed list of classes "
            f"apart, and cannot look for others. Leave the vocabulary out, or use an open-vocabulary model "
            f"({able or 'none is registered'})."
        )


def _metadata(cfg: Any, noted: dict[str, Any], trained_first: bool) -> Metadata:
    """Metadata of the first data set that names classes, with the classes that the weights note.

    Args:
        trained_first: take the weights' classes where the data set names others; else the data set's.
    """
    names: Sequence[str]
    if isinstance(cfg, CfgNode):
        names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    else:
        node = cfg.dataloader.test.get("dataset", {}).get("names", ())
        names = [node] if isinstance(node, str) else list(node)
    entries = [MetadataCatalog.get(name).as_dict() for name in names if name in MetadataCatalog.list()]
    known: dict[str, Any] = next(
        (entry for entry in entries if any(entry.get(kind) for kind in _CLASSES)), {}
    )
    if trained_first or not known:
        known |= {kind: list(noted[kind]) for kind in _CLASSES if noted.get(kind)}
    if not any(known.get(kind) for kind in _CLASSES):
        raise ConfigError(
            f"no class names: neither the weights nor the data sets ({', '.join(names) or 'none is named'}) "
            "list any. Register the data set that the model was trained on (DATASETS.COCO_JSON), or, in a "
            "LazyConfig, set train.metadata.thing_classes; an open-vocabulary model takes a vocabulary."
        )
    return Metadata(**known)
