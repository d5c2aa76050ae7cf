"""Datasets of images with captions: COCO captions, JSON lines, a folder, or webdataset shards."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from clipdense.data.captions import caption_line, captioned_images
from clipdense.data.datasets.images import is_lazy
from clipdense.data.datasets.registration import register_once
from clipdense.data.image import BadSampleError
from clipdense.data.lines import LazyRecords, open_lines
from clipdense.data.shards import EXTENSIONS, ShardSample, open_shards, shard_records
from clipdense.data.validation.report import DataError

__all__ = ["register_captions"]

ALL_CAPTIONS = 2**31
TEXT: Literal[".txt"] = ".txt"


def register_captions(name: str, source: str, image_root: str = "") -> None:
    """Register images with captions as a dataset of records with ``file_name``, ``image_id``, ``captions``.

    Args:
        name: of the dataset.
        source: one of four. A ``.json`` file of COCO captions. A ``.jsonl`` file of any length, see
            `captioned_images`, which is read line by line. A folder, searched with its subfolders, where each
            image has a text file of the same name (``a.jpg``, ``a.txt``) with one caption a line. Tar files
            of the webdataset library with the same pairs, here or on another machine, with braces or
            wildcards for several of them (``shards/{000..331}.tar``, ``s3://bucket/part-*.tar``), see
            `clipdense.data.shards`.
        image_root: folder of the images of a ``.json`` or ``.jsonl`` file; by default that of the file.

    Raises:
        FileNotFoundError: If the file, the folder or a shard does not exist.
        ValueError: If the name is in use.
    """
    load: Callable[[], Sequence[dict[str, Any]]]
    paths = [source]
    if source.endswith(".tar"):
        load = partial(shard_records, open_shards(name, source), TEXT, _shard_record)
        paths = []
    elif source.endswith((".json", ".jsonl")):
        if source.endswith(".jsonl"):
            load = partial(_load_lines, source, image_root or os.path.dirname(source))
        else:
            load = partial(captioned_images, source, image_root, captions=ALL_CAPTIONS)
        paths = [source, image_root or source]
    else:
        load = partial(_load_folder, source)
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"captions of dataset {name}: {path} does not exist")
    entry = ":".join(filter(None, (source, image_root)))
    register_once(name, load, {"captions": entry}, {"lazy": is_lazy(source)})


def _shard_record(index: int, sample: ShardSample) -> dict[str, Any]:
    captions = _lines(sample.read_text())
    if not captions:
        raise BadSampleError(f"{sample.file_name}: its text file holds no caption")
    return {"file_name": sample.file_name, "image_id": index, "captions": captions}


def _load_lines(path: str, image_root: str) -> LazyRecords:
    return LazyRecords(open_lines(path, caption_line, "captions"), partial(_line_record, image_root))


def _line_record(image_root: str, index: int, line: bytes) -> dict[str, Any]:
    record = caption_line(line)
    if not record["captions"]:
        raise BadSampleError(f"{record['file_name']}: its line holds no caption")
    return {**record, "file_name": os.path.abspath(os.path.join(image_root, record["file_name"]))}


def _load_folder(folder: str) -> list[dict[str, Any]]:
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in EXTENSIONS)
    texts = ((str(file), file.with_suffix(TEXT)) for file in files)
    pairs = ((name, path.read_bytes()) for name, path in texts if path.is_file())
    return _records(pairs, folder, len(files))


def _records(pairs: Iterable[tuple[str, bytes]], source: str, images: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for index, (name, content) in enumerate(pairs):
        if captions := _captions(name, content):
            records.append({"file_name": name, "image_id": index, "captions": captions})
    if not records:
        raise DataError(
            f"{source}: none of its {images} images has captions; expected a text file of the same name "
            "beside each image (a.jpg, a.txt), with one caption a line"
        )
    return records


def _captions(name: str, content: bytes) -> list[str]:
    try:
        return _lines(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"captions of {name}: not a text in UTF-8 ({error.reason})") from error


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
