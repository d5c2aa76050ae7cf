"""Datasets of images with captions: COCO captions, JSON lines, a folder, or webdataset shards."""

import os
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clipdense.data.captions import captioned_images
from clipdense.data.datasets.images import EXTENSIONS, ShardHandler
from clipdense.data.datasets.layouts import DatasetDicts
from clipdense.data.datasets.registration import register_once
from clipdense.data.validation.report import DataError

__all__ = ["register_captions"]

ALL_CAPTIONS = 2**31
TEXT = ".txt"


def register_captions(name: str, source: str, image_root: str = "") -> None:
    """Register images with captions as a dataset of records with ``file_name``, ``image_id``, ``captions``.

    Args:
        name: of the dataset.
        source: one of four. A ``.json`` file of COCO captions. A ``.jsonl`` file, see `captioned_images`. A
            folder, searched with its subfolders, where each image has a text file of the same name
            (``a.jpg``, ``a.txt``) with one caption a line. Tar files of the webdataset library with the same
            pairs, with braces for several of them (``shards/{000..331}.tar``); they are read in place, see
            `register_images`.
        image_root: folder of the images of a ``.json`` or ``.jsonl`` file; by default that of the file.

    Raises:
        FileNotFoundError: If the file, the folder or a shard does not exist.
        ValueError: If the name is in use.
    """
    paths = [source]
    if source.endswith(".tar"):
        from webdataset.shardlists import expand_urls  # slow to import, and only shards need it

        paths = expand_urls(source)
        load = partial(_load_shards, paths)
    elif source.endswith((".json", ".jsonl")):
        load = partial(captioned_images, source, image_root, captions=ALL_CAPTIONS)
        paths = [source, image_root or source]
    else:
        load = partial(_load_folder, source)
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"captions of dataset {name}: {path} does not exist")
    register_once(name, load, {"captions": ":".join(filter(None, (source, image_root)))})


def _load_folder(folder: str) -> DatasetDicts:
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in EXTENSIONS)
    texts = ((str(file), file.with_suffix(TEXT)) for file in files)
    pairs = ((name, path.read_bytes()) for name, path in texts if path.is_file())
    return _records(pairs, folder, len(files))


def _load_shards(shards: list[str]) -> DatasetDicts:
    pairs: list[tuple[str, bytes]] = []
    images = 0
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as file:
                members = [member for member in file if member.isfile()]
                texts = {_stem(m.name): m for m in members if m.name.lower().endswith(TEXT)}
                for member in members:
                    if not member.name.lower().endswith(EXTENSIONS):
                        continue
                    images += 1
                    text = texts.get(_stem(member.name))
                    content = None if text is None else file.extractfile(text)
                    if content is not None:
                        place = f"{shard}?{member.offset_data}+{member.size}#{member.name}"
                        pairs.append((ShardHandler.PREFIX + place, content.read()))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{shard}: not an uncompressed tar file ({error})") from error
    return _records(pairs, ", ".join(shards), images)


def _stem(name: str) -> str:
    """Return the name of a shard's member up to the first dot of its last part, as webdataset does."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _records(pairs: Iterable[tuple[str, bytes]], source: str, images: int) -> DatasetDicts:
    records: list[dict[str, Any]] = []
    for index, (name, content) in enumerate(pairs):
        if captions := list(_captions(name, content)):
            records.append({"file_name": name, "image_id": index, "captions": captions})
    if not records:
        raise DataError(
            f"{source}: none of its {images} images has captions; expected a text file of the same name "
            "beside each image (a.jpg, a.txt), with one caption a line"
        )
    return records


def _captions(name: str, content: bytes) -> Iterator[str]:
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"captions of {name}: not a text in UTF-8 ({error.reason})") from error
    return (line.strip() for line in lines if line.strip())
