"""Registration shared by all datasets: the root folder, and entries that may be registered twice."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["dataset_root", "is_registered", "register_once"]


def dataset_root() -> Path:
    """Return the folder of the standard datasets: ``DETECTRON2_DATASETS``, or ``datasets`` if it is unset.

    "~" and environment variables in it are expanded.
    """
    return Path(os.path.expandvars(os.environ.get("DETECTRON2_DATASETS", "datasets"))).expanduser()


def register_once(
    name: str,
    load: Callable[[], Sequence[dict[str, Any]]],
    source: dict[str, str],
    metadata: dict[str, Any] | None = None,
) -> None:
    """Register a dataset; do nothing if it is already registered from the same source.

    Args:
        name: of the dataset.
        load: returns its dataset dicts.
        source: metadata entries with the paths that the data are read from; they identify the dataset.
        metadata: further metadata.

    Raises:
        ValueError: If the name belongs to a dataset with another source.
    """
    if not is_registered(name, source):
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**{**source, **(metadata or {})})


def is_registered(name: str, source: dict[str, str]) -> bool:
    """Return whether a dataset is already registered from a source, see `register_once`.

    Raises:
        ValueError: If the name belongs to a dataset with another source.
    """
    if name not in DatasetCatalog.list():
        return False
    registered = MetadataCatalog.get(name)
    if any(registered.get(key) != value for key, value in source.items()):
        raise ValueError(f"the dataset name {name} is already in use; choose another name")
    return True
