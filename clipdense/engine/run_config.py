"""One view of the settings of a run, whether they come from a yacs config or a LazyConfig."""

import inspect
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from clipdense.data.checks import check_classes
from clipdense.data.classes import class_names
from clipdense.data.datasets.own import register_from_config
from clipdense.data.loader import build_train_loader
from clipdense.data.mappers import build_mapper
from clipdense.data.trained_classes import class_mapping
from clipdense.data.validation import check_datasets
from clipdense.engine.distributed import convert_sync_batchnorm
from clipdense.engine.evaluate import evaluate_datasets, run_inference
from clipdense.engine.mask_loss import leave_out_objects_without_mask
from clipdense.engine.optimizer import build_optimizer
from clipdense.engine.options import ConfigError, TrainerOptions
from clipdense.engine.schedule import build_schedule
from clipdense.evaluation import EVALUATOR_REGISTRY
from clipdense.files import write_text

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import verify_results
from detectron2.modeling import build_backbone, build_model
from detectron2.utils import comm
from detectron2.utils.registry import locate

__all__ = ["LazyRunConfig", "RunConfig", "YacsRunConfig", "run_config"]

logger = logging.getLogger(__name__)

_UNSUPPORTED = {
    "PRECISE_BN": "use SOLVER.EMA_DECAY, which averages weights and norm statistics",
    "AUG": "wrap the trained model in Detectron2's GeneralizedRCNNWithTTA",
}


