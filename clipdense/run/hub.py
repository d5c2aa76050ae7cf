"""Model folders: weights, config and card together, in the file system or on the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from clipdense.checkpoint import CheckpointError
from clipdense.engine.options import ConfigError
from clipdense.run.hub_config import companion_files, read_portable_config

__all__ = ["CARD", "CONFIG", "WEIGHTS", "ModelFolder", "fetch", "hub_error", "is_hub_id", "open_folder"]

CONFIG, WEIGHTS, CARD = "config.yaml", "model.safetensors", "README.md"
_T = TypeVar("_T")
_HUB_ID = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")


@dataclass(frozen=True)
class ModelFolder:
    """A model that is ready for `Predictor`: ``Predictor(folder.config, folder.weights, folder.overrides)``.

    Attributes:
        path: the folder.
        config: its ``config.yaml``, which sets nothing but keys of the model, its input and its tests.
        weights: its ``model.safetensors``.
        overrides: KEY VALUE pairs that give further files of the folder their full path; mostly empty.
    """

    path: Path
    config: Path
    weights: Path
    overrides: tuple[str, ...] = ()


def fetch(name: str | os.PathLike[str], revision: str | None = None) -> ModelFolder:
    """Find a model folder by its path, or download it from the hub into the hub's cache.

    The folder is not trusted: its config is read as data and may name no file outside the folder, and its
    weights must be safetensors. Private models need a token, which only ``huggingface_hub`` reads
    (``hf auth login`` or ``HF_TOKEN``). ``HF_ENDPOINT`` names another hub; ``HF_HUB_OFFLINE=1`` uses only the
    cache.

    Args:
        name: path of a folder, or a hub id, ``organisation/name``. A folder of that path takes precedence.
        revision: branch, tag or commit on the hub; None for ``main``.

    Raises:
        FileNotFoundError: If it is neither a folder nor a hub id, or a file of the folder is missing.
        ConfigError: If its config may not be used, see `read_portable_config`.
        CheckpointError: If its weights are not a safetensors file.
        ConnectionError: If it cannot be downloaded.
    """
    name = os.fspath(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"{folder} is a folder, which has no revision {revision!r}")
        return open_folder(folder)
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"{name}: there is no such folder, and it is not a hub id (organisation/name). A model folder "
            f"holds {CONFIG} and {WEIGHTS}; clipdense push writes one"
        )
    return _download(name, revision)


def open_folder(folder: Path) -> ModelFolder:
    """Check a model folder, see `fetch`."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder}: there is no {file}; a model folder holds {CONFIG} and {WEIGHTS}, and clipdense "
                "push writes one"
            )
    companions = companion_files(read_portable_config(folder / CONFIG))
    overrides: list[str] = []
    for key, file in companions.items():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / CONFIG}: {key} names {file}, which is not in the folder")
        overrides += [key, str((folder / file).absolute())]
    for file in (WEIGHTS, *companions.values()):
        _check_safetensors(folder / file)
    return ModelFolder(folder, folder / CONFIG, folder / WEIGHTS, tuple(overrides))


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id, ``organisation/name``."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


def _download(name: str, revision: str | None) -> ModelFolder:
    """Download the config, then the weights and the files that the config names, and no others."""
    from huggingface_hub import hf_hub_download

    def download(file: str) -> Path:
        return hub_error(name, lambda: Path(hf_hub_download(name, file, revision=revision)))

    config = download(CONFIG)
    for file in (WEIGHTS, *companion_files(read_portable_config(config)).values()):
        download(file)
    return open_folder(config.parent)


def hub_error(name: str, action: Callable[[], _T]) -> _T:
    """Do something with the hub; a failure is one line.

    Args:
        name: hub id, for the message.
        action: calls the hub.

    Raises:
        ConnectionError: If the action fails. The message has no token in it.
    """
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it warns before each attempt
    try:
        return action()
    except Exception as error:  # the hub's client raises whatever its transports do
        reason = re.sub(r"hf_\w+", "hf_...", " ".join(str(error).split()))[:200] or type(error).__name__
        raise ConnectionError(
            f"{name}: the hub does not answer as expected ({reason}). Check the name, the network and, for a "
            "private model, `hf auth login`; or copy the folder from a machine with access, and name its path"
        ) from error
    finally:
        hub.setLevel(level)


def _check_safetensors(path: Path) -> None:
    """Check the header of a weight file, without reading its tensors."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if 2 <= size <= 2**27 else b""
    try:
        valid = isinstance(json.loads(header), dict)
    except ValueError:
        valid = False
    if not valid:
        raise CheckpointError(f"{path} is not a safetensors file; download it again, or ask who published it")
