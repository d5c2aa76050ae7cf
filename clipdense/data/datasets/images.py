"""Datasets of images without annotations: a folder, a list, or webdataset shards."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clipdense.data.datasets.registration import register_once
from clipdense.data.json_files import load_json
from clipdense.data.lines import LazyRecords, open_lines
from clipdense.data.shards import EXTENSIONS, ShardSample, open_shards, shard_records
from clipdense.data.validation.report import DataError

__all__ = ["is_lazy", "register_images"]

_LISTS = (".txt", ".jsonl")

Records = Sequence[dict[str, Any]]


def register_images(name: str, source: str, image_root: str = "") -> None:
    """Register images as a dataset of records with ``file_name`` and ``image_id``.

    Args:
        name: of the dataset.
        source: one of four. A folder, searched with all its subfolders. A list of any length, which is read
            line by line: a ``.txt`` file of image names, or a ``.jsonl`` file with ``file_name`` and,
            optionally, ``image_id`` in each line. A JSON file with the list ``images`` of COCO's format
            (``id``, ``file_name``); its other entries are ignored. Tar files of the webdataset library, here
            or on another machine, with braces or wildcards for several of them
            (``shards/{000..331}.tar``, ``s3://bucket/part-*.tar``), see `clipdense.data.shards`.
        image_root: folder of the images of a list; needed for a JSON file, and otherwise by default that of
            the list.

    Raises:
        FileNotFoundError: If the folder, the file or a shard does not exist.
        ValueError: If the name is in use, or a JSON list has no image folder.
    """
    load: Callable[[], Records]
    if source.endswith(".tar"):
        load = partial(shard_records, open_shards(name, source), "", _shard_record)
        paths = []
    elif source.endswith(_LISTS):
        paths = [source, *filter(None, [image_root])]
        load = partial(_load_lines, source, image_root or os.path.dirname(source))
    elif source.endswith(".json"):
        if not image_root:
            raise ValueError(
                f"dataset {name}: {source} needs the folder of its images: write {name}:{source}:image_folder"
            )
        paths = [source, image_root]
        load = partial(_load_list, source, image_root)
    else:
        paths = [source]
        load = partial(_load_folder, source)
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"images of dataset {name}: {path} does not exist")
    entry = ":".join(filter(None, (source, image_root)))
    register_once(name, load, {"images": entry}, {"lazy": is_lazy(source)})


def is_lazy(source: str) -> bool:
    """Return whether the records of a source are read when they are asked for, not all at once."""
    return source.endswith((".tar", *_LISTS))


def _shard_record(index: int, sample: ShardSample) -> dict[str, Any]:
    return {"file_name": sample.file_name, "image_id": index}


def _load_lines(path: str, image_root: str) -> LazyRecords:
    parse = _json_line if path.endswith(".jsonl") else _name_line
    return LazyRecords(open_lines(path, parse, parse.__name__), partial(_line_record, parse, image_root))


def _line_record(
    parse: Callable[[bytes], tuple[str, Any]], image_root: str, index: int, line: bytes
) -> dict[str, Any]:
    name, identity = parse(line)
    return {
        "file_name": os.path.join(image_root, name),
        "image_id": index if identity is None else identity,
    }


def _name_line(line: bytes) -> tuple[str, None]:
    try:
        name = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not text in UTF-8 ({error.reason})") from error
    if not name:
        raise ValueError("it is empty; expected the name of an image")
    return name, None


def _json_line(line: bytes) -> tuple[str, Any]:
    try:
        record = json.loads(line)
        name, identity = record["file_name"], record.get("image_id")
        if not isinstance(name, str):
            raise TypeError("file_name is not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no file_name ({error!r})") from error
    return name, identity


def _load_folder(folder: str) -> list[dict[str, Any]]:
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in EXTENSIONS)
    return _records(map(str, files), folder)


def _load_list(json_file: str, image_root: str) -> list[dict[str, Any]]:
    content = load_json(json_file)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(f'{json_file}: no list of images; expected an object with "images", as in COCO files')
    records: dict[int | str, dict[str, Any]] = {}
    for index, image in enumerate(images):
        entry = image if isinstance(image, dict) else {}
        identity, name = entry.get("id"), entry.get("file_name")
        if isinstance(identity, bool) or not isinstance(identity, int | str) or not isinstance(name, str):
            raise DataError(f"{json_file}: images[{index}] has no id and file_name: {str(image)[:60]}")
        if identity in records:
            raise DataError(
                f"{json_file}: two images with id {identity!r}: {records[identity]['file_name']} and {name}; "
                "give each an id of its own"
            )
        records[identity] = {"file_name": os.path.join(image_root, name), "image_id": identity}
    if not records:
        raise DataError(f"no images in {json_file}")
    return list(records.values())


def _records(names: Iterable[str], source: str) -> list[dict[str, Any]]:
    records = [{"file_name": name, "image_id": i} for i, name in enumerate(names)]
    if not records:
        raise ValueError(f"no images ({', '.join(EXTENSIONS)}) in {source}")
    return records
