"""Weight files: safetensors, torch (weights only), TorchScript and pickles in, safetensors out."""

from __future__ import annotations

import json
import pickle
import pickletools
import re
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

from clipdense.checkpoint.finite import describe_nonfinite
from clipdense.checkpoint.metadata import check_metadata
from clipdense.checkpoint.shards import read_shards
from clipdense.checkpoint.torchscript import read_torchscript_tensors
from clipdense.files import atomic_path, write_error

METADATA_KEY = "clipdense"
_MAX_TREE = 2**26  # bytes of the object tree of a TorchScript archive

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
    """Read a weight file onto the CPU, without running code that it contains.

    Args:
        path: safetensors, torch.save (loaded with weights_only), TorchScript of OpenAI's known layout, or a
            pickle of arrays (.pkl, Detectron2's model zoo).
        allow_pickle: also unpickle arbitrary objects and open any TorchScript file. Only for files that you
            trust.
        lazy: leave the tensors of a torch file on disk until they are used, e.g. if only shapes matter. They
            are then not checked for NaN and infinite values.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, has another format, has no tensors, has NaN or infinite
            values, or needs `allow_pickle`. The message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    try:
        file = _read(path, allow_pickle, lazy)
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from e
    except Exception as e:  # libraries raise almost anything for damaged files
        raise CheckpointError(
            f"{path} is damaged or not a weight file: download it again ({_reason(e)})"
        ) from e
    _check_tensors(file)
    if not lazy:
        require_finite(file.state, path)
    return file


def require_finite(state: Mapping[str, object], path: str | Path) -> None:
    """Check that the tensors of a weight file are finite.

    Raises:
        CheckpointError: If a tensor has NaN or infinite values; the message names the file and the tensor.
    """
    if found := describe_nonfinite(state):
        raise CheckpointError(
            f"{path} holds {found}: every result would be wrong. Use an earlier checkpoint, or download the "
            "file again"
        )


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file with JSON metadata, as a whole or not at all.

    Args:
        path: file to write.
        state: tensors by key.
        metadata: at least ``layout``, the name of the key layout; ``options`` holds the settings that the
            weights need.

    Raises:
        CheckpointError: If a tensor has NaN or infinite values. Nothing is written.
        WriteError: If the file cannot be written; the old file is unchanged.
    """
    refuse_nonfinite_save(state, path)
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    try:
        with atomic_path(path) as partial:
            save_file(tensors, partial, {"format": "pt", METADATA_KEY: json.dumps(dict(metadata))})
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error


def refuse_nonfinite_save(state: Mapping[str, object], path: str | Path) -> None:
    """Check that tensors are finite before they are written.

    Raises:
        CheckpointError: If a tensor has NaN or infinite values; the message names the file and the tensor.
    """
    if found := describe_nonfinite(state):
        raise CheckpointError(
            f"{path} was not written, because the model holds {found}: the training has diverged. Continue "
            "from an earlier checkpoint with a lower SOLVER.BASE_LR"
        )


def _read(path: Path, allow_pickle: bool, lazy: bool) -> Checkpoint:
    if _is_safetensors(path):
        return _read_safetensors(path)
    if _is_torchscript(path):
        return _read_torchscript(path, allow_pickle)
    if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
        return _read_pickle(path, allow_pickle)
    return _read_torch(path, allow_pickle, lazy)


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
    try:
        metadata = json.loads(stored.get(METADATA_KEY, "{}"))
        check_metadata(metadata)
    except (ValueError, RecursionError) as e:  # a JSON error is a ValueError too
        raise CheckpointError(
            f"{path}: its metadata entry {METADATA_KEY!r} is damaged ({_reason(e)}): download the file "
            "again, or convert the published file again (tools/convert_checkpoint.py)"
        ) from e
    return Checkpoint(path, _unwrap(state, path)[0], "safetensors", metadata)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path, allow_pickle: bool) -> Checkpoint:
    if _is_openai_archive(path):
        try:
            tensors = read_torchscript_tensors(path)
        except ValueError as e:
            raise CheckpointError(f"{e}; download it again") from e
        return Checkpoint(path, _unwrap(tensors, path)[0], "torchscript")
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a TorchScript file of unknown layout, and opening it can run code: "
            f"pass allow_pickle=True (MODEL.ALLOW_PICKLE True) if you trust it"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated; these files are not
        state = torch.jit.load(str(path), map_location="cpu").state_dict()
    return Checkpoint(path, _unwrap(dict(state), path)[0], "torchscript")


