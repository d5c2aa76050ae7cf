"""Files here or, through fsspec, on other machines: ``s3://``, ``gs://``, ``http://`` and others."""

import glob
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

__all__ = ["FileStamp", "expand_pattern", "file_stamp", "is_remote", "open_file", "read_range"]

_DELAYS = (0.5, 2.0)
"""Seconds before the second and the third attempt to read from another machine."""
_BLOCK = 2**22
_VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "updated", "generation", "created")


@dataclass(frozen=True)
class FileStamp:
    """What tells whether a file has changed.

    Attributes:
        size: in bytes.
        version: time of the last change, or the server's tag; "" if it has none.
    """

    size: int
    version: str


def is_remote(path: str) -> bool:
    """Return whether a path has a protocol, such as ``s3://bucket/a.tar``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def file_stamp(path: str) -> FileStamp:
    """Return size and version of a file.

    Raises:
        FileNotFoundError: If it does not exist, or cannot be reached; names it and the reason.
        ImportError: If the package of its protocol is not installed; names it.
        ValueError: If the protocol is unknown, or the server does not tell the size.
    """
    if not is_remote(path):
        try:
            stat = os.stat(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist") from error
        return FileStamp(stat.st_size, str(stat.st_mtime_ns))
    files, name = _file_system(path)
    try:
        info = files.info(name)
    except Exception as error:  # each protocol has errors of its own
        raise FileNotFoundError(f"{path} does not exist or cannot be reached ({_reason(error)})") from error
    if info.get("size") is None:
        raise ValueError(f"{path}: the server does not tell its size, which reading parts of it needs")
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return FileStamp(int(info["size"]), version)


def expand_pattern(pattern: str) -> list[str]:
    """Expand braces and wildcards: ``part-{000..331}.tar``, ``s3://bucket/part-*.tar``.

    Returns:
        Paths in the order of the pattern; those of a wildcard are sorted.

    Raises:
        FileNotFoundError: If no file matches a wildcard.
    """
    from webdataset.shardlists import expand_urls  # slow to import, and only shards need it

    paths: list[str] = []
    for part in expand_urls(pattern):
        if "*" not in part:
            paths.append(part)
        elif found := sorted(_matches(part)):
            paths += found
        else:
            raise FileNotFoundError(f"no file matches {part}")
    return paths


def _matches(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return glob.glob(pattern)
    files, name = _file_system(pattern)
    try:
        return [str(files.unstrip_protocol(found)) for found in files.glob(name)]
    except Exception as error:  # each protocol has errors of its own
        raise FileNotFoundError(f"{pattern} cannot be listed ({_reason(error)})") from error


@contextmanager
def open_file(path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading in any order.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    if not is_remote(path):
        with open(path, "rb") as local:
            yield local
        return
    files, name = _file_system(path)
    with files.open(name, "rb", block_size=_BLOCK) as remote:
        yield remote


def read_range(path: str, start: int, size: int) -> bytes:
    """Read a part of a file; reading from another machine is tried three times.

    Args:
        path: of the file.
        start: first byte.
        size: number of bytes.

    Raises:
        FileNotFoundError: If the file does not exist.
        OSError: If the bytes cannot be read, or are not in the file.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read(size)
    else:
        content = _read_remote(path, start, size)
    if len(content) > size:
        raise OSError(f"{path}: the server does not answer requests for parts of a file")
    if len(content) < size:
        raise OSError(
            f"{path}: it ends {size - len(content)} bytes too early; it has changed or is truncated"
        )
    return content


def _read_remote(path: str, start: int, size: int) -> bytes:
    files, name = _file_system(path)
    for delay in (*_DELAYS, None):
        try:
            content: bytes = files.cat_file(name, start=start, end=start + size)
        except FileNotFoundError:
            raise
        except Exception as error:  # each protocol has errors of its own
            if delay is None:
                raise OSError(f"{path} cannot be read ({_reason(error)})") from error
            time.sleep(delay)
        else:
            return content
    raise AssertionError("the last attempt returns or raises")


def _file_system(path: str) -> tuple[Any, str]:
    """Return fsspec's file system of a path (one for each process), and the name of the file in it."""
    try:
        from fsspec.core import url_to_fs  # slow to import, and only remote files need it
    except ImportError as error:
        raise ImportError(f'{path} needs the package fsspec: pip install "clipdense[scale]"') from error
    try:
        files, name = url_to_fs(path)
    except ImportError as error:  # "Install s3fs to access S3"
        raise ImportError(f"{path}: {error} (with pip)") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return files, str(name)


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}"
