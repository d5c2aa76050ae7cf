"""What every run has, whether its settings come from a yacs config or a LazyConfig."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from clipdense.data.checks import dataset_classes
from clipdense.data.heads import HeadClasses
from clipdense.data.trained_classes import class_mapping
from clipdense.engine.device import prepare_model
from clipdense.engine.options import ConfigError, TrainerOptions

from detectron2.data import MetadataCatalog

__all__ = ["Key", "RunConfig", "check_mapper", "map_by_name", "training_classes"]

logger = logging.getLogger(__name__)


class Key:
    """Attribute of a `RunConfig` that reads and writes one config key.

    Args:
        name: full name of the key.
        default: value if the config lacks the key.
    """

    def __init__(self, name: str, default: Any = None) -> None:
        *self.parents, self.last = name.split(".")
        self.default = default

    def __get__(self, owner: "RunConfig", kind: type) -> Any:
        return self._node(owner).get(self.last, self.default)

    def __set__(self, owner: "RunConfig", value: Any) -> None:
        self._node(owner)[self.last] = value

    def _node(self, owner: "RunConfig") -> Any:
        node = owner.cfg
        for part in self.parents:
            node = node[part]
        return node


class RunConfig(ABC):
    """Settings of a run. Its attributes read and write the config that it wraps.

    Attributes:
        cfg: the yacs config or the LazyConfig.
        weights: path of the weight file; "" for none.
        weights_key: name of that setting, for messages.
        allow_pickle: whether a weight file may be a pickle.
        device: name of the device.
        output_dir: folder to which the run writes.
        seed: random seed; negative to draw one.
        language_classes: class names of a language backbone, as the config or the weights list them.
        rank_timeout: seconds without a sign of life of a process after which the run ends; 0 for never.
        cudnn_benchmark: whether cuDNN chooses its algorithms by timing them.
        split_names: whether commas in class names separate synonyms.
        synonyms: whether classes of standard datasets have more names, see `add_synonyms`.
        precision: data type of autocast in evaluation and prediction, see `clipdense.engine.device`.
        channels_last: whether convolutions work in channels-last order.
        compiled: names of the submodules to compile.
        compile_mode: mode of `torch.compile`.
    """

    weights: Any
    weights_key: str
    allow_pickle: Any
    device: Any
    output_dir: Any
    seed: Any
    language_classes: Any
    rank_timeout: Any
    cudnn_benchmark: Any
    split_names: Any
    synonyms: Any
    precision: Any
    channels_last: Any
    compiled: Any
    compile_mode: Any

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def prepare(self, model: nn.Module) -> nn.Module:
        """Set memory format and compilation of a model; see `clipdense.engine.device.prepare_model`."""
        return prepare_model(model, self.channels_last, self.compiled, self.compile_mode)

    @property
    def language_kind(self) -> str:
        """Kind of the classes of a language backbone: "thing" or "stuff"."""
        return "thing"

    @property
    @abstractmethod
    def dataset_names(self) -> list[str]:
        """Names of the test datasets, then of the training datasets."""

    @abstractmethod
    def register_datasets(self) -> None:
        """Register the user's own datasets that the config lists.

        Raises:
            ValueError: If an entry is malformed.
            FileNotFoundError: If a file of a dataset does not exist.
        """

    @abstractmethod
    def check_datasets(self, training: bool) -> list[str]:
        """Check the files of the datasets, and that they can be evaluated.

        Args:
            training: whether the run trains.

        Returns:
            Messages about what was repaired or noticed in the files, for the log.

        Raises:
            ValueError: If a dataset or its evaluator is unknown, or a file has a fault.
            FileNotFoundError: If a file is missing.
        """

    @abstractmethod
    def check_classes(self) -> None:
        """Check that the model can be trained on the classes of the datasets.

        Raises:
            ValueError: If the classes differ between datasets, or from the model's.
        """

    @abstractmethod
    def class_names(self) -> list[str]:
        """Return the class names that the datasets share; empty if they are not known."""

    @abstractmethod
    def class_mappings(self, metadata: Mapping[str, Any], source: str) -> dict[str, list[int]]:
        """Compare the classes of a weight file with those of each test dataset.

        Args:
            metadata: of the weight file, see `clipdense.data.trained_classes`.
            source: name of the file, for errors.

        Returns:
            Test dataset -> class of the dataset for each class of the model, if the order differs.

        Raises:
            ConfigError: If the names differ, or outputs cannot be mapped.
        """

    @abstractmethod
    def build_model(self, fetch_weights: bool = True) -> nn.Module:
        """Build the model on its device, without loading the weight file of the run.

        Args:
            fetch_weights: False builds the backbone without downloading the weights with which it starts.
        """

    @abstractmethod
    def build_test_mapper(self) -> Any:
        """Build the mapper that prepares images for evaluation.

        Raises:
            ConfigError: If it has no augmentations and no image format.
        """

    @abstractmethod
    def evaluate(
        self, model: nn.Module, final: bool = True, mappings: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Any]:
        """Evaluate the model on the test datasets.

        Args:
            model: left in evaluation mode.
            final: whether to draw pictures of the predictions as well.
            mappings: result of `class_mappings`.

        Returns:
            Nested dict of metrics; empty except in the main process.
        """

    @abstractmethod
    def options(self) -> TrainerOptions:
        """Return the trainer's options, without the classes of the training data."""

    @abstractmethod
    def trainer_arguments(self, fetch_weights: bool = True) -> dict[str, Any]:
        """Build the arguments of `clipdense.engine.trainer.Trainer`.

        Args:
            fetch_weights: see `build_model`.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the config as YAML."""

    @abstractmethod
    def freeze(self) -> None:
        """Make the config read-only, if it can be."""

    @abstractmethod
    def verify(self, results: dict[str, float]) -> None:
        """End the program with an error if metrics differ from the expected ones that the config lists.

        Args:
            results: flattened metrics; empty ones are not checked.
        """


def check_mapper(name: str, mapper: Any) -> Any:
    """Return a mapper, if it has what resizing single images needs; else raise a ConfigError."""
    if hasattr(mapper, "augmentations") and hasattr(mapper, "image_format"):
        return mapper
    raise ConfigError(
        f"{name} has no augmentations or no image format, so images cannot be resized as in evaluation. Use "
        "DetectionMapper, Detectron2's DatasetMapper, or another mapper with both attributes."
    )


def map_by_name(
    heads: Sequence[tuple[HeadClasses, int | None]] | None,
    metadata: Mapping[str, Any],
    datasets: Iterable[str],
    source: str,
) -> dict[str, list[int]]:
    """Compare the classes of a weight file with those of test datasets, see `RunConfig.class_mappings`.

    Args:
        heads: closed-vocabulary heads and the numbers of their classes, see `class_mapping`.
        metadata: of the weight file.
        datasets: registered names.
        source: the weight file, for messages.
    """
    try:
        found = {name: class_mapping(heads, metadata, name, source) for name in datasets}
    except ValueError as e:
        raise ConfigError(str(e)) from e
    mappings = {name: mapping for name, mapping in found.items() if mapping is not None}
    for name in mappings:
        logger.info("%s: mapping the classes of %s by name; their order differs", name, source)
    return mappings


def training_classes(names: Iterable[str]) -> dict[str, Any]:
    """Return the training datasets and their class names, which checkpoints store."""
    names = list(names)
    found: dict[str, Any] = {"datasets": names}
    for kind in ("thing", "stuff") if names else ():
        classes = MetadataCatalog.get(names[0]).get(f"{kind}_classes") or dataset_classes(names[0], kind)
        if classes:
            found[f"{kind}_classes"] = list(classes)
    return found
