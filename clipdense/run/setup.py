"""The beginning of a run: config, output folder, logs, seed."""

import argparse
import difflib
import logging
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

import clipdense
from clipdense.data.checks import check_classes
from clipdense.data.datasets import register_from_config
from clipdense.engine.options import ConfigError
from clipdense.engine.output import prepare_output_dir
from clipdense.evaluation import EVALUATOR_REGISTRY
from clipdense.run.config import add_clipdense_config
from clipdense.run.weights import (
    apply_weight_options,
    check_weight_classes,
    config_keys,
    print_weight_options,
)

from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

__all__ = ["available_device", "load_config", "setup"]

logger = logging.getLogger(__name__)


def load_config(config_file: str, overrides: Iterable[str] = ()) -> Any:
    """A yacs config (.yaml; ``KEY VALUE`` overrides) or a LazyConfig (.py; ``key=value`` overrides).

    A file that is not there is looked for among the configs of the installed package as well. Keys that
    neither sets are as the weights in MODEL.WEIGHTS need them, see `apply_weight_options`.

    Raises:
        ConfigError: no such file, an unknown key (with near ones), a value of the wrong type.
        CheckpointError: MODEL.WEIGHTS cannot be read.
    """
    overrides = list(overrides)
    for word in overrides:
        if word.startswith("--"):
            raise ConfigError(f"options go before the KEY VALUE pairs, but {word} follows them")
    path = _find(config_file)
    if path.suffix == ".py":
        lazy = LazyConfig.apply_overrides(LazyConfig.load(str(path)), overrides)
        print_weight_options(lazy.train.get("init_checkpoint", ""), lazy.train.get("allow_pickle", False))
        return lazy
    cfg = get_cfg()
    add_clipdense_config(cfg)
    if len(overrides) % 2:
        raise ConfigError(
            f"overrides are KEY VALUE pairs, but there are {len(overrides)} words: {' '.join(overrides)}"
        )
    try:
        source = str(path)
        cfg.merge_from_file(source)
        source = "the command line"
        cfg.merge_from_list(_floats_for_ints(cfg, overrides))
    except (KeyError, AssertionError, ValueError, yaml.YAMLError) as e:
        unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", str(e))
        if unknown is None:
            raise ConfigError(f"{source}: {e}") from e
        near = _near_keys(unknown[1], list(config_keys(cfg)))
        hint = f"Did you mean {' or '.join(near)}?" if near else "No known key is like it."
        raise ConfigError(f"{source}: unknown config key {unknown[1]}. {hint}") from e
    if cfg.MODEL.WEIGHTS:
        from_file = CfgNode(CfgNode.load_yaml_with_base(str(path), allow_unsafe=True))
        apply_weight_options(cfg, {*config_keys(from_file), *overrides[::2]})
    return cfg


def _find(config_file: str) -> Path:
    if not config_file:
        raise ConfigError("no config file is named; give one with --config-file")
    if Path(config_file).is_file():
        return Path(config_file)
    try:
        return Path(clipdense.config_path(config_file.removeprefix("configs/")))
    except FileNotFoundError as e:
        raise ConfigError(f"config file {config_file} does not exist, and {e}") from e


def _floats_for_ints(cfg: CfgNode, overrides: list[str]) -> list[str]:
    """``SOLVER.BASE_LR 1`` means 1.0; yacs takes no int for a float."""
    words = list(overrides)
    for i in range(0, len(words), 2):
        node: Any = cfg
        for part in words[i].split("."):
            node = node.get(part) if isinstance(node, CfgNode) else None
        if isinstance(node, float) and re.fullmatch(r"[+-]?\d+", words[i + 1]):
            words[i + 1] += ".0"
    return words


def _near_keys(key: str, known: list[str]) -> list[str]:
    last = key.rpartition(".")[2]  # the right name may stand in the wrong place
    near = {*difflib.get_close_matches(key, known, n=3, cutoff=0.75)}
    near |= {k for k in known if k.rpartition(".")[2] == last}
    return sorted(near, key=lambda k: -difflib.SequenceMatcher(None, key, k).ratio())[:3]


