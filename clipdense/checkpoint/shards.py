"""Tensors in a folder of shards (`torch.distributed.checkpoint`), for any number of processes."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from clipdense.files import WriteError

__all__ = ["load_shards", "read_shards", "shard_sizes", "write_shards"]

_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch.serialization", "_get_layout"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that builds the dataclasses of a checkpoint's index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = (
            module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
            or (module, name) in _NAMES
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        )
        found = super().find_class(module, name) if known else None
        if found is None or not (isinstance(found, type | torch.dtype) or name == "_get_layout"):
            raise pickle.UnpicklingError(f"the index of the shards names {module}.{name}")
        return found


class _Reader(dcp.FileSystemReader):
    """Reader of tensors that runs no code of the files."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index of the folder."""
        with Path(self.path, ".metadata").open("rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        others = [
            k for k, v in metadata.state_dict_metadata.items() if not isinstance(v, TensorStorageMetadata)
        ]
        if others:  # they would be unpickled
            raise pickle.UnpicklingError(f"the shards hold {others[0]}, which is not a tensor")
        return metadata


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a folder; every process of the group must call this function.

    A process writes its shard of a DTensor. Tensors that all processes hold are written once. The folder gets
    its name after all processes have written.

    Args:
        folder: folder to write, which all processes share; an older one is replaced.
        tensors: by name, with the same names in every process.

    Raises:
        WriteError: If a process cannot write.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if _is_first():
        shutil.rmtree(partial, ignore_errors=True)
    _wait()
    try:
        dcp.save(
            dict(tensors), storage_writer=dcp.FileSystemWriter(partial), no_dist=not dist.is_initialized()
        )
    except CheckpointException as e:  # raised in every process
        reason = next(iter(e.failures.values()))[0]
        raise WriteError(f"cannot write {folder}: {reason}") from None
    if _is_first():
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    _wait()


def shard_sizes(folder: Path, prefix: str) -> dict[str, torch.Size]:
    """Return the shapes of the tensors whose names start with ``prefix``, under the rest of the name.

    Raises:
        OSError, pickle.UnpicklingError: If the index cannot be read.
    """
    return {name.removeprefix(prefix): entry.size for name, entry in _entries(folder, prefix).items()}


def load_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, or this process's shards of DTensors, from a folder; every process must call it.

    Args:
        folder: result of `write_shards` in any number of processes.
        tensors: by the names in the folder; changed in place.
    """
    dcp.load(dict(tensors), storage_reader=_Reader(folder), no_dist=not dist.is_initialized())


def read_shards(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read whole tensors whose names start with ``prefix``; a process can call it alone.

    Args:
        folder: result of `write_shards`.
        prefix: it is removed from the names.

    Raises:
        OSError, pickle.UnpicklingError: If the index cannot be read.
    """
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _entries(folder, prefix).items()
    }
    dcp.load(state, storage_reader=_Reader(folder), no_dist=True)
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _entries(folder: Path, prefix: str) -> dict[str, TensorStorageMetadata]:
    entries: dict[str, Any] = _Reader(folder).read_metadata().state_dict_metadata
    return {name: entry for name, entry in entries.items() if name.startswith(prefix)}


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
