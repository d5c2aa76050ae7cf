"""Generation of the splits of the `shapes` world on disk.

Several processes draw the images. An interrupted run can be resumed. All users of a folder share its files.

```
<root>/<split>/000000.png ...            images
<root>/panoptic_<split>/, semantic_<split>/, semantic_ov_<split>/     label maps
<root>/annotations/instances_closed_<split>.json, panoptic_closed_<split>.json, captions_<split>.json, ...
<root>/parts/<split>/                    records of finished images; an interrupted run resumes from them
```
Annotation files of the first N images of a split have the suffix ``_N``; those of the full split have none.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from clipdense.data.shapes.layouts import coco_captions, coco_instances, coco_panoptic, lvis_instances
from clipdense.data.shapes.records import png_folders, scene_record, write_scene
from clipdense.data.shapes.splits import find_split
from clipdense.data.shapes.world import BASE, render
from clipdense.engine.processes import end_with_launcher
from clipdense.files import cache_dir, write_text

__all__ = ["annotation_file", "ensure_shapes", "shapes_root"]

logger = logging.getLogger(__name__)

_PART = 25
"""Number of images per record file. After an interruption, each worker redraws at most this many images."""


def shapes_root() -> Path:
    """Return the default dataset folder.

    Returns:
        ``$DETECTRON2_DATASETS/shapes`` if the variable is set and this folder exists or its parent is
        writable; else ``$CLIPDENSE_CACHE/shapes`` if that variable is set; else ``shapes`` in the user's
        cache folder.
    """
    if datasets := os.environ.get("DETECTRON2_DATASETS"):
        root = Path(datasets).expanduser() / "shapes"
        if root.is_dir() or os.access(root.parent, os.W_OK):
            return root
    return cache_dir() / "shapes"


def annotation_file(root: Path, kind: str, split: str, images: int | None = None) -> Path:
    """Return the path of an annotation file.

    Args:
        root: dataset folder.
        kind: instances_closed, instances_ov, panoptic_closed, panoptic_ov, captions, or lvis.
        split: name of a split.
        images: number of images in the file, counted from the first (default: the full split).

    Returns:
        The path. The file need not exist.

    Raises:
        ValueError: If there is no split of that name.
    """
    full = images is None or images == find_split(split).images
    return root / "annotations" / f"{kind}_{split}{'' if full else f'_{images}'}.json"


def ensure_shapes(
    split: str,
    images: int | None = None,
    root: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Generate the missing files of a split.

    Several processes may call this at once: one generates the files and the others wait. An interrupted run
    is resumed. Files that another version of the world generated are generated again.

    Args:
        split: name of a split, see `splits.SPLITS`.
        images: number of images, counted from the first (default: the full split). It may exceed the size
            of the split.
        root: dataset folder (default: `shapes_root`).
        workers: number of processes (default: the number of usable cores, at most 8).
        progress: show a progress bar.

    Returns:
        The dataset folder.

    Raises:
        ValueError: If there is no split of that name, or ``images`` is below 1.
        OSError: If the folder is not writable. The message names the file.
    """
    settings = find_split(split)
    images = settings.images if images is None else images
    if images < 1:
        raise ValueError(f"shapes {split}: images is {images}, expected at least 1")
    folder = shapes_root() if root is None else Path(root)
    done = folder / "parts" / split / f"{images}.done"
    if _read(done) == _fingerprint():
        return folder
    done.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "parts" / f"{split}.lock"):
        if _read(done) != _fingerprint():
            _draw_missing(folder, split, images, workers or min(_cores(), 8), progress)
            _write_annotations(folder, split, images)
            write_text(done, _fingerprint())
    return folder


def _draw_missing(root: Path, split: str, images: int, workers: int, progress: bool) -> None:
    for folder in (*png_folders(root, split).values(), root / "annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    parts = [(start, min(start + _PART, images)) for start in range(0, images, _PART)]
    missing = [(start, stop) for start, stop in parts if len(_read_part(root, split, start)) < stop - start]
    if not missing:
        return
    logger.info("Drawing images of shapes %s in %s with %d processes", split, root, workers)
    draw = partial(_draw_part, root, split)
    bar = tqdm(total=images, desc=f"shapes {split}", unit="image", disable=not progress, file=sys.stderr)
    bar.update(images - sum(stop - start for start, stop in missing))
    with bar:
        for made in _map(draw, missing, min(workers, len(missing))):
            bar.update(made)


def _map(draw: Any, tasks: list[tuple[int, int]], workers: int) -> Iterator[int]:
    if workers <= 1 or multiprocessing.current_process().daemon:
        yield from map(draw, tasks)
        return
    # Fork where it is available, as torch's data loaders do. A new interpreter would spend seconds on imports
    # and need a main guard.
    method = (
        "fork" if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin" else "spawn"
    )
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            yield from (future.result() for future in as_completed([pool.submit(draw, t) for t in tasks]))
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """End this worker with its parent, and restore the default signal handlers.

    With the handlers of a trainer, SIGTERM would not end the worker.
    """
    end_with_launcher()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _draw_part(root: Path, split: str, span: tuple[int, int]) -> int:
    """Draw the images of a part and return their number.

    The records are written last, so a part with readable records is complete.
    """
    records = [write_scene(root, split, index) for index in range(*span)]
    write_text(_part_file(root, split, span[0]), json.dumps({"world": _fingerprint(), "records": records}))
    return len(records)


def _part_file(root: Path, split: str, start: int) -> Path:
    return root / "parts" / split / f"{start:06d}.json"


def _read_part(root: Path, split: str, start: int) -> list[dict[str, Any]]:
    """Read the records of a part; empty if it is missing or from another version of the world."""
    text = _read(_part_file(root, split, start))
    part = json.loads(text) if text else {}
    return part["records"] if part.get("world") == _fingerprint() else []


def _write_annotations(root: Path, split: str, images: int) -> None:
    records = [r for start in range(0, images, _PART) for r in _read_part(root, split, start)][:images]
    files = {
        "instances_closed": coco_instances(records),
        "panoptic_closed": coco_panoptic(records),
        "captions": coco_captions(records),
    }
    if find_split(split).training:
        files |= {"instances_ov": coco_instances(records, BASE), "panoptic_ov": coco_panoptic(records, BASE)}
    if find_split(split).class_weights is not None:
        files["lvis"] = lvis_instances(records, split)
    for kind, content in files.items():
        write_text(annotation_file(root, kind, split, images), json.dumps(content))


@lru_cache
def _fingerprint() -> str:
    """Hash sample scenes of the installed code, to detect a change of the world without a version number."""
    digest = hashlib.sha256()
    for shift, weights in ((False, None), (True, None), (False, [*range(1, 81)])):
        scene = render(0, 0, shift=shift, class_weights=weights)
        digest.update(scene.image.tobytes())
        digest.update(np.ascontiguousarray(scene.ground).tobytes())
        digest.update(json.dumps(scene_record(scene, "val", 0)).encode())
    return digest.hexdigest()[:16]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
