"""Shards: tar files of the webdataset library, here or on other machines, with samples read in any order.

The place of every sample is found once, from the headers of the shards or from index files beside them. A
dataset of shards is therefore shuffled, distributed among processes and resumed like any other, and each
process reads the bytes of its own samples only.
"""

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from iopath.common.file_io import PathHandler
from tqdm import tqdm

from clipdense.data.image import BadImageError, BadSampleError
from clipdense.data.lines import LazyRecords, LineFile, built_once, save_offsets
from clipdense.data.remote import FileStamp, expand_pattern, file_stamp, is_remote, open_file, read_range
from clipdense.data.validation.report import DataError
from clipdense.files import cache_dir, json_text, write_atomically, write_text

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

__all__ = [
    "EXTENSIONS",
    "Companion",
    "ShardHandler",
    "ShardSample",
    "index_shard",
    "open_shards",
    "shard_records",
    "write_index",
]

logger = logging.getLogger(__name__)

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

Companion = Literal["", ".txt", ".json"]
"""File that a sample needs beside its image: captions, one a line, or a JSON list of mask-category pairs."""
_CONTENT: dict[Companion, str] = {
    "": "images",
    ".txt": "captions; expected a text file of the same name beside each image (a.jpg, a.txt), with one "
    "caption a line",
    ".json": "mask-category pairs; expected a JSON file of the same name beside each image (a.jpg, a.json), "
    "with a list of pairs",
}
_INDEX = ".index"
_VERSION = 1
_THREADS = 16
_ADJACENT = 2**13
"""Image and text are read together if at most so many bytes lie between them (headers, other small files)."""


@dataclass(frozen=True)
class ShardSample:
    """Place of a sample.

    Attributes:
        shard: path of the tar file.
        name: of the image in it.
        image: first byte and size of the image.
        text: first byte and size of the companion; None if it is not needed.
        item: number of the pair in the companion.
    """

    shard: str
    name: str
    image: tuple[int, int]
    text: tuple[int, int] | None = None
    item: int = 0

    @property
    def file_name(self) -> str:
        """Path of the image for Detectron2's ``PathManager``, see `ShardHandler`."""
        return f"{ShardHandler.PREFIX}{self.shard}?{self.image[0]}+{self.image[1]}#{self.name}"

    def read_text(self) -> str:
        """Read the companion.

        Raises:
            BadSampleError: If it cannot be read, or is not UTF-8.
        """
        assert self.text is not None
        start, size = self.text
        first, last = min(self.image[0], start), max(sum(self.image), start + size)
        try:
            if is_remote(self.shard) and last - first <= self.image[1] + size + _ADJACENT:
                _last_read.keep(self.shard, first, last - first)
            return _last_read.read(self.shard, start, size).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSampleError(
                f"{self.file_name}: its companion is not a text in UTF-8 ({error.reason})"
            ) from error
        except OSError as error:
            raise BadSampleError(f"{self.file_name}: its companion cannot be read ({error})") from error


class _LastRead:
    """The part of a remote shard that was read last: an image is read together with its text."""

    def __init__(self) -> None:
        self._part: tuple[str, int, bytes] = ("", 0, b"")

    def keep(self, shard: str, start: int, size: int) -> None:
        """Read a part, and keep it."""
        self._part = (shard, start, read_range(shard, start, size))

    def read(self, shard: str, start: int, size: int) -> bytes:
        """Return bytes from the kept part if they are there, else from the shard."""
        kept, first, content = self._part
        if kept == shard and first <= start and start + size <= first + len(content):
            return content[start - first : start - first + size]
        return read_range(shard, start, size)


_last_read = _LastRead()


class ShardHandler(PathHandler):
    """Path handler for files inside uncompressed tar files: ``shard://TAR?OFFSET+SIZE#NAME``."""

    PREFIX = "shard://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        shard, _, place = path.removeprefix(self.PREFIX).partition("#")[0].rpartition("?")
        offset, size = map(int, place.split("+"))
        try:
            return io.BytesIO(_last_read.read(shard, offset, size))
        except OSError as error:
            raise BadImageError(f"{path}: cannot be read ({error})") from error


