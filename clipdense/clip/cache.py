"""Where computed things are kept, and the hashes that they are kept under."""

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
    """A hash of what a module computes: its structure, and every byte of its parameters and buffers.

    Structure means the tree of submodules with their classes and plain settings (head counts, activations,
    eps, pooling). The bytes are read once an instance: the digest is kept until a tensor is replaced
    (`data_ptr`), written in place (`_version`: optimizers, `load_state_dict`), changes shape, dtype or
    device, or differs at one of 16 probed elements. The probe is for writes through `.data`, which leave no
    other trace; one that misses all probed elements goes unseen.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    structure = [_describe(name, m) for name, m in module.named_modules()]
    stamps = [(name, *_stamp(tensor)) for name, tensor in tensors]
    stamp = (structure, stamps, _probe([tensor for _, tensor in tensors]))
    if module in _digests and _digests[module][0] == stamp:
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
    version = -1 if tensor.is_inference() else tensor._version  # inference tensors count no writes
    return tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype, tensor.device


def _probe(tensors: list[Tensor]) -> list[list[float]]:
    samples: dict[torch.device, list[Tensor]] = {}  # one transfer a device
    for t in tensors:
        samples.setdefault(t.device, []).append(
            t.detach().reshape(-1)[:: max(1, t.numel() // 16)][:16].float()
        )
    return [torch.cat(parts).nan_to_num().tolist() for parts in samples.values()]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class RowStore:
    """Named float32 rows on disk, safe under several processes.

    A folder of immutable files, each written under a temporary name and then renamed: who reads sees whole
    files only, and two processes that write the same rows at once only do the work twice. A file that cannot
    be read, or whose bytes do not match its checksum, is removed with a warning, and its rows count as
    absent. A folder that cannot be written is a warning too, not an error. The folder may be deleted at any
    time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, list[str]] = {}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The rows (D,) of those names that are kept."""
        wanted, rows = set(names), dict[str, Tensor]()
        for path in sorted(self.folder.glob("*.safetensors")):
            if wanted.isdisjoint(self._files.get(path, wanted)):
                continue
            try:
                self._files[path], table = _read(path)
            except FileNotFoundError:  # another process has just removed it
                continue
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                _log.warning("text cache file %s is damaged (%s); its rows are computed again", path, error)
                self._files.pop(path, None)
                path.unlink(missing_ok=True)
                continue
            for name, row in zip(self._files[path], table, strict=True):
                if name in wanted:
                    rows[name] = row.clone()
            wanted -= rows.keys()
        return rows

    def write(self, rows: Mapping[str, Tensor]) -> None:
        """Keep rows (D,) float32 on the CPU."""
        names = json.dumps(list(rows))
        table = torch.stack(list(rows.values()))
        path = self.folder / f"{hashlib.sha256(names.encode()).hexdigest()[:24]}.safetensors"
        try:
            with atomic_path(path) as temporary:
                save_file({"rows": table}, temporary, {"names": names, "checksum": _checksum(names, table)})
        except (OSError, SafetensorError) as error:
            _log.warning("text embeddings are not kept: cannot write %s (%s)", path, error)


def _read(path: Path) -> tuple[list[str], Tensor]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        table: Tensor = file.get_tensor("rows")
    if _checksum(metadata["names"], table) != metadata["checksum"]:
        raise ValueError("checksum mismatch")
    return json.loads(metadata["names"]), table


def _checksum(names: str, table: Tensor) -> str:
    return hashlib.sha256(names.encode() + bytes(_bytes(table))).hexdigest()
