"""Disk cache of text embeddings, and the hash of the modules that computed them."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipdense.files import atomic_path

__all__ = ["RowStore", "module_fingerprint"]

_log = logging.getLogger(__name__)


_SCALARS = (bool, int, float, str, type(None))
_VOLATILE = {"training", "grad_checkpointing"}
_digests: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def module_fingerprint(module: nn.Module) -> str:
    """Hash what a module computes: its structure, and every byte of its parameters and buffers.

    The structure is the tree of submodules with their classes and plain settings (head counts, activations,
    eps, pooling). The digest is computed once and kept until a tensor is replaced, written in place
    (optimizers, `load_state_dict`), or changes its shape, type or device. Writing through ``tensor.data`` is
    not detected: PyTorch does not count such writes.

    Args:
        module: the module.

    Returns:
        SHA-256 in hexadecimal.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    structure = [_describe(name, m) for name, m in module.named_modules()]
    # inference tensors do not count writes, so their digest is not kept
    counted = not any(tensor.is_inference() for _, tensor in tensors)
    stamp = (structure, [(name, *_stamp(tensor)) for name, tensor in tensors]) if counted else None
    if counted and module in _digests and _digests[module][0] == stamp:
        return _digests[module][1]
    digest = hashlib.sha256(json.dumps(structure).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    _digests[module] = (stamp, digest.hexdigest())
    return digest.hexdigest()


def _describe(name: str, module: nn.Module) -> list[Any]:
    settings: dict[str, Any] = {}
    for key, value in sorted(vars(module).items()):
        if key.startswith("_") or key in _VOLATILE:
            continue
        if isinstance(value, _SCALARS):
            settings[key] = value
        elif isinstance(value, (tuple, list)) and all(isinstance(v, _SCALARS) for v in value):
            settings[key] = list(value)
        elif inspect.isroutine(value):
            settings[key] = value.__qualname__
    return [name, type(module).__qualname__, settings]


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.dtype, tensor.device


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class RowStore:
    """Store of named float32 rows on disk, safe under several processes.

    The store is a folder of immutable files, each written atomically. Two processes that write the same rows
    at once do the work twice, and nothing else happens. A file that cannot be read, or does not match its
    checksum, is removed with a warning; its rows count as absent. A folder that cannot be written causes a
    warning, not an error. The folder may be deleted at any time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, list[str]] = {}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the stored rows (D,) among the named ones."""
        missing, rows = set(names), dict[str, Tensor]()
        for path in sorted(self.folder.glob("*.safetensors")):
            if missing.isdisjoint(self._files.get(path, missing)):
                continue
            try:
                self._files[path], table = _read(path)
            except FileNotFoundError:  # another process has removed it meanwhile
                continue
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                _log.warning(
                    "Removing damaged text cache file %s (%s); its embeddings are computed again", path, error
                )
                self._files.pop(path, None)
                path.unlink(missing_ok=True)
                continue
            for name, row in zip(self._files[path], table, strict=True):
                if name in missing:
                    rows[name] = row.clone()
            missing -= rows.keys()
        return rows

    def write(self, rows: Mapping[str, Tensor]) -> None:
        """Store rows (D,), float32 on the CPU, by name."""
        names = json.dumps(list(rows))
        table = torch.stack(list(rows.values()))
        path = self.folder / f"{hashlib.sha256(names.encode()).hexdigest()[:24]}.safetensors"
        try:
            with atomic_path(path) as temporary:
                save_file({"rows": table}, temporary, {"names": names, "checksum": _checksum(names, table)})
        except (OSError, SafetensorError) as error:
            _log.warning("Not caching text embeddings: cannot write %s (%s)", path, error)


def _read(path: Path) -> tuple[list[str], Tensor]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        table: Tensor = file.get_tensor("rows")
    if _checksum(metadata["names"], table) != metadata["checksum"]:
        raise ValueError("checksum mismatch")
    return json.loads(metadata["names"]), table


def _checksum(names: str, table: Tensor) -> str:
    return hashlib.sha256(names.encode() + bytes(_bytes(table))).hexdigest()
