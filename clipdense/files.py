"""Atomic writing of files, and the cache folder."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs

__all__ = [
    "WriteError",
    "atomic_path",
    "cache_dir",
    "file_sha256",
    "json_text",
    "read_text",
    "remove_leftovers",
    "write_atomically",
    "write_error",
    "write_text",
]

_LOW_SPACE = 2**30
_CHUNK = 2**20
# Errors of the disk itself; when they come from a write, they do not name the file.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


class WriteError(OSError):
    """A file could not be written; the message names the file, the reason and the free space if it is low."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` if the block succeeds and is removed if it fails.

    Whatever happens meanwhile (full disk, Ctrl-C, kill), ``path`` holds either its old content or all of the
    new content. The parent folder is created. The temporary path has the same name, in a hidden folder beside
    ``path``: what a library leaves beside the file that it writes is removed, too. Temporary folders that a
    killed process left for the same target are removed; the folder of a living process is locked and stays.

    Args:
        path: file to write.

    Raises:
        WriteError: If the disk is full or fails within the block.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, glob.escape(path.name))
    folder = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)
    handle = os.open(folder, os.O_RDONLY)
    partial = Path(folder, path.name)
    try:
        with suppress(OSError):  # file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield partial
        except OSError as error:
            if error.errno in _DISK_ERRORS and error.filename in (None, str(partial)):
                raise write_error(path, error) from error
            raise
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # some libraries create private files
        partial.replace(path)
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike[str], pattern: str) -> None:
    """Delete the temporary folders that killed processes left within `atomic_path`; those in use stay.

    Args:
        folder: folder of the files.
        pattern: glob pattern of the files' names.
    """
    for leftover in Path(folder).glob(f".{pattern}.????????/"):
        with suppress(OSError):  # locked, or removed meanwhile
            handle = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover)
            finally:
                os.close(handle)


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a binary file as a whole or not at all (see `atomic_path`).

    Args:
        path: file to write.
        write: fills the open binary file.

    Raises:
        WriteError: If the file cannot be written; the old file is unchanged.
    """
    try:
        with atomic_path(path) as partial, partial.open("wb") as file:
            write(file)
    except WriteError:
        raise
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        raise write_error(path, error) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file as a whole or not at all (see `atomic_path`).

    Raises:
        WriteError: If the file cannot be written; the old file is unchanged.
    """
    write_atomically(path, lambda file: file.write(text.encode()))


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not UTF-8; names it.
    """
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start})") from error


def json_text(content: Any, indent: int | None = None) -> str:
    """Format JSON-ready content as JSON that every parser reads: NaN and infinite numbers become null.

    Args:
        content: dicts, lists, strings, numbers, booleans and None.
        indent: spaces per level; None for a single line.
    """
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content


def write_error(path: str | os.PathLike[str], error: BaseException) -> WriteError:
    """Return a `WriteError` with the reason that the operating system gave, and the free space if it is low.

    Args:
        path: file that could not be written.
        error: exception of the library that wrote it; its causes are searched for an OSError.
    """
    folder, cause = Path(path).parent, error
    while not isinstance(cause, OSError) and (earlier := cause.__cause__ or cause.__context__):
        cause = earlier
    reason, number = str(error), None
    if isinstance(cause, OSError):
        reason, number = cause.strerror or reason, cause.errno
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < _LOW_SPACE or number in (errno.ENOSPC, errno.EDQUOT):
            reason += f" ({free / 2**20:.0f} MB free in {folder})"
    return WriteError(f"cannot write {Path(path)}: {reason}")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cache_dir() -> Path:
    """Return the cache folder: ``$CLIPDENSE_CACHE``, by default ``clipdense`` in the user's cache folder."""
    folder = os.environ.get("CLIPDENSE_CACHE")
    return Path(folder).expanduser() if folder else Path(platformdirs.user_cache_dir("clipdense"))
