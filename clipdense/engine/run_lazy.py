"""Settings of a run from a LazyConfig."""

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from clipdense.data.heads import HeadClasses, registered_heads
from clipdense.data.validation import check_datasets
from clipdense.engine.distributed import convert_sync_batchnorm
from clipdense.engine.evaluate import run_inference
from clipdense.engine.options import ConfigError, TrainerOptions
from clipdense.engine.run_base import Key, RunConfig, check_mapper, map_by_name, training_classes
from clipdense.open_vocabulary import OpenVocabularyModel

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.registry import locate

__all__ = ["LazyRunConfig"]

logger = logging.getLogger(__name__)


class LazyRunConfig(RunConfig):
    """Settings from a LazyConfig with the nodes of Detectron2's: model, optimizer, lr_multiplier,
    dataloader.{train,test,evaluator} and train.

    The ``train`` node takes Detectron2's names (output_dir, init_checkpoint, max_iter, amp.enabled,
    eval_period, log_period, checkpointer.{period,max_to_keep}, ddp.find_unused_parameters, device, seed),
    ``sync_bn``, ``test_precision``, ``channels_last``, ``compile_modules`` and ``compile_mode`` as of
    `RunConfig`, and every field of `TrainerOptions`.
    """

    weights_key = "train.init_checkpoint"
    weights = Key("train.init_checkpoint", "")
    allow_pickle = Key("train.allow_pickle", False)
    device = Key("train.device")
    output_dir = Key("train.output_dir")
    seed = Key("train.seed", -1)
    language_classes = ()
    rank_timeout = Key("train.rank_timeout", 20.0)
    cudnn_benchmark = Key("train.cudnn_benchmark", False)
    split_names = True
    synonyms = False
    precision = Key("train.test_precision", "float32")
    channels_last = Key("train.channels_last", False)
    compiled = Key("train.compile_modules", ())
    compile_mode = Key("train.compile_mode", "default")

    @property
    def dataset_names(self) -> list[str]:
        """See `RunConfig.dataset_names`; only the test dataset is known."""
        return self._names("test")

    def _names(self, loader: str) -> list[str]:
        """Return the names of the datasets of ``dataloader.train`` or ``dataloader.test``, if it has any."""
        node = self.cfg.get("dataloader", {}).get(loader, {}).get("dataset", {})
        names = node.get("names", ()) if hasattr(node, "get") else ()
        return [names] if isinstance(names, str) else list(names)

    def register_datasets(self) -> None:
        """Do nothing: a LazyConfig registers its datasets itself."""

    def check_datasets(self, training: bool) -> list[str]:
        """Check the files of the datasets: a LazyConfig builds its loaders and evaluators itself."""
        return check_datasets(
            self._names("test"), training=self._names("train") if training else (), objects_required=False
        )

    def check_classes(self) -> None:
        """Do nothing: a LazyConfig does not say how many classes its heads have."""

    def class_names(self) -> list[str]:
        """See `RunConfig.class_names`."""
        return []

    def class_mappings(self, metadata: Mapping[str, Any], source: str) -> dict[str, list[int]]:
        """See `RunConfig.class_mappings`.

        The names of the classes are compared, not their number, which a LazyConfig says nowhere.
        """
        names = self._names("test")
        mappings = map_by_name(self._heads(), metadata, names, source)
        if len(mappings) not in (0, len(names)) or len(set(map(tuple, mappings.values()))) > 1:
            raise ConfigError(
                f"the test datasets {', '.join(names)} list the classes of {source} in different orders: "
                "evaluate them one by one"
            )
        return mappings

    def _heads(self) -> list[tuple[HeadClasses, int | None]] | None:
        """Return the closed-vocabulary heads of the model; None if its class is not known."""
        node = self.cfg.model
        while True:
            kind = _target(node)
            if isinstance(kind, type) and issubclass(kind, OpenVocabularyModel):
                return []
            if (heads := registered_heads(getattr(kind, "__name__", ""))) is not None:
                return [(head, None) for head in heads]
            node = node.get("base")
            if not isinstance(node, Mapping) or "_target_" not in node:
                return None

    def build_model(self, fetch_weights: bool = True) -> nn.Module:
        """See `RunConfig.build_model`; a LazyConfig says itself with which weights its backbone starts."""
        model = instantiate(self.cfg.model).to(self.device)
        return self.prepare(convert_sync_batchnorm(model) if self.cfg.train.get("sync_bn", False) else model)

    def build_test_mapper(self) -> Any:
        """See `RunConfig.build_test_mapper`."""
        node = self.cfg.get("dataloader", {}).get("test", {}).get("mapper")
        return check_mapper("dataloader.test.mapper", None if node is None else instantiate(node))

    def evaluate(
        self, model: nn.Module, final: bool = True, mappings: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Any]:
        """See `RunConfig.evaluate`; no pictures are drawn."""
        loader, evaluator = self.cfg.dataloader.test, self.cfg.dataloader.evaluator
        mapping = next(iter((mappings or {}).values()), None)  # the same for all datasets
        data = instantiate(loader), instantiate(evaluator)
        return run_inference(model, *data, mapping=mapping, precision=self.precision)[0]

    def options(self) -> TrainerOptions:
        """See `RunConfig.options`."""
        train = self.cfg.train
        options = {
            "precision": "float16" if train.get("amp", {}).get("enabled") else "float32",
            "find_unused_parameters": train.get("ddp", {}).get("find_unused_parameters", False),
            "checkpoint_period": train.get("checkpointer", {}).get("period", 5000),
            "checkpoint_keep": train.get("checkpointer", {}).get("max_to_keep", 0),
            "weights": self.weights,
            "metadata": training_classes(n for n in self._names("train") if n in DatasetCatalog.list()),
            **{name: train[name] for name in TrainerOptions.__dataclass_fields__ if name in train},
        }
        if options.get("loss_period"):
            raise ConfigError("train.loss_period: the validation loss needs a .yaml config; remove the key")
        options["weights_skip"] = tuple(options.get("weights_skip", ()))
        if options.get("seed", -1) < 0:
            options["seed"] = comm.shared_random_seed()
        return TrainerOptions(**options)

    def trainer_arguments(self, fetch_weights: bool = True) -> dict[str, Any]:
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


def _lazy_train_loader(node: Any, start_iter: int) -> Iterable[Any]:
    if "start_iter" in inspect.signature(_target(node)).parameters:
        return instantiate({**node, "start_iter": start_iter})
    loader = instantiate(node)
    if start_iter:
        logger.info("Skipping %d batches to reach the resumed data position", start_iter)
    return itertools.islice(loader, start_iter, None)


def _target(node: Any) -> Callable[..., Any]:
    return locate(node["_target_"]) if isinstance(node["_target_"], str) else node["_target_"]
