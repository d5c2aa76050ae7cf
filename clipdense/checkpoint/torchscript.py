"""Tensors of TorchScript archives, read without executing any of their code.

`torch.jit.load` runs the archive's own ``__setstate__`` methods, which may do anything. An archive is a zip
file: ``data.pkl`` is a pickled tree of modules, ``data/<n>`` are the bytes of its storages; ``code/`` is not
read here.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["read_torchscript_tensors"]

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Module:
    """A module of the archive: its attributes, and none of its behaviour."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_torchscript_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return every tensor of a TorchScript archive by its dotted name, as `state_dict` names it.

    Raises:
        ValueError: If the file is not such an archive, or its module tree refers to anything but modules,
            tensors and plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ValueError("it holds no data.pkl")
            root = names[0].removesuffix("data.pkl")
            with archive.open(names[0]) as file:
                tree = _Unpickler(
                    io.BytesIO(file.read()), lambda key: _read_stored(archive, f"{root}data/{key}")
                ).load()
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a TorchScript archive that can be read ({error})") from error
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: a damaged TorchScript archive ({error})") from error
    return dict(_tensors(tree, "", set()))


class _Unpickler(pickle.Unpickler):
    """Builds modules as `_Module` and tensors from bytes; every other name is refused."""

    def __init__(self, file: io.BytesIO, read: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._read = read
        self._storages: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":
            return _first if name.startswith(("build_", "restore_type_tag")) else self._refuse(module, name)
        return self._refuse(module, name)

    def persistent_load(self, pid: Any) -> tuple[torch.UntypedStorage, torch.dtype]:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"an unknown record {kind!r}")
        if key not in self._storages:
            content = self._read(str(key))
            if len(content) < count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} is cut short")
            self._storages[key] = torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()
        return self._storages[key], dtype

    @staticmethod
    def _refuse(module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a record as torch writes it, without compression: a small file cannot fill the memory."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"record {name} is compressed")
    return archive.read(name)


def _rebuild_tensor(
    storage: tuple[torch.UntypedStorage, torch.dtype],
    offset: int,
    size: tuple[int, ...],
    stride: Any,
    *_: Any,
) -> Tensor:
    untyped, dtype = storage
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else offset - 1
    if offset < 0 or min((*stride, 0)) < 0 or (last + 1) * dtype.itemsize > untyped.nbytes():
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return torch.empty(0, dtype=dtype).set_(untyped, offset, size, stride)


def _first(value: Any, *_: Any) -> Any:
    return value


def _tensors(node: Any, prefix: str, parents: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(node) in parents:
        raise ValueError("a module tree that contains itself")
    for name, value in vars(node).items() if isinstance(node, _Module) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.", parents | {id(node)})