def setup(args: argparse.Namespace) -> Any:
    """Everything that comes before the model: config, checks, output folder, logs, random seed.

    ``SEED`` -1 becomes a number here, noted in the run's config.yaml. Without a GPU, ``MODEL.DEVICE`` cuda
    becomes cpu.

    Args:
        args: what `detectron2.engine.default_argument_parser` parses.

    Returns:
        The config, frozen if it is a yacs one.

    Raises:
        ConfigError: the config, its data sets or their classes are wrong, or OUTPUT_DIR cannot be written.
    """
    # detectron2 0.6 on today's torch
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|torch.meshgrid", UserWarning)
    cfg = load_config(args.config_file, args.opts)
    yacs = isinstance(cfg, CfgNode)
    output_dir = cfg.OUTPUT_DIR if yacs else cfg.train.output_dir
    device = cfg.MODEL.DEVICE if yacs else cfg.train.device
    seed = cfg.SEED if yacs else cfg.train.get("seed", -1)
    if yacs:
        try:
            register_from_config(cfg)
            check_weight_classes(cfg)
            if not args.eval_only:
                check_classes(cfg)
            _check_evaluators(cfg.DATASETS.TEST)
        except (ValueError, FileNotFoundError) as e:
            raise ConfigError(str(e)) from e

    if comm.is_main_process():
        keep = args.resume or args.eval_only
        weights = cfg.MODEL.WEIGHTS if yacs else cfg.train.get("init_checkpoint", "")
        moved = prepare_output_dir(output_dir, keep, weights)
    comm.synchronize()
    if seed < 0:
        seed = _seed_of_earlier_run(output_dir) if args.resume else None
        seed = comm.shared_random_seed() if seed is None else seed
    fallback = available_device(device) != device
    device = available_device(device)
    if yacs:
        cfg.SEED, cfg.MODEL.DEVICE = seed, device
        cfg.freeze()
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only
    else:
        cfg.train.seed, cfg.train.device = seed, device

    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "clipdense"):
        setup_logger(output_dir, distributed_rank=rank, name=name)
    logger.info("Command line: %s", " ".join(sys.argv))
    logger.info("Output folder: %s", output_dir)
    if comm.is_main_process():
        if moved:
            logger.info("It held another run, which is now in %s (--resume would have continued it)", moved)
        if not args.eval_only:
            _note(cfg, output_dir)
    if fallback:
        logger.warning("No GPU here: running on CPU")
    seed_all_rng(seed + rank)
    return cfg


def available_device(device: str) -> str:
    """``device``, or "cpu" where it is a GPU and there is none."""
    return "cpu" if str(device).startswith("cuda") and not torch.cuda.is_available() else device


def _check_evaluators(names: Iterable[str]) -> None:
    """Say now, not after hours of training, that a test set cannot be evaluated."""
    for name in names:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind not in EVALUATOR_REGISTRY:
            known = ", ".join(sorted(key for key, _ in EVALUATOR_REGISTRY))
            raise ConfigError(
                f"data set {name} has evaluator_type {kind!r} in its metadata; known are {known}"
            )


def _seed_of_earlier_run(output_dir: str) -> int | None:
    path = Path(output_dir, "config.yaml")
    if not path.exists():
        return None
    noted = yaml.unsafe_load(path.read_text())
    return noted.get("SEED", noted.get("train", {}).get("seed"))


def _note(cfg: Any, output_dir: str) -> None:
    """Write config.yaml and environment.txt."""
    if isinstance(cfg, CfgNode):
        Path(output_dir, "config.yaml").write_text(cfg.dump())
    else:
        LazyConfig.save(cfg, str(Path(output_dir, "config.yaml")))
    Path(output_dir, "environment.txt").write_text(collect_env_info())
