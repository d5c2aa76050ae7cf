"""From a config to what `Trainer` is made of: yacs, or a LazyConfig with the same nodes as Detectron2's."""

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from clipdense.data.loader import build_train_loader
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.distributed import convert_sync_batchnorm
from clipdense.engine.evaluate import evaluate_datasets, run_inference
from clipdense.engine.optimizer import build_optimizer
from clipdense.engine.options import ConfigError, TrainerOptions
from clipdense.engine.report import write_results
from clipdense.engine.schedule import build_schedule

from detectron2.config import CfgNode, instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model as build_meta_architecture
from detectron2.utils import comm
from detectron2.utils.registry import locate

__all__ = ["build_model", "evaluate_weights", "trainer_arguments", "trainer_options"]

logger = logging.getLogger(__name__)

_LEFT_OUT = {
    "PRECISE_BN": "SOLVER.EMA_DECAY averages the weights, statistics of norms included",
    "AUG": "wrap the trained model in Detectron2's GeneralizedRCNNWithTTA",
}


def build_model(cfg: Any) -> nn.Module:
    """The model of a yacs config or of a LazyConfig's ``model`` node, on its device, weights not loaded."""
    if isinstance(cfg, CfgNode):
        model = build_meta_architecture(cfg)
        return convert_sync_batchnorm(model) if cfg.MODEL.SYNC_BN else model
    model = instantiate(cfg.model).to(cfg.train.device)
    return convert_sync_batchnorm(model) if cfg.train.get("sync_bn", False) else model


def evaluate_weights(cfg: Any, resume: bool = False) -> dict[str, float]:
    """Evaluate ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint of the output folder; train nothing.

    The metrics go to ``inference/results.json`` of the output folder; ``results.json`` beside it is the
    training's.

    Returns:
        Flattened metrics, empty but in the main process.

    Raises:
        CheckpointError: the weights do not fit the model, or lack some of it.
    """
    yacs = isinstance(cfg, CfgNode)
    options = trainer_options(cfg)
    evaluate = partial(evaluate_datasets, cfg) if yacs else partial(_lazy_evaluate, cfg)
    model = build_model(cfg)
    checkpointer = TrainingCheckpointer(model, options.output_dir, options.weights_skip, options.allow_pickle)
    weights = (
        checkpointer.get_checkpoint_file() if resume and checkpointer.has_checkpoint() else options.weights
    )
    if not weights:
        logger.warning("No MODEL.WEIGHTS: evaluating the model as it is built")
    checkpointer.load_weights(weights, complete=True)
    results = flatten_results_dict(evaluate(model, True))
    if results:
        write_results(results, Path(options.output_dir, "inference"))
    return results


def trainer_options(cfg: Any) -> TrainerOptions:
    """Options of a yacs config (without its classes), or of a LazyConfig's ``train`` node."""
    return TrainerOptions.from_config(cfg, {}) if isinstance(cfg, CfgNode) else _lazy_options(cfg)


def trainer_arguments(cfg: Any) -> dict[str, Any]:
    """Arguments of `Trainer` from a yacs config or a LazyConfig."""
    return _from_yacs(cfg) if isinstance(cfg, CfgNode) else _from_lazy(cfg)


def _from_yacs(cfg: CfgNode) -> dict[str, Any]:
    cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()).clone()
    cfg.defrost()
    if cfg.SEED < 0:
        cfg.SEED = comm.shared_random_seed()
    cfg.freeze()
    for key, instead in _LEFT_OUT.items():
        if cfg.TEST[key].ENABLED:
            raise ConfigError(f"TEST.{key} is not supported here; {instead}")
    model = build_model(cfg)
    return {
        "optimizer": build_optimizer(cfg, model),
        "model": model,
        "schedule": build_schedule(cfg),
        "train_loader": partial(build_train_loader, cfg, seed=cfg.SEED),
        "evaluate": partial(evaluate_datasets, cfg) if cfg.DATASETS.TEST else None,
        "options": TrainerOptions.from_config(cfg, _classes(cfg.DATASETS.TRAIN)),
    }


def _classes(names: Iterable[str]) -> dict[str, Any]:
    """The data sets that a model is trained on and their class names, for its checkpoints."""
    metadata = [MetadataCatalog.get(name) for name in names]
    found = {"datasets": list(names)}
    for kind in ("thing_classes", "stuff_classes"):
        if metadata and metadata[0].get(kind):
            found[kind] = list(metadata[0].get(kind))
    return found


def _from_lazy(cfg: Any) -> dict[str, Any]:
    """From the nodes model, optimizer, lr_multiplier, dataloader.{train,test,evaluator} and train."""
    model = build_model(cfg)
    cfg.optimizer.params.model = model
    multiplier = instantiate(cfg.lr_multiplier)
    return {
        "optimizer": instantiate(cfg.optimizer),
        "model": model,
        "schedule": lambda iteration, progress: multiplier(progress),
        "train_loader": partial(_lazy_train_loader, cfg.dataloader.train),
        "evaluate": partial(_lazy_evaluate, cfg) if "evaluator" in cfg.dataloader else None,
        "options": _lazy_options(cfg),
    }


def _lazy_train_loader(node: Any, start_iter: int) -> Iterable[Any]:
    if "start_iter" in inspect.signature(_target(node)).parameters:
        return instantiate({**node, "start_iter": start_iter})
    loader = instantiate(node)
    if start_iter:
        logger.info("Going through %d batches to where the training was", start_iter)
    return itertools.islice(loader, start_iter, None)


def _target(node: Any) -> Callable[..., Any]:
    return locate(node["_target_"]) if isinstance(node["_target_"], str) else node["_target_"]


def _lazy_evaluate(cfg: Any, model: nn.Module, final: bool) -> dict[str, Any]:
    return run_inference(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))[0]


def _lazy_options(cfg: Any) -> TrainerOptions:
    """From the ``train`` node.

    It takes Detectron2's names (output_dir, init_checkpoint, max_iter, amp.enabled, eval_period, log_period,
    checkpointer.{period,max_to_keep}, ddp.find_unused_parameters, device, seed), ``sync_bn``, and any
    attribute of `TrainerOptions`.
    """
    train = cfg.train
    own = {name: train[name] for name in TrainerOptions.__dataclass_fields__ if name in train}
    options = {
        "precision": "float16" if train.get("amp", {}).get("enabled") else "float32",
        "find_unused_parameters": train.get("ddp", {}).get("find_unused_parameters", False),
        "checkpoint_period": train.get("checkpointer", {}).get("period", 5000),
        "checkpoint_keep": train.get("checkpointer", {}).get("max_to_keep", 0),
        "weights": train.get("init_checkpoint", ""),
        **own,
    }
    options["weights_skip"] = tuple(options.get("weights_skip", ()))
    if options.get("seed", -1) < 0:
        options["seed"] = comm.shared_random_seed()
    return TrainerOptions(**options)
