"""Conversions of the user's own data, kept in the cache folder until a source file changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipdense.data.preparation.files import map_in_threads, save_image
from clipdense.data.validation.report import DataError, Report
from clipdense.files import cache_dir, write_text

__all__ = ["converted_json", "converted_labels", "converted_path", "void_label"]

logger = logging.getLogger(__name__)

_VERSION = 1
"""Of the conversions: a change makes cached files void."""

Labels = npt.NDArray[np.int64]


def void_label(num_classes: int) -> int:
    """Return the label of pixels without a class in converted maps: 255, or 65535 beyond 255 classes."""
    return 255 if num_classes <= 255 else 65535


def converted_path(kind: str, options: Iterable[str], sources: Iterable[str | os.PathLike[str]]) -> Path:
    """Return the place in the cache for a conversion; it changes with every stamp of the sources.

    Args:
        kind: name of the conversion.
        options: what else the result depends on.
        sources: files and folders that are read.
    """
    stamps = []
    for source in sorted({os.path.abspath(source) for source in sources}):
        status = os.stat(source)
        stamps.append((source, status.st_size, status.st_mtime_ns))
    digest = hashlib.sha256(repr((_VERSION, kind, list(options), stamps)).encode()).hexdigest()[:32]
    return cache_dir() / "converted" / f"{kind}_{digest}"


def converted_json(
    kind: str,
    options: Iterable[str],
    sources: Iterable[str | os.PathLike[str]],
    convert: Callable[[], tuple[dict[str, Any], Report]],
) -> Path:
    """Convert annotations to a COCO file in the cache, unless that was done from the same sources.

    Args:
        kind, options, sources: see `converted_path`.
        convert: returns the content of the file, and what was found in the sources.

    Raises:
        DataError: If the sources have a fault; names the file and the line.
    """
    path = converted_path(kind, options, sources).with_suffix(".json")
    if path.is_file():
        return path
    start = time.monotonic()
    content, report = convert()
    report.raise_errors()
    for line in report.lines()[1:]:
        logger.warning("%s:%s", report.source, line)
    write_text(path, json.dumps(content))
    logger.info(
        "Converted %d images and %d annotations of %s to %s in %.1f s",
        len(content["images"]),
        len(content["annotations"]),
        report.source,
        path,
        time.monotonic() - start,
    )
    return path


def converted_labels(
    kind: str, options: Iterable[str], sources: dict[str, Path], convert: Callable[[Path], Labels], wide: bool
) -> dict[str, Path]:
    """Convert label maps to PNG files in the cache, those that have changed since the last time.

    A converted file gets the time of change of its source, and is made again if that differs.

    Args:
        kind: name of the conversion.
        options: what else the result depends on.
        sources: key of an image -> its label map.
        convert: returns the labels (H, W) of a label map; raises a DataError that names it.
        wide: write 16 bits a pixel instead of 8.

    Returns:
        Key of an image -> its converted label map.
    """
    folder = converted_path(kind, options, ())
    targets = {key: folder / f"{key}.png" for key in sources}
    by_source = {sources[key]: target for key, target in targets.items()}

    def run(source: Path) -> None:
        labels = convert(source)
        if labels.max(initial=0) > (65535 if wide else 255):
            raise DataError(f"{source}: label {labels.max()} does not fit into {16 if wide else 8} bits")
        save_image(Image.fromarray(labels.astype(np.uint16 if wide else np.uint8)), by_source[source])
        stamp = source.stat().st_mtime_ns
        os.utime(by_source[source], ns=(stamp, stamp))

    changed = [source for source, target in by_source.items() if _stamp(target) != _stamp(source)]
    if changed:
        map_in_threads(run, changed, f"Converting label maps to {folder}")
    return targets


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None