def _is_openai_archive(path: Path) -> bool:
    """Whether the archive's object tree names what OpenAI's does; reads the opcodes, unpickles nothing."""
    with zipfile.ZipFile(path) as archive:
        trees = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(trees) != 1 or archive.getinfo(trees[0]).file_size > _MAX_TREE:
            return False
        names = {
            argument
            for _, argument, _ in pickletools.genops(archive.read(trees[0]))
            if isinstance(argument, str)
        }
    return names >= _OPENAI_NAMES


def _read_torch(path: Path, allow_pickle: bool, lazy: bool) -> Checkpoint:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_sums(path)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=lazy and zipped)
    except pickle.UnpicklingError as e:
        if allow_pickle or not (zipped or "Unsupported" in str(e)):
            raise CheckpointError(f"{path} is neither safetensors nor a torch file ({_reason(e)})") from e
        found = re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)", str(e))
        raise CheckpointError(
            f"{path} holds pickled objects other than tensors{f' ({found[1]})' if found else ''}, and "
            "unpickling can run code: pass allow_pickle=True (MODEL.ALLOW_PICKLE True) if you trust it"
        ) from e
    if isinstance(payload, torch.nn.Module):
        payload = payload.state_dict()
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{path} holds a {type(payload).__name__}, not a state dict")
    if isinstance(payload.get("shards"), str):
        payload = {**payload, "model": read_shards(shard_folder(path, payload["shards"]), "model.")}
    state, extras = _unwrap(payload, path)
    if (stored := extras.get("metadata")) is not None:
        try:
            check_metadata(stored)
        except ValueError as e:
            raise CheckpointError(
                f"{path}: its entry 'metadata' is damaged ({e}): use another checkpoint"
            ) from e
    return Checkpoint(path, state, "torch", extras=extras)


def shard_folder(path: Path, name: str) -> Path:
    """Return the folder of shards that a checkpoint names, which lies beside the file.

    Raises:
        CheckpointError: If the name is not that of a folder beside the file.
    """
    folder = path.with_name(Path(name).name)
    if Path(name).name != name or not folder.is_dir():
        raise CheckpointError(
            f"{path} holds its tensors in the folder {name}, which is not beside it: keep both together"
        )
    return folder


def _check_sums(path: Path) -> None:
    """Compare the archive's checksums; torch ignores them."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.CRC for entry in archive.infolist()):  # torch can be told to write none
            damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(
                    f"{path} is damaged: the checksum of {damaged} differs; download it again"
                )


def _read_pickle(path: Path, allow_pickle: bool) -> Checkpoint:
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, and opening it can run code: pass allow_pickle=True "
            "(MODEL.ALLOW_PICKLE True) if you trust it"
        )
    with path.open("rb") as file:
        payload = pickle.load(file, encoding="latin1")
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{path} holds a {type(payload).__name__}, not a state dict")
    state, extras = _unwrap(payload, path)
    return Checkpoint(path, state, "pickle", extras=extras)


def _check_tensors(file: Checkpoint) -> None:
    """Refuse tensors that no model of ours has, and that would be converted without a word."""
    for key, value in file.state.items():
        kind = str(value.layout).removeprefix("torch.") if value.layout != torch.strided else ""
        kind = kind or ("quantized" if value.is_quantized else "complex" if value.is_complex() else "")
        if kind:
            raise CheckpointError(
                f"{file.path}: tensor {key} is {kind}; expected a dense tensor of real numbers"
            )


def _reason(error: BaseException) -> str:
    """Return the first line of an error's message, shortened, with the error's type."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:160]}" if line else type(error).__name__


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
