"""One view of the settings of a run, whether they come from a yacs config or a LazyConfig."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from clipdense.data.checks import check_classes, check_dataset_names
from clipdense.data.classes import class_names
from clipdense.data.datasets.own import register_from_config
from clipdense.data.heads import config_value, head_classes
from clipdense.data.loader import build_train_loader
from clipdense.data.mappers import build_mapper
from clipdense.data.validation import check_datasets
from clipdense.engine.distributed import convert_sync_batchnorm
from clipdense.engine.evaluate import evaluate_datasets
from clipdense.engine.mask_loss import leave_out_objects_without_mask
from clipdense.engine.optimizer import build_optimizer
from clipdense.engine.options import ConfigError, TrainerOptions
from clipdense.engine.run_base import Key, RunConfig, check_mapper, map_by_name, training_classes
from clipdense.engine.run_lazy import LazyRunConfig
from clipdense.engine.schedule import build_schedule
from clipdense.engine.validation_loss import (
    build_validation_batches,
    check_loss_classes,
    loss_datasets,
)
from clipdense.evaluation import EVALUATOR_REGISTRY
from clipdense.files import write_text

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import verify_results
from detectron2.modeling import build_backbone, build_model
from detectron2.utils import comm

__all__ = ["LazyRunConfig", "RunConfig", "YacsRunConfig", "run_config"]

logger = logging.getLogger(__name__)

_UNSUPPORTED = {
    "PRECISE_BN": "use SOLVER.EMA_DECAY, which averages weights and norm statistics",
    "AUG": "wrap the trained model in Detectron2's GeneralizedRCNNWithTTA",
}


class YacsRunConfig(RunConfig):
    """Settings from a yacs config."""

    weights_key = "MODEL.WEIGHTS"
    weights = Key("MODEL.WEIGHTS")
    allow_pickle = Key("MODEL.ALLOW_PICKLE")
    device = Key("MODEL.DEVICE")
    output_dir = Key("OUTPUT_DIR")
    seed = Key("SEED")
    language_classes = Key("MODEL.LANGUAGE.CLASSES")
    rank_timeout = Key("SOLVER.RANK_TIMEOUT")
    cudnn_benchmark = Key("CUDNN_BENCHMARK")
    split_names = Key("DATASETS.SPLIT_NAMES")
    synonyms = Key("DATASETS.SYNONYMS")
    precision = Key("TEST.PRECISION")
    channels_last = Key("MODEL.CHANNELS_LAST")
    compiled = Key("MODEL.COMPILE.MODULES")
    compile_mode = Key("MODEL.COMPILE.MODE")

    @property
    def dataset_names(self) -> list[str]:
        """See `RunConfig.dataset_names`."""
        return [*self.cfg.DATASETS.TEST, *self.cfg.DATASETS.TRAIN]

    @property
    def language_kind(self) -> str:
        """See `RunConfig.language_kind`."""
        return str(self.cfg.MODEL.LANGUAGE.CLASSES_FROM).removesuffix("_classes")

    def register_datasets(self) -> None:
        """See `RunConfig.register_datasets`."""
        register_from_config(self.cfg)

    def check_datasets(self, training: bool) -> list[str]:
        """See `RunConfig.check_datasets`."""
        trained = [*self.cfg.DATASETS.TRAIN, *loss_datasets(self.cfg)] if training else []
        names = [*self.cfg.DATASETS.TEST, *trained]
        if names:
            check_dataset_names(names)
        for name in self.cfg.DATASETS.TEST:
            kind = MetadataCatalog.get(name).get("evaluator_type")
            if kind not in EVALUATOR_REGISTRY:
                known = ", ".join(sorted(key for key, _ in EVALUATOR_REGISTRY))
                raise ConfigError(
                    f"dataset {name} has evaluator_type {kind!r} in its metadata; known types are {known}"
                )
        return check_datasets(
            self.cfg.DATASETS.TEST,
            training=trained,
            masks=self.cfg.MODEL.MASK_ON,
            objects_required=self.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        )

    def check_classes(self) -> None:
        """See `RunConfig.check_classes`."""
        check_classes(self.cfg)
        check_loss_classes(self.cfg)

    def class_names(self) -> list[str]:
        """See `RunConfig.class_names`."""
        return class_names(self.cfg, self.cfg.MODEL.LANGUAGE.CLASSES_FROM) if self.dataset_names else []

    def class_mappings(self, metadata: Mapping[str, Any], source: str) -> dict[str, list[int]]:
        """See `RunConfig.class_mappings`."""
        heads = [(head, config_value(self.cfg, head.key)) for head in head_classes(self.cfg)]
        return map_by_name(heads, metadata, self.cfg.DATASETS.TEST, source)

    def build_model(self, fetch_weights: bool = True) -> nn.Module:
        """See `RunConfig.build_model`."""
        cfg = self.cfg
        if not fetch_weights:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.FETCH_WEIGHTS = False
        try:
            model = build_model(cfg)
        except KeyError as error:
            raise _feature_error(self.cfg, error) from error
        return self.prepare(convert_sync_batchnorm(model) if self.cfg.MODEL.SYNC_BN else model)

    def build_test_mapper(self) -> Any:
        """See `RunConfig.build_test_mapper`."""
        return check_mapper(f"INPUT.MAPPER {self.cfg.INPUT.MAPPER}", build_mapper(self.cfg, False))

    def evaluate(
        self, model: nn.Module, final: bool = True, mappings: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Any]:
        """See `RunConfig.evaluate`."""
        return evaluate_datasets(self.cfg, model, final, mappings)

    def options(self) -> TrainerOptions:
        """See `RunConfig.options`."""
        return TrainerOptions.from_config(self.cfg, {})

    def trainer_arguments(self, fetch_weights: bool = True) -> dict[str, Any]:
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
        model = run.build_model(fetch_weights)
        masks_optional = leave_out_objects_without_mask(model)
        return {
            "optimizer": build_optimizer(cfg, model),
            "model": model,
            "schedule": build_schedule(cfg),
            "train_loader": partial(build_train_loader, cfg, seed=cfg.SEED, masks_optional=masks_optional),
            "validation_batches": build_validation_batches(cfg, masks_optional),
            "evaluate": run.evaluate if cfg.DATASETS.TEST else None,
            "options": TrainerOptions.from_config(cfg, training_classes(cfg.DATASETS.TRAIN)),
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


def run_config(cfg: Any) -> RunConfig:
    """Wrap a yacs config or a LazyConfig."""
    return YacsRunConfig(cfg) if isinstance(cfg, CfgNode) else LazyRunConfig(cfg)


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