class _Key:
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

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

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
        """Check the files of the datasets, that they can be evaluated, and that the model can be trained on
        their classes.

        Args:
            training: whether the run trains.

        Returns:
            Messages about what was repaired or noticed in the files, for the log.

        Raises:
            ValueError: If a file has a fault, the classes differ between datasets or from the model's, or an
                evaluator is unknown.
            FileNotFoundError: If a file is missing.
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
    def build_model(self) -> nn.Module:
        """Build the model on its device, without loading weights."""

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
    def trainer_arguments(self) -> dict[str, Any]:
        """Build the arguments of `clipdense.engine.trainer.Trainer`."""

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


class YacsRunConfig(RunConfig):
    """Settings from a yacs config."""

    weights_key = "MODEL.WEIGHTS"
    weights = _Key("MODEL.WEIGHTS")
    allow_pickle = _Key("MODEL.ALLOW_PICKLE")
    device = _Key("MODEL.DEVICE")
    output_dir = _Key("OUTPUT_DIR")
    seed = _Key("SEED")
    language_classes = _Key("MODEL.LANGUAGE.CLASSES")
    rank_timeout = _Key("SOLVER.RANK_TIMEOUT")
    cudnn_benchmark = _Key("CUDNN_BENCHMARK")
    split_names = _Key("DATASETS.SPLIT_NAMES")

    @property
    def dataset_names(self) -> list[str]:
        """See `RunConfig.dataset_names`."""
        return [*self.cfg.DATASETS.TEST, *self.cfg.DATASETS.TRAIN]

    def register_datasets(self) -> None:
        """See `RunConfig.register_datasets`."""
        register_from_config(self.cfg)

    def check_datasets(self, training: bool) -> list[str]:
        """See `RunConfig.check_datasets`."""
        if training:
            check_classes(self.cfg)
        for name in self.cfg.DATASETS.TEST:
            kind = MetadataCatalog.get(name).get("evaluator_type")
            if kind not in EVALUATOR_REGISTRY:
                known = ", ".join(sorted(key for key, _ in EVALUATOR_REGISTRY))
                raise ConfigError(
                    f"dataset {name} has evaluator_type {kind!r} in its metadata; known types are {known}"
                )
        return check_datasets(
            self.cfg.DATASETS.TEST,
            training=self.cfg.DATASETS.TRAIN if training else (),
            masks=self.cfg.MODEL.MASK_ON,
            objects_required=self.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        )

    def class_names(self) -> list[str]:
        """See `RunConfig.class_names`."""
        return class_names(self.cfg, self.cfg.MODEL.LANGUAGE.CLASSES_FROM) if self.dataset_names else []

    def class_mappings(self, metadata: Mapping[str, Any], source: str) -> dict[str, list[int]]:
        """See `RunConfig.class_mappings`."""
        names = self.cfg.DATASETS.TEST
        try:
            mappings = {name: class_mapping(self.cfg, metadata, name, source) for name in names}
        except ValueError as e:
            raise ConfigError(str(e)) from e
        for name in (name for name in names if mappings[name] is not None):
            logger.info("%s: mapping the classes of %s by name; their order differs", name, source)
        return {name: mapping for name, mapping in mappings.items() if mapping is not None}

    def build_model(self) -> nn.Module:
        """See `RunConfig.build_model`."""
        try:
            model = build_model(self.cfg)
        except KeyError as error:
            raise _feature_error(self.cfg, error) from error
        return convert_sync_batchnorm(model) if self.cfg.MODEL.SYNC_BN else model

    def build_test_mapper(self) -> Any:
        """See `RunConfig.build_test_mapper`."""
        return _check_mapper(f"INPUT.MAPPER {self.cfg.INPUT.MAPPER}", build_mapper(self.cfg, False))

    def evaluate(
        self, model: nn.Module, final: bool = True, mappings: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Any]:
        """See `RunConfig.evaluate`."""
        return evaluate_datasets(self.cfg, model, final, mappings)

    def options(self) -> TrainerOptions:
        """See `RunConfig.options`."""
        return TrainerOptions.from_config(self.cfg, {})

    def trainer_arguments(self) -> dict[str, Any]:
        """See `RunConfig.trainer_arguments`."""
        cfg = DefaultTrainer.auto_scale_workers(self.cfg, comm.get_world_size()).clone()
        cfg.defrost()
        if cfg.SEED < 0:
            cfg.SEED = comm.shared_random_seed()
        cfg.freeze()
        for key, remedy in _UNSUPPORTED.items():
            if cfg.TEST[key].ENABLED:
                raise ConfigError(f"TEST.{key} is not supported here; {remedy}")
        run = YacsRunConfig(cfg)
        model = run.build_model()
        return {
            "optimizer": build_optimizer(cfg, model),
            "model": model,
            "schedule": build_schedule(cfg),
            "train_loader": partial(
                build_train_loader, cfg, seed=cfg.SEED, masks_optional=leave_out_objects_without_mask(model)
            ),
            "evaluate": run.evaluate if cfg.DATASETS.TEST else None,
            "options": TrainerOptions.from_config(cfg, _training_classes(cfg.DATASETS.TRAIN)),
        }

    def save(self, path: Path) -> None:
        """See `RunConfig.save`."""
        write_text(path, self.cfg.dump())

    def freeze(self) -> None:
        """See `RunConfig.freeze`."""
        self.cfg.freeze()

    def verify(self, results: dict[str, float]) -> None:
        """See `RunConfig.verify`; the expected metrics are those of ``TEST.EXPECTED_RESULTS``."""
        nested: dict[str, dict[str, float]] = {}
        for name, value in results.items():
            task, _, metric = name.rpartition("/")
            nested.setdefault(task, {})[metric] = value
        if nested:
            verify_results(self.cfg, nested)


class LazyRunConfig(RunConfig):
    """Settings from a LazyConfig with the nodes of Detectron2's: model, optimizer, lr_multiplier,
    dataloader.{train,test,evaluator} and train.

    The ``train`` node takes Detectron2's names (output_dir, init_checkpoint, max_iter, amp.enabled,
    eval_period, log_period, checkpointer.{period,max_to_keep}, ddp.find_unused_parameters, device, seed),
    ``sync_bn``, and every field of `TrainerOptions`.
    """

    weights_key = "train.init_checkpoint"
    weights = _Key("train.init_checkpoint", "")
    allow_pickle = _Key("train.allow_pickle", False)
    device = _Key("train.device")
    output_dir = _Key("train.output_dir")
    seed = _Key("train.seed", -1)
    language_classes = ()
    rank_timeout = _Key("train.rank_timeout", 20.0)
    cudnn_benchmark = _Key("train.cudnn_benchmark", False)
    split_names = True

    @property
    def dataset_names(self) -> list[str]:
        """See `RunConfig.dataset_names`; only the test dataset is known."""
        names = self.cfg.get("dataloader", {}).get("test", {}).get("dataset", {}).get("names", ())
        return [names] if isinstance(names, str) else list(names)

    def register_datasets(self) -> None:
        """Do nothing: a LazyConfig registers its datasets itself."""

    def check_datasets(self, training: bool) -> list[str]:
        """Check the files of the test dataset: a LazyConfig builds its loaders and evaluators itself."""
        return check_datasets(self.dataset_names)

    def class_names(self) -> list[str]:
        """See `RunConfig.class_names`."""
        return []

    def class_mappings(self, metadata: Mapping[str, Any], source: str) -> dict[str, list[int]]:
        """Return no mapping: a LazyConfig does not say which heads count classes."""
        return {}

    def build_model(self) -> nn.Module:
        """See `RunConfig.build_model`."""
        model = instantiate(self.cfg.model).to(self.device)
        return convert_sync_batchnorm(model) if self.cfg.train.get("sync_bn", False) else model

    def build_test_mapper(self) -> Any:
        """See `RunConfig.build_test_mapper`."""
        node = self.cfg.get("dataloader", {}).get("test", {}).get("mapper")
        return _check_mapper("dataloader.test.mapper", None if node is None else instantiate(node))

    def evaluate(
        self, model: nn.Module, final: bool = True, mappings: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Any]:
        """See `RunConfig.evaluate`; no pictures are drawn."""
        loader, evaluator = self.cfg.dataloader.test, self.cfg.dataloader.evaluator
        return run_inference(model, instantiate(loader), instantiate(evaluator))[0]

    def options(self) -> TrainerOptions:
        """See `RunConfig.options`."""
        train = self.cfg.train
        options = {
            "precision": "float16" if train.get("amp", {}).get("enabled") else "float32",
            "find_unused_parameters": train.get("ddp", {}).get("find_unused_parameters", False),
            "checkpoint_period": train.get("checkpointer", {}).get("period", 5000),
            "checkpoint_keep": train.get("checkpointer", {}).get("max_to_keep", 0),
            "weights": self.weights,
            **{name: train[name] for name in TrainerOptions.__dataclass_fields__ if name in train},
        }
        options["weights_skip"] = tuple(options.get("weights_skip", ()))
        if options.get("seed", -1) < 0:
            options["seed"] = comm.shared_random_seed()
        return TrainerOptions(**options)

    def trainer_arguments(self) -> dict[str, Any]:
        """See `RunConfig.trainer_arguments`."""
        model = self.build_model()
        self.cfg.optimizer.params.model = model
        multiplier = instantiate(self.cfg.lr_multiplier)
        return {
            "optimizer": instantiate(self.cfg.optimizer),
            "model": model,
            "schedule": lambda iteration, progress, base_lr: base_lr * multiplier(progress),
            "train_loader": partial(_lazy_train_loader, self.cfg.dataloader.train),
            "evaluate": self.evaluate if "evaluator" in self.cfg.dataloader else None,
            "options": self.options(),
        }

    def save(self, path: Path) -> None:
        """See `RunConfig.save`."""
        LazyConfig.save(self.cfg, str(path))

    def freeze(self) -> None:
        """Do nothing: a LazyConfig cannot be frozen."""

    def verify(self, results: dict[str, float]) -> None:
        """Do nothing: a LazyConfig lists no expected metrics."""


def run_config(cfg: Any) -> RunConfig:
    """Wrap a yacs config or a LazyConfig."""
    return YacsRunConfig(cfg) if isinstance(cfg, CfgNode) else LazyRunConfig(cfg)


def _check_mapper(name: str, mapper: Any) -> Any:
    if hasattr(mapper, "augmentations") and hasattr(mapper, "image_format"):
        return mapper
    raise ConfigError(
        f"{name} has no augmentations or no image format, so images cannot be resized as in evaluation. Use "
        "DetectionMapper, Detectron2's DatasetMapper, or another mapper with both attributes."
    )


def _feature_error(cfg: CfgNode, error: KeyError) -> Exception:
    """Return the error that names the key with an unknown feature map; ``error`` if that is not the cause."""
    name = error.args[0] if error.args else None
    for group, node in cfg.MODEL.items():
        if isinstance(node, CfgNode) and name in node.get("IN_FEATURES", ()):
            known = ", ".join(build_backbone(cfg).output_shape())
            return ConfigError(
                f"MODEL.{group}.IN_FEATURES is {node.IN_FEATURES}, but the backbone has no map {name!r}; "
                f"it has {known}"
            )
    return error


def _training_classes(names: Iterable[str]) -> dict[str, Any]:
    """Return the training datasets and their class names, which checkpoints store."""
    metadata = [MetadataCatalog.get(name) for name in names]
    found = {"datasets": list(names)}
    for kind in ("thing_classes", "stuff_classes"):
        if metadata and metadata[0].get(kind):
            found[kind] = list(metadata[0].get(kind))
    return found


def _lazy_train_loader(node: Any, start_iter: int) -> Iterable[Any]:
    if "start_iter" in inspect.signature(_target(node)).parameters:
        return instantiate({**node, "start_iter": start_iter})
    loader = instantiate(node)
    if start_iter:
        logger.info("Skipping %d batches to reach the resumed data position", start_iter)
    return itertools.islice(loader, start_iter, None)


def _target(node: Any) -> Callable[..., Any]:
    return locate(node["_target_"]) if isinstance(node["_target_"], str) else node["_target_"]
