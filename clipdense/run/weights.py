"""Config keys and classes that the weight file in ``MODEL.WEIGHTS`` needs."""

import logging
import math
import os
from collections.abc import Collection
from typing import Any

from clipdense.checkpoint import (
    Checkpoint,
    class_differences,
    config_options,
    convert_model,
    read_checkpoint,
)
from clipdense.data.trained_classes import trained_classes
from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import RunConfig, YacsRunConfig
from clipdense.run.keys import config_value, set_options

from detectron2.config import CfgNode

__all__ = [
    "apply_weight_options",
    "check_weight_classes",
    "log_weight_options",
    "read_weights",
    "use_trained_classes",
]

logger = logging.getLogger(__name__)

# Initial weights of parts of the model, and whether it has a text tower. A file that holds the whole model
# decides these keys, even if the config sets them (the config.yaml of a run sets every key).
_DECIDED_BY_FILE = (
    "MODEL.CLIP.PRETRAINED",
    "MODEL.TIMM.PRETRAINED",
    "MODEL.LANGUAGE.TEXT",
    "MODEL.LANGUAGE.TABLE_DIM",
)


def read_weights(path: str, allow_pickle: bool = False) -> Checkpoint | None:
    """Read a weight file under the keys of clipdense, with the config keys and classes that it brings.

    The tensors of a torch file stay on disk until they are used.

    Args:
        path: value of ``MODEL.WEIGHTS``.
        allow_pickle: value of ``MODEL.ALLOW_PICKLE``.

    Returns:
        The file; None for paths that only Detectron2's checkpointer can open (a URL, a model-zoo pickle),
        files that do not exist, and "".

    Raises:
        CheckpointError: If the file cannot be read, or its tensors do not determine a model.
    """
    if not os.path.isfile(path) or path.endswith((".pkl", ".pyth")):
        return None
    return convert_model(read_checkpoint(path, allow_pickle=allow_pickle, lazy=True))


def apply_weight_options(cfg: CfgNode, weights: Checkpoint | None, explicit: Collection[str]) -> None:
    """Set the config keys that a weight file needs (in place).

    Published files of a known layout, files written by `convert_weights` and exported files need some keys;
    other files need none. Keys that the user has set keep their value, and a difference is logged.

    Args:
        cfg: the config.
        weights: content of ``MODEL.WEIGHTS``, see `read_weights`.
        explicit: full names of the keys that the command line or the config file sets.

    Raises:
        ConfigError: If the file needs a key that does not exist or was renamed.
    """
    if weights is None:
        return
    source = str(weights.path)
    for key, value in config_options(weights).items():
        if key not in explicit or key in _DECIDED_BY_FILE:
            set_options(cfg, {key: value}, source)
            continue
        chosen = config_value(cfg, key)
        if chosen not in ([], ()) and not _same(chosen, value):  # an empty list leaves the choice open
            logger.warning("%s keeps %s from the config, but %s needs %s", key, chosen, source, value)


def log_weight_options(weights: Checkpoint | None) -> None:
    """Log the config keys that a weight file needs, for a LazyConfig, which has no such keys."""
    if weights is not None and (options := config_options(weights)):
        lines = "\n".join(f"  {key}: {value}" for key, value in options.items())
        logger.warning("%s needs these yacs keys, or their equivalents:\n%s", weights.path, lines)


def check_weight_classes(run: RunConfig, weights: Checkpoint | None) -> None:
    """Check that the datasets have the classes that a published weight file was trained on.

    A list in ``MODEL.LANGUAGE.CLASSES`` that differs from the file's is trusted without checking.

    Args:
        run: settings of the run, whose datasets are registered.
        weights: content of ``MODEL.WEIGHTS``, see `read_weights`.

    Raises:
        ConfigError: If the classes differ; the message lists the differences.
    """
    listed = None if weights is None else trained_classes(weights.metadata, run.language_kind)
    if listed is None:
        return
    if list(run.language_classes) != listed or not (names := run.class_names()):
        return
    if differences := class_differences(listed, names):
        raise ConfigError(
            f"MODEL.WEIGHTS {run.weights} was trained on other classes than those of the datasets:\n  "
            + "\n  ".join(differences)
            + "\nTo train it on these classes, set MODEL.LANGUAGE.CLASSES to their names and list the "
            "parameters that depend on them in MODEL.WEIGHTS_SKIP."
        )


def use_trained_classes(run: RunConfig, weights: Checkpoint | None) -> None:
    """Compare the classes of a weight file with the test datasets, before a model is built for evaluation.

    If a dataset lists the same classes in another order, a language backbone gets the order of training: the
    head reads its score map by position.

    Args:
        run: settings of the run, whose datasets are registered.
        weights: content of ``MODEL.WEIGHTS``, see `read_weights`.

    Raises:
        ConfigError: If the classes differ.
    """
    if weights is None:
        return
    metadata = {**weights.metadata, **(weights.extras.get("metadata") or {})}
    mapped, names = run.class_mappings(metadata, run.weights), trained_classes(metadata, run.language_kind)
    if mapped and names and isinstance(run, YacsRunConfig) and not run.language_classes:
        run.language_classes = names


def _same(a: Any, b: Any) -> bool:
    """Compare two values; floats up to rounding, and a list equals a tuple with the same entries."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-5)
    return bool(a == b)
