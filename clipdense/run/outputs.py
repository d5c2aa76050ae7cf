"""Folder of predictions in several formats."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from clipdense.data.parquet import require_pyarrow
from clipdense.run.image_files import ImageFiles, ImageRows, UniqueNames, summary_rows
from clipdense.run.prediction import Prediction
from clipdense.run.summary_files import write_summaries

__all__ = ["FORMATS", "LISTING", "OutputFolder", "check_formats", "retire_earlier_files"]

LISTING = ".predictions"
"""File that lists what a run has written, so that the next run can move it away."""

FORMATS: dict[str, str] = {
    "pictures": "<image>.jpg: what was found, drawn on the image",
    "coco": "results.json: images, categories, annotations and segments, as in a COCO file",
    "labels": "labels/<image>.png: the class of each pixel, with a palette; 255 is no class; more than 255 "
    "classes need 16 bits, and no class is 65535; legend.png and classes.csv",
    "panoptic": "panoptic/<image>.png and panoptic.json, as COCO's panoptic files",
    "yolo": "yolo/<image>.txt: class, centre x, centre y, width, height, as shares of the image; classes.txt",
    "yolo-seg": "yolo/<image>.txt: class and the polygon of each object; classes.txt",
    "csv": "summary.csv: image, class, number, share of the area, best score",
    "parquet": "masks.parquet: a row for each instance and each segment, with image_id, file_name, height, "
    "width, kind (annotation or segment), category_id, category, score, bbox, area and counts (COCO's run "
    "lengths); needs pyarrow",
}
"""Format -> its files."""


def check_formats(formats: Collection[str], known: Collection[str] = tuple(FORMATS)) -> None:
    """Check the names of formats.

    Raises:
        ValueError: If one is not among the known ones.
        ImportError: If one needs a package that is not installed.
    """
    if unknown := sorted(set(formats) - set(known)):
        raise ValueError(f"unknown format {', '.join(unknown)}; known: {', '.join(known)}")
    if "parquet" in formats:
        require_pyarrow("masks.parquet")


def retire_earlier_files(folder: Path) -> Path | None:
    """Move the files of an earlier run of predictions into a subfolder ``old_1``, ``old_2``, ...

    Files that no run has listed stay where they are.

    Returns:
        The subfolder; None if there was nothing to move.
    """
    listing = folder / LISTING
    if not listing.is_file():
        return None
    names = [
        name for name in dict.fromkeys(listing.read_text("utf-8").splitlines()) if (folder / name).is_file()
    ]
    listing.unlink()
    if not names:
        return None
    number = 1
    while (folder / f"old_{number}").exists():
        number += 1
    target = folder / f"old_{number}"
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(target / name)
    return target


class OutputFolder:
    """Folder that gets predictions in some formats; a context manager, which writes the summaries at its end.

    Files of an earlier run are moved away first (`retire_earlier_files`), so that runs never mix.

    Args:
        folder: is created if it does not exist.
        metadata: class names of the model.
        formats: keys of `FORMATS`.
        inputs: images that are read; no file is written in place of one.
        failed: input -> why it failed; may grow until the end.

    Attributes:
        path: the folder.
        retired: where the files of an earlier run are; None if there were none.

    Raises:
        ValueError: If a format is unknown.
        ImportError: If a format needs a package that is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        metadata: Any,
        formats: Collection[str] = ("pictures", "coco"),
        *,
        inputs: Iterable[Path] = (),
        failed: dict[str, str] | None = None,
    ) -> None:
        check_formats(formats)
        self.path, self.formats = Path(folder), tuple(formats)
        self.failed = {} if failed is None else failed
        self._metadata = metadata
        self.path.mkdir(parents=True, exist_ok=True)
        self.retired = retire_earlier_files(self.path)
        own = self.path.resolve()
        self._names = UniqueNames([image.name for image in inputs if image.resolve().parent == own])
        self._stems = UniqueNames()
        self._files = ImageFiles(self.new_file, self.formats)
        self._rows: list[ImageRows] = []
        self._frames: list[tuple[Any, ...]] = []

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, prediction: Prediction) -> Path | None:
        """Write the files of one image; return its picture, if pictures are written."""
        stem = Path(prediction.source).stem or "image"
        picture = self.take(stem) if "pictures" in self.formats else None
        if picture is not None:
            prediction.save_picture(picture)
        name = picture.stem if picture is not None else self._stems(stem)
        rows = self._files.write(prediction, name, len(self._rows))
        if picture is not None:
            rows["image"]["picture"] = picture.name
        self._rows.append(rows)
        return picture

    @property
    def num_images(self) -> int:
        """Number of images that were added."""
        return len(self._rows)

    @property
    def num_annotations(self) -> int:
        """Number of their instances."""
        return sum(len(rows["annotations"]) for rows in self._rows)

    @property
    def num_segments(self) -> int:
        """Number of the segments of their maps."""
        return sum(len(rows["segments"]) for rows in self._rows)

    def take(self, stem: str, suffix: str = ".jpg") -> Path:
        """Return a new file named after ``stem``, with a number if the name is in use."""
        return self.new_file(self._names(stem, suffix))

    def new_file(self, name: str) -> Path:
        """Return a file of the folder, and list it as written by this run."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with (self.path / LISTING).open("a", encoding="utf-8") as listing:
            listing.write(f"{name}\n")
        return path

    def close(self) -> None:
        """Write what covers all images: results.json, panoptic.json, the classes and summary.csv."""
        names = self._metadata.get("thing_classes") or self._metadata.get("stuff_classes") or ()
        failed = [{"file_name": name, "reason": why} for name, why in self.failed.items()]
        rows = self._rows
        write_summaries(
            self.new_file, self.formats, names, lambda: iter(rows), lambda: iter(failed), self._frames
        )

    def summarize(self, prediction: Prediction) -> None:
        """Add the rows of a frame to summary.csv."""
        self._frames += summary_rows(prediction)