PathManager.register_handler(ShardHandler())


def open_shards(name: str, pattern: str) -> list[str]:
    """Return the paths of the shards that a pattern names, all of which can be reached.

    Args:
        name: of the dataset, for messages.
        pattern: see `expand_pattern`.

    Raises:
        FileNotFoundError: If no shard matches, or one does not exist or cannot be reached.
        ImportError: If the package of a protocol is not installed.
    """
    try:
        shards = expand_pattern(pattern)
        _stamps(shards)
    except (FileNotFoundError, ImportError) as error:
        raise type(error)(f"shards of dataset {name}: {error}") from error
    return shards


def _stamps(shards: Sequence[str]) -> list[FileStamp]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(file_stamp, shards))


# ---- the index of one shard


def index_shard(shard: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Find the images in a tar file, and their companions, from the headers.

    Returns:
        An entry for each image: ``name``, ``image`` (first byte and size), and if they are there ``.txt``
        (first byte and size) and ``.json`` (first byte, size and number of items of its list). And the
        extensions in the shard, sorted.

    Raises:
        ValueError: If it is not an uncompressed, complete tar file.
    """
    images: list[tuple[str, list[int]]] = []
    companions: dict[tuple[str, str], list[int]] = {}
    extensions = set()
    try:
        with open_file(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else a large shard's headers stay in memory
                if not member.isfile():
                    continue
                name, place = member.name, [member.offset_data, member.size]
                extension = Path(name.lower()).suffix
                extensions.add(extension)
                if extension in EXTENSIONS:
                    images.append((name, place))
                elif extension == ".txt":
                    companions[_stem(name), extension] = place
                elif extension == ".json":
                    content = tar.extractfile(member)
                    items = _count_items(b"" if content is None else content.read())
                    companions[_stem(name), extension] = [*place, items]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{shard}: not an uncompressed tar file, or a truncated one ({error})") from error
    entries = []
    for name, place in images:
        found = {key: companions.get((_stem(name), key)) for key in (".txt", ".json")}
        entries.append({"name": name, "image": place, **{k: v for k, v in found.items() if v is not None}})
    return entries, sorted(extensions)


def _stem(name: str) -> str:
    """Return the name of a shard's member up to the first dot of its last part, as webdataset does."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _count_items(content: bytes) -> int:
    """Return the length of a JSON list; 0 for anything else."""
    try:
        items = json.loads(content)
    except (ValueError, RecursionError):
        return 0
    return len(items) if isinstance(items, list) else 0


def write_index(shard: str) -> int:
    """Write the index of a local shard beside it (``a.tar.index``), and return its number of images.

    Raises:
        FileNotFoundError: If the shard does not exist.
        ValueError: If it is on another machine, or not an uncompressed, complete tar file.
    """
    if is_remote(shard):
        raise ValueError(
            f"{shard} is on another machine: write its index there, or index a copy and upload it"
        )
    size = file_stamp(shard).size
    entries, extensions = index_shard(shard)
    head = {"version": _VERSION, "size": size, "extensions": extensions}
    lines = (json.dumps(line, separators=(",", ":")) + "\n" for line in (head, *entries))
    write_text(f"{shard}{_INDEX}", "".join(lines))
    return len(entries)


def _entries(job: tuple[str, FileStamp]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the index of a shard from the file beside it, or else from its headers."""
    shard, stamp = job
    path = f"{shard}{_INDEX}"
    try:
        with open_file(path) as file:
            head, *entries = map(json.loads, file)
        if head["version"] == _VERSION and head["size"] == stamp.size:
            return entries, head["extensions"]
        logger.warning("%s belongs to another %s; reading the headers of the shard instead", path, shard)
    except FileNotFoundError:
        if is_remote(shard):
            logger.warning("%s has no %s beside it: reading all of it to find its samples", shard, _INDEX)
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("%s is damaged (%s); reading the headers of %s instead", path, error, shard)
    return index_shard(shard)


# ---- the index of a dataset


def shard_records(shards: Sequence[str], companion: Companion, record: Any) -> LazyRecords:
    """Return dataset dicts of the samples in shards, which are read when they are asked for.

    The index of all shards is made once and kept in the cache folder, where all processes read it.

    Args:
        shards: paths.
        companion: samples without it are left out. For ".json", every item of its list is a sample.
        record: makes the record of a number and a `ShardSample`.

    Raises:
        DataError: If a shard has no image with the companion; names the shard and its extensions.
        ValueError: If a shard is not an uncompressed tar file, or a server reads whole files only.
    """
    stamps = _stamps(shards)
    key = json_text(
        [_VERSION, companion, [[s, t.size, t.version] for s, t in zip(shards, stamps, strict=True)]]
    )
    folder = cache_dir() / "shards" / hashlib.sha256(key.encode()).hexdigest()[:32]
    with built_once(folder / "shards.json") as missing:
        if missing:
            _build(folder, list(zip(shards, stamps, strict=True)), companion)
    counts: list[int] = json.loads((folder / "shards.json").read_text())
    lines = LineFile(folder / "samples.jsonl", folder / "samples.npy")
    return LazyRecords(lines, partial(_make_record, list(shards), companion, record), counts)


def _make_record(
    shards: list[str], companion: Companion, record: Any, index: int, line: bytes
) -> dict[str, Any]:
    entry = json.loads(line)
    start, size = entry["image"]
    text = tuple(entry[companion][:2]) if companion else None
    sample = ShardSample(shards[entry["shard"]], entry["name"], (start, size), text, entry.get("item", 0))
    made: dict[str, Any] = record(index, sample)
    return made


def _build(folder: Path, jobs: Sequence[tuple[str, FileStamp]], companion: Companion) -> None:
    """Write the index of a dataset: ``samples.jsonl``, ``samples.npy`` and, at the end, ``shards.json``."""
    shard, stamp = jobs[0]
    if is_remote(shard):
        try:
            read_range(shard, 0, min(512, stamp.size))
        except OSError as error:
            raise ValueError(str(error)) from error
    counts = [0] * len(jobs)

    def lines() -> Iterator[bytes]:
        left_out = 0
        for number, (entries, extensions) in enumerate(_indices(jobs)):
            kept = list(_with_companion(entries, companion))
            if not kept:
                raise DataError(
                    f"{jobs[number][0]}: none of its {len(entries)} images has {_CONTENT[companion]}; the "
                    f"files in it end in {', '.join(filter(None, extensions)) or 'nothing'}"
                    if entries
                    else f"no images ({', '.join(EXTENSIONS)}) in {jobs[number][0]}; the files in it end in "
                    f"{', '.join(filter(None, extensions)) or 'nothing'}"
                )
            left_out += len(entries) - len({tuple(entry["image"]) for entry in kept})
            counts[number] = len(kept)
            for entry in kept:
                yield json.dumps({**entry, "shard": number}, separators=(",", ":")).encode() + b"\n"
        if left_out:
            logger.warning("Left out %d images without %s", left_out, _CONTENT[companion].partition(";")[0])

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "samples.jsonl", lambda file: file.writelines(lines()))
    with (folder / "samples.jsonl").open("rb") as written:
        save_offsets(folder / "samples.npy", iter(written))
    write_text(folder / "shards.json", json_text(counts))


def _indices(
    jobs: Sequence[tuple[str, FileStamp]],
) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Yield the index of each shard; some are read at the same time."""
    quiet = None if comm.is_main_process() else True
    with (
        tqdm(total=len(jobs), desc="Reading headers", unit="shard", disable=quiet) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        for start in range(0, len(jobs), 4 * _THREADS):  # bounds what waits in memory
            for found in pool.map(_entries, jobs[start : start + 4 * _THREADS]):
                yield found
                bar.update()


def _with_companion(
    entries: Iterable[Mapping[str, Any]], companion: Companion
) -> Iterator[Mapping[str, Any]]:
    """Yield the entries that have a companion: with one item each, if it is a list."""
    for entry in entries:
        if companion == ".json":
            for item in range(entry[companion][2] if companion in entry else 0):
                yield {**entry, "item": item}
        elif not companion or companion in entry:
            yield entry
