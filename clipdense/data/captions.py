"""Captioned images from a registered dataset, COCO captions or JSON lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from clipdense.data.checks import check_named_datasets
from clipdense.data.datasets.layouts import load_captions

from detectron2.data import DatasetCatalog

__all__ = ["caption_line", "captioned_images"]


def captioned_images(
    data: str, image_root: str = "", *, captions: int = 1, images: int | None = None
) -> list[dict[str, Any]]:
    """Load images with their captions.

    Args:
        data: a registered dataset whose dicts have ``captions``; a ``.json`` file of COCO captions; or a
            ``.jsonl`` file with ``file_name``, ``captions`` (a list) and optionally ``image_id`` in each
            line.
        image_root: folder of a file's images (default: the folder of the file).
        captions: number of captions of each image, the first ones.
        images: number of images, the first ones; None for all.

    Returns:
        Dicts with ``file_name`` (absolute), ``image_id`` and ``captions``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the dataset is not registered, or the data have no captions.
    """
    path = Path(data)
    if path.suffix in (".json", ".jsonl"):
        root = image_root or str(path.parent)
        records = load_captions(data, root) if path.suffix == ".json" else _load_lines(path, root)
    else:
        check_named_datasets([data])
        records = DatasetCatalog.get(data)
    if not records or "captions" not in records[0]:
        raise ValueError(f"{data}: no image has captions")
    return [
        {
            "file_name": _absolute(record["file_name"]),
            "image_id": record["image_id"],
            "captions": list(record["captions"][:captions]),
        }
        for record in records[:images]
    ]


def _absolute(name: str) -> str:
    return name if "://" in name else os.path.abspath(name)  # else it is a file of a shard


def caption_line(line: bytes) -> dict[str, Any]:
    """Parse a line of a ``.jsonl`` file of captions.

    Returns:
        ``file_name``, ``image_id`` (default: the file name) and ``captions``, as they stand there.

    Raises:
        ValueError: If it is not JSON with these entries.
    """
    try:  # JSON finds the encoding
        record = json.loads(line)
        name, captions = record["file_name"], record["captions"]
        if not isinstance(name, str) or not isinstance(captions, list):
            raise TypeError("file_name is not text, or captions are not a list")
        captions = list(map(str, captions))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no file_name and captions ({error!r})") from error
    return {"file_name": name, "image_id": record.get("image_id", name), "captions": captions}


def _load_lines(path: Path, root: str) -> list[dict[str, Any]]:
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = caption_line(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            records.append({**record, "file_name": os.path.join(root, record["file_name"])})
    return records
