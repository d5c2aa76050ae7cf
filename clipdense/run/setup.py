"""Start of a run: configuration, checks, output folder, logs, seed."""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import clipdense
from clipdense.checkpoint import Checkpoint, CheckpointError
from clipdense.engine.liveness import watch_ranks
from clipdense.engine.options import ConfigError
from clipdense.engine.output import prepare_output_dir
from clipdense.engine.run_config import RunConfig, run_config
from clipdense.files import write_text
from clipdense.run.config import add_clipdense_config
from clipdense.run.config_file import load_yaml, merge_config_file
from clipdense.run.config_rules import check_config, check_files, config_remarks, expand_paths, expanded
from clipdense.run.fetching import backbone_is_in, checkpoint_to_resume, downloads_weights
from clipdense.run.keys import config_keys, config_value, unknown_key_error
from clipdense.run.weights import (
    apply_weight_options,
    check_weight_classes,
    log_weight_options,
    read_weights,
    use_trained_classes,
)

from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

__all__ = ["LoadedConfig", "available_device", "complete_config", "load_config", "read_config", "setup"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedConfig:
    """Configuration of a run, and the weight file that it names.

    Attributes:
        cfg: yacs config or LazyConfig. The keys that the weight file needs are set.
        weights: the weight file; None if the config names none, or one that only Detectron2's checkpointer
            can open.
        explicit: full names of the keys that the config file or the overrides set; empty for a LazyConfig.
        fetch_weights: whether the backbone needs weights that have to be downloaded; False if a checkpoint
            or the weight file holds all of it.
    """

    cfg: Any
    weights: Checkpoint | None = None
    explicit: frozenset[str] = frozenset()
    fetch_weights: bool = True


def load_config(config_file: str, overrides: Iterable[str] = ()) -> Any:
    """Load a configuration; see `read_config`, which returns the weight file as well."""
    return read_config(config_file, overrides).cfg


def read_config(config_file: str, overrides: Iterable[str] = (), weights: str | None = None) -> LoadedConfig:
    """Load a configuration, and set the keys that its weight file needs.

    Keys that the config file or the overrides set keep their value, see `apply_weight_options`.

    Args:
        config_file: yacs config (.yaml) or LazyConfig (.py). A file that does not exist is looked up among
            the configs of the package.
        overrides: ``KEY VALUE`` pairs for a yacs config, ``key=value`` for a LazyConfig.
        weights: weight file to use instead of the one that the config names.

    Returns:
        The configuration and the weight file.

    Raises:
        ConfigError: If there is no such file, a key is unknown or was renamed (the message names similar keys
            or the new one), or a value is wrong (`check_config`).
        CheckpointError: If the weight file cannot be read.
    """
    return _with_weights(_parse_config(config_file, overrides, weights))


def _parse_config(
    config_file: str, overrides: Iterable[str] = (), weights: str | None = None
) -> LoadedConfig:
    """Load and check a configuration as `read_config` does, without reading its weight file."""
    overrides = list(overrides)
    for word in overrides:
        if word.startswith("--"):
            raise ConfigError(f"options go before the KEY VALUE pairs, but {word} follows them")
    path = _find(config_file)
    if path.suffix == ".py":
        return _merge(LazyConfig.load(str(path)), overrides, (), weights)
    cfg = get_cfg()
    add_clipdense_config(cfg)
    with _named_errors(cfg, str(path)):
        content = merge_config_file(cfg, path)
    return _merge(cfg, overrides, config_keys(content), weights)


def complete_config(
    cfg: Any, overrides: Iterable[str] = (), explicit: Iterable[str] = (), weights: str | None = None
) -> LoadedConfig:
    """Apply overrides to a config, read its weight file, and set the keys that the file needs.

    Args:
        cfg: yacs config (changed in place) or LazyConfig.
        overrides: ``KEY VALUE`` pairs for a yacs config, ``key=value`` for a LazyConfig.
        explicit: keys of a yacs config that the user has set.
        weights: weight file to use instead of the one that the config names.

    Returns:
        The configuration and the weight file.

    Raises:
        ConfigError: If an override names an unknown or renamed key, or a value is wrong (`check_config`).
        CheckpointError: If the weight file cannot be read.
    """
    return _with_weights(_merge(cfg, list(overrides), explicit, weights))


def _merge(cfg: Any, overrides: list[str], explicit: Iterable[str], weights: str | None) -> LoadedConfig:
    """Apply overrides to a config, expand its paths and check its values."""
    if isinstance(cfg, CfgNode):
        _merge_overrides(cfg, overrides)
    else:
        cfg = _apply_lazy_overrides(cfg, overrides)
    run = run_config(cfg)
    if weights is not None:
        run.weights = os.fspath(weights)
    if not isinstance(cfg, CfgNode):
        run.weights = expanded(run.weights or "", run.weights_key)
        run.output_dir = expanded(run.output_dir or "", "train.output_dir")
        return LoadedConfig(cfg)
    expand_paths(cfg)
    check_config(cfg)
    if "SOLVER.MAX_ITER" in overrides[::2] and "SOLVER.MAX_SECONDS" not in overrides[::2]:
        _lift_time_limit(cfg)
    return LoadedConfig(cfg, explicit=frozenset([*explicit, *overrides[::2]]))


def _with_weights(loaded: LoadedConfig) -> LoadedConfig:
    """Read the weight file of a config, and set the keys that it needs."""
    file = _read_weights(run_config(loaded.cfg))
    if isinstance(loaded.cfg, CfgNode):
        apply_weight_options(loaded.cfg, file, loaded.explicit)
        check_config(loaded.cfg)
    else:
        log_weight_options(file)
    return replace(loaded, weights=file)


def _lift_time_limit(cfg: CfgNode) -> None:
    """Set ``SOLVER.MAX_SECONDS`` to 0: a MAX_ITER of the command line overrides the config file's limit."""
    if cfg.SOLVER.MAX_SECONDS:
        logger.warning(  # the log file is not open yet
            "SOLVER.MAX_SECONDS %g of the config file does not apply, as the command line sets "
            "SOLVER.MAX_ITER. To keep the limit, set SOLVER.MAX_SECONDS as well.",
            cfg.SOLVER.MAX_SECONDS,
        )
        cfg.SOLVER.MAX_SECONDS = 0.0


def _apply_lazy_overrides(cfg: Any, overrides: list[str]) -> Any:
    """Apply ``key=value`` words to a LazyConfig; Hydra's errors become one line."""
    try:
        return LazyConfig.apply_overrides(cfg, overrides)
    except Exception as e:  # of hydra, omegaconf or Detectron2
        reason = str(e).strip().partition("\n")[0]
        raise ConfigError(
            f"the command line: {' '.join(overrides)}: {reason}; a .py config takes key=value, with text in "
            "quotes if it has special characters: \"train.output_dir='~/run'\""
        ) from e


def _read_weights(run: RunConfig) -> Checkpoint | None:
    """Read the weight file of a run; an error names its key."""
    try:
        return read_weights(run.weights, run.allow_pickle)
    except CheckpointError as e:
        raise CheckpointError(f"{run.weights_key}: {e}") from e


def _find(config_file: str) -> Path:
    """Return the path of a config file, in the file system or among the configs of the package."""
    if not config_file:
        raise ConfigError("no config file is named; give one with --config-file")
    if Path(config_file).expanduser().is_file():
        return Path(config_file).expanduser()
    error = ConfigError(f"config file {config_file} does not exist")
    if Path(config_file).is_absolute():
        raise error
    try:
        return Path(clipdense.config_path(config_file.removeprefix("configs/")))
    except FileNotFoundError as e:
        raise ConfigError(f"{error}, and {e}") from e


@contextmanager
def _named_errors(cfg: CfgNode, source: str) -> Iterator[None]:
    """Turn the errors of yacs into a `ConfigError` that names the source of the keys."""
    try:
        yield
    except ConfigError:
        raise
    except (KeyError, AssertionError, ValueError) as e:
        if (
            mismatch := re.search(r"Type mismatch.*for config key: ([\w.]+)$", str(e), re.DOTALL)
        ) is not None:
            raise ConfigError(_type_error(cfg, mismatch[1], source)) from e
        found = re.search(r"Non-existent (?:config )?key: ([\w.]+)|Key ([\w.]+) was renamed", str(e))
        if found is None:
            raise ConfigError(f"{source}: {e}") from e
        raise unknown_key_error(cfg, found[1] or found[2], source) from e


def _type_error(cfg: CfgNode, key: str, source: str) -> str:
    """Describe a value of the wrong type; yacs prints whole nodes of the config."""
    expected = config_value(cfg, key)
    kind = "a group of keys" if isinstance(expected, CfgNode) else f"a value like {expected!r}"
    return f"{source}: {key} has a value of the wrong type; expected {kind} ({type(expected).__name__})"


def _merge_overrides(cfg: CfgNode, overrides: list[str]) -> None:
    """Set the keys that ``KEY VALUE`` pairs name; an integer for a float key is converted, unlike in yacs."""
    if len(overrides) % 2:
        raise ConfigError(
            f"overrides are KEY VALUE pairs, but there are {len(overrides)} words: {' '.join(overrides)}"
        )
    words = list(overrides)
    for i in range(0, len(words), 2):
        if isinstance(config_value(cfg, words[i]), float) and re.fullmatch(r"[+-]?\d+", str(words[i + 1])):
            words[i + 1] = f"{words[i + 1]}.0"
    with _named_errors(cfg, "the command line"):
        cfg.merge_from_list(words)


def setup(args: argparse.Namespace) -> LoadedConfig:
    """Prepare everything that comes before the model: config, checks, output folder, logs, random seed.

    What costs little is done first: the data are checked before the weight file is read. A negative ``SEED``
    is replaced by a random one, which the run's config.yaml records. Without a GPU, the device "cuda" is
    replaced by "cpu".

    Args:
        args: arguments of `detectron2.engine.default_argument_parser`.

    Returns:
        The configuration (read-only if it is a yacs one) and its weight file.

    Raises:
        ConfigError: If the config, its datasets or their classes are wrong, or OUTPUT_DIR is not writable.
    """
    # detectron2 0.6 on current torch versions
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|torch.meshgrid", UserWarning)
    loaded = _parse_config(args.config_file, args.opts)
    run, training = run_config(loaded.cfg), not args.eval_only
    watch_ranks(run.rank_timeout)
    if training and isinstance(loaded.cfg, CfgNode) and not loaded.cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty; name the datasets to train on, or use --eval-only")
    check_files(run, args.resume and Path(run.output_dir, "last_checkpoint").is_file())
    with _config_errors():
        run.register_datasets()
        findings = run.check_datasets(training)
    loaded = _with_weights(loaded)
    with _config_errors():
        check_weight_classes(run, loaded.weights)
        if training:
            run.check_classes()
        elif not args.resume:
            use_trained_classes(run, loaded.weights)
    checkpoint = checkpoint_to_resume(run.output_dir) if args.resume else loaded.weights
    if isinstance(loaded.cfg, CfgNode) and checkpoint is not None and downloads_weights(loaded.cfg):
        loaded = replace(loaded, fetch_weights=not backbone_is_in(loaded.cfg, checkpoint))

    moved = None
    if comm.is_main_process():
        moved = prepare_output_dir(run.output_dir, args.resume or args.eval_only, run.weights)
    comm.synchronize()
    if run.seed < 0:
        seed = _recorded_seed(run.output_dir) if args.resume else None
        run.seed = comm.shared_random_seed() if seed is None else seed
    requested, run.device = run.device, available_device(run.device)
    torch.backends.cudnn.benchmark = run.cudnn_benchmark and training
    run.freeze()
    _start_logs(run, moved, training)
    for finding in findings:
        logger.warning("%s", finding)
    if run.device != requested:
        logger.warning("No GPU is available: running on the CPU")
    if isinstance(loaded.cfg, CfgNode):
        for remark in config_remarks(loaded.cfg, loaded.explicit):
            logger.warning("%s", remark)
    seed_all_rng(run.seed + comm.get_rank())
    return loaded


@contextmanager
def _config_errors() -> Iterator[None]:
    """Turn errors about datasets and classes into a `ConfigError`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as e:
        raise ConfigError(str(e)) from e


def available_device(device: str) -> str:
    """Return ``device``, or "cpu" if it is a GPU and none is available."""
    return "cpu" if str(device).startswith("cuda") and not torch.cuda.is_available() else device


def _start_logs(run: RunConfig, moved: Path | None, training: bool) -> None:
    """Start the loggers, and write config.yaml and environment.txt of a training run.

    Args:
        run: settings of the run.
        moved: folder into which an earlier run was moved, if any.
        training: whether the run trains.
    """
    for name in ("fvcore", "detectron2", "clipdense"):
        setup_logger(run.output_dir, distributed_rank=comm.get_rank(), name=name)
    logger.info("Command line: %s", " ".join(sys.argv))
    logger.info("Output folder: %s", run.output_dir)
    logger.info("Device: %s", run.device)
    if not comm.is_main_process():
        return
    if moved:
        logger.info("Moved an earlier run to %s (--resume would have continued it)", moved)
    if training:
        run.save(Path(run.output_dir, "config.yaml"))
        write_text(Path(run.output_dir, "environment.txt"), collect_env_info())


def _recorded_seed(output_dir: str) -> int | None:
    """Return the seed in the config.yaml of an earlier run; None if there is none."""
    path = Path(output_dir, "config.yaml")
    if not path.exists():
        return None
    recorded = load_yaml(path)
    if not isinstance(recorded, dict):
        raise ConfigError(f"{path}: expected the keys of an earlier run; remove the file to ignore it")
    train = recorded.get("train")
    seed = recorded.get("SEED", train.get("seed") if isinstance(train, dict) else None)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"{path}: the seed is {seed!r}, expected a whole number")
    return seed
