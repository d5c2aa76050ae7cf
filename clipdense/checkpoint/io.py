"""Weight files: safetensors, torch (weights only), TorchScript and pickles in, safetensors out."""

from __future__ import annotations

import json
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipdense.files import atomic_path, write_error

METADATA_KEY = "clipdense"

# What the pickled module tree of an OpenAI CLIP names; no other published TorchScript file has all of it.
_OPENAI_NAMES = {
    "visual",
    "transformer",
    "token_embedding",
    "positional_embedding",
    "ln_final",
    "text_projection",
    "logit_scale",
}


class CheckpointError(RuntimeError):
    """A weight file cannot be used; the message names the file and the remedy."""


@dataclass
class Checkpoint:
    """Content of a weight file.

    Attributes:
        path: the file.
        state: key -> tensor, unwrapped from `state_dict` / `model` / `module`, without a `module.` prefix.
        format: "safetensors", "torch", "torchscript" or "pickle".
        metadata: what `save_checkpoint` stored (layout, options); empty for other files.
        extras: the other top-level entries of a torch file (meta, epoch ...).
    """

    path: Path
    state: dict[str, Tensor]
    format: str
    metadata: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | Path, *, allow_pickle: bool = False, lazy: bool = False) -> Checkpoint:
    """Read a weight file onto the CPU, running no code that it brings.

    Args:
        path: safetensors, torch.save (loaded with weights_only), TorchScript of OpenAI's known layout, or a
            pickle of arrays (.pkl, Detectron2's model zoo).
        allow_pickle: also unpickle arbitrary objects and open any TorchScript file. Only for files that you
            trust.
        lazy: leave the tensors of a torch file on disk until they are used, e.g. where only shapes matter.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, of another format, without tensors, or in need of `allow_pickle`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    if _is_safetensors(path):
        return _read_safetensors(path)
    if _is_torchscript(path):
        return _read_torchscript(path, allow_pickle)
    if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
        return _read_pickle(path, allow_pickle)
    return _read_torch(path, allow_pickle, lazy)


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file with JSON metadata, as a whole or not at all.

    Args:
        path: file to write.
        state: tensors by key.
        metadata: at least ``layout``, the name of the key layout; ``options`` holds the settings that the
            weights need.

    Raises:
        WriteError: If the file cannot be written; the old file is unchanged.
    """
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    try:
        with atomic_path(path) as partial:
            save_file(tensors, partial, {"format": "pt", METADATA_KEY: json.dumps(dict(metadata))})
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or head[8:] == b"{"


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as e:
        raise CheckpointError(f"{path} is not a complete safetensors file ({e}): download it again") from e
    return Checkpoint(
        path, _unwrap(state, path)[0], "safetensors", json.loads(stored.get(METADATA_KEY, "{}"))
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path, allow_pickle: bool) -> Checkpoint:
    if not allow_pickle and not _is_openai_archive(path):
        raise CheckpointError(
            f"{path} is a TorchScript file of unknown layout, and opening it can run code: "
            f"pass allow_pickle=True (MODEL.ALLOW_PICKLE True) if you trust it"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated; these files are not
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
    except RuntimeError as e:
        raise CheckpointError(f"{path} is not a complete TorchScript file: download it again ({e})") from e
    return Checkpoint(path, _unwrap(dict(state), path)[0], "torchscript")


def _is_openai_archive(path: Path) -> bool:
    """Whether the archive's object tree names what OpenAI's does; reads the opcodes, unpickles nothing."""
    with zipfile.ZipFile(path) as archive:
        trees = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(trees) != 1:
            return False
        names = {
            argument
            for _, argument, _ in pickletools.genops(archive.read(trees[0]))
            if isinstance(argument, str)
        }
    return names >= _OPENAI_NAMES


def _read_torch(path: Path, allow_pickle: bool, lazy: bool) -> Checkpoint:
    lazy = lazy and zipfile.is_zipfile(path)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=lazy)
    except pickle.UnpicklingError as e:
        whole = zipfile.is_zipfile(path) or "Unsupported" in str(e)
        if allow_pickle or not whole:
            raise CheckpointError(f"{path} is neither safetensors nor a torch file: {e}") from e
        raise CheckpointError(
            f"{path} holds pickled objects other than tensors, and unpickling can run code: "
            f"pass allow_pickle=True (MODEL.ALLOW_PICKLE True) if you trust it. {e}"
        ) from e
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise CheckpointError(f"{path} is truncated or not a torch file: download it again ({e})") from e
    if isinstance(payload, torch.nn.Module):
        payload = payload.state_dict()
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{path} holds a {type(payload).__name__}, not a state dict")
    state, extras = _unwrap(payload, path)
    return Checkpoint(path, state, "torch", extras=extras)


def _read_pickle(path: Path, allow_pickle: bool) -> Checkpoint:
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, and opening it can run code: pass allow_pickle=True "
            "(MODEL.ALLOW_PICKLE True) if you trust it"
        )
    try:
        with path.open("rb") as file:
            payload = pickle.load(file, encoding="latin1")
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as e:
        raise CheckpointError(
            f"{path} is truncated or not a pickle of arrays: download it again ({e})"
        ) from e
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{path} holds a {type(payload).__name__}, not a state dict")
    state, extras = _unwrap(payload, path)
    return Checkpoint(path, state, "pickle", extras=extras)


def _unwrap(payload: Mapping[Any, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    extras: dict[str, Any] = {}
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(payload.get(wrapper), Mapping):
            extras = {str(k): v for k, v in payload.items() if k != wrapper}
            payload = payload[wrapper]
            break
    arrays = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in payload.items()}
    state = {str(k): v for k, v in arrays.items() if isinstance(v, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no tensors; its entries are {list(map(str, payload))[:20]}")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state, extras
