"""Text files of any length, one record a line, of which every process reads only the lines that it needs."""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
from filelock import FileLock
from torch.utils.data import Dataset

from clipdense.data.validation.report import DataError
from clipdense.files import cache_dir, write_atomically

__all__ = ["BLOCK", "LazyRecords", "LineFile", "built_once", "open_lines", "save_offsets"]

BLOCK = 2**16
"""Number of consecutive lines that are shuffled together, see `clipdense.data.samplers.ShardSampler`."""
_VERSION = 1

Record = dict[str, Any]


class LineFile(Sequence[bytes]):
    """Lines of a file, mapped into memory; processes share the pages, and pickling keeps only the paths.

    Args:
        path: of the text.
        offsets: file of `save_offsets`.
    """

    def __init__(self, path: str | os.PathLike[str], offsets: str | os.PathLike[str]) -> None:
        self.path, self.offsets = os.fspath(path), os.fspath(offsets)
        self._starts = np.load(self.offsets, mmap_mode="r")
        self._text = np.memmap(self.path, np.uint8, "r")

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        text: bytes = self._text[self._starts[index] : self._starts[index + 1]].tobytes()
        return text.rstrip(b"\r\n")

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path, "offsets": self.offsets}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["path"], state["offsets"])  # type: ignore[misc]


class LazyRecords(Dataset[Record], Sequence[Record]):
    """Dataset dicts that are made from the lines of a file when they are asked for.

    Args:
        lines: one for each record.
        record: makes the record of a number and its line. It raises a `BadImageError` if the sample is
            damaged, which the training loader handles as a damaged image.
        parts: numbers of consecutive records that are stored together; their sum is the number of lines.
            Default: blocks of `BLOCK` lines.
    """

    def __init__(
        self,
        lines: LineFile,
        record: Callable[[int, bytes], Record],
        parts: Sequence[int] | None = None,
    ) -> None:
        self.lines, self.record = lines, record
        if parts is None:
            parts = [min(BLOCK, len(lines) - start) for start in range(0, len(lines), BLOCK)]
        self.parts = list(parts)

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = index + len(self) if index < 0 else index
        return self.record(index, self.lines[index])


def open_lines(path: str, check: Callable[[bytes], object], kind: str) -> LineFile:
    """Open a file by lines. Its lines are found and checked once; the result is kept in the cache folder.

    Args:
        path: of the file.
        check: raises a ValueError for a line that is malformed.
        kind: name of the check; the file is checked anew for another one.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If the file is empty.
        ValueError: If a line is malformed; names it.
    """
    stat = os.stat(path)
    if not stat.st_size:
        raise DataError(f"no images in {path}")
    key = (_VERSION, kind, str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns)
    target = cache_dir() / "lines" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npy"
    with built_once(target) as missing:
        if missing:
            save_offsets(target, _checked(path, check))
    return LineFile(path, target)


def _checked(path: str, check: Callable[[bytes], object]) -> Iterator[bytes]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                check(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            yield line


def save_offsets(target: Path, lines: Iterator[bytes]) -> None:
    """Save the place of each line of a file, for `LineFile`."""
    starts = array("Q", [0])
    for line in lines:
        starts.append(starts[-1] + len(line))
    write_atomically(target, lambda file: np.save(file, np.frombuffer(starts, np.uint64)))


@contextmanager
def built_once(target: Path) -> Iterator[bool]:
    """Yield whether a file of the cache is missing, to one process at a time."""
    if target.exists():
        yield False
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        yield not target.exists()
