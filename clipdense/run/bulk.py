"""One run of ``clipdense predict``: many images, in parts, on one machine or a Ray cluster."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from clipdense.data.datasets.images import register_images
from clipdense.engine.options import ConfigError
from clipdense.engine.parts import FailureList, Item, Loaded, PartedRun, PartWorker
from clipdense.engine.run_config import run_config
from clipdense.files import WriteError, write_error
from clipdense.run.buckets import AHEAD
from clipdense.run.execution import Execution, execute
from clipdense.run.image_files import ImageFiles, ImageRows, UniqueNames
from clipdense.run.inputs import find_inputs
from clipdense.run.outputs import FORMATS, LISTING, check_formats
from clipdense.run.prediction import Prediction
from clipdense.run.predictor_options import PredictorOptions
from clipdense.run.summary_files import write_summaries

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["BULK_FORMATS", "BulkJob", "build_worker", "find_items", "run_bulk_job"]

BULK_FORMATS = tuple(name for name in FORMATS if name != "pictures")
"""Formats of bulk predictions: all except pictures."""

_LISTS = (".json", ".jsonl", ".txt", ".tar")


@dataclass(frozen=True, kw_only=True)
class BulkJob(PredictorOptions):
    """Options of a run; the help of ``clipdense predict`` describes them.

    Attributes:
        sources: see `find_items`.
        output: folder of the run.
        formats: some of `BULK_FORMATS`.
        image_root: see `find_items`.
        recursive: see `find_items`.
        execution: where and how the run is executed.
    """

    sources: tuple[str, ...]
    output: Path = Path("output/bulk")
    formats: tuple[str, ...] = ("coco", "parquet")
    image_root: str = ""
    recursive: bool = True
    execution: Execution = field(default_factory=Execution)


def run_bulk_job(job: BulkJob) -> int:
    """Predict on all images of a job, or continue an interrupted run.

    Returns:
        The exit status: 1 if an image failed, else 0.

    Raises:
        FileNotFoundError: If a source has no images.
        ValueError: If words, examples, thresholds or formats are wrong.
        ConfigError: If the config is wrong, or does not fit the words; if the folder holds another run.
    """
    # detectron2 0.6 on current torch versions
    warnings.filterwarnings("ignore", "TypedStorage is deprecated|torch.meshgrid", UserWarning)
    check_formats(job.formats, BULK_FORMATS)
    job.execution.prepare()
    cfg = job.load_config()
    folder = job.output.absolute()
    if (folder / LISTING).is_file():
        raise ConfigError(f"{folder} holds the results of another command; use another --output")
    chosen = bool(job.device) or any(text.startswith("MODEL.DEVICE=") for text in job.overrides)
    device = job.execution.device(job.device or run_config(cfg).device, chosen)
    run = PartedRun(
        folder=folder,
        items=find_items(job.sources, job.image_root, recursive=job.recursive),
        build_worker=partial(build_worker, job, folder),
        settings={"formats": sorted(job.formats), **job.settings(cfg)},
        part_size=job.execution.part_size,
        device=device,
        max_pixels=job.max_pixels(cfg),
        title="Predicting",
    )
    return execute(run, job.execution, partial(_finish, job))


def find_items(sources: Iterable[str], image_root: str = "", *, recursive: bool = True) -> list[Item]:
    """List the images of some sources.

    Args:
        sources: folders, files, globs; lists (``.json`` with COCO's ``images``, ``.jsonl``, ``.txt``); tar
            files of the webdataset library (``shards/{000..331}.tar``).
        image_root: folder of the images of lists; default: that of the list.
        recursive: whether to look into the subfolders of folders.

    Returns:
        ``file_name``; ``image_id``, that of the list if the only source is one, otherwise the position; and
        ``stem``, the name of the image's files.

    Raises:
        FileNotFoundError: If a source has no images.
        ValueError: If a list is damaged.
    """
    sources = list(sources)
    records: list[Item] = []
    for source in sources:
        if source.endswith(_LISTS):
            remote = "://" in source
            records += _listed(source if remote else str(Path(source).expanduser().absolute()), image_root)
            continue
        found = find_inputs([source], recursive=recursive)
        if not found.images:
            raise FileNotFoundError(f"{source}: {next(iter(found.failed.values()), 'no images')}")
        if found.videos:
            print(f"{source}: {len(found.videos)} videos are left out (clipdense segment takes them)")
        records += [{"file_name": str(path.absolute())} for path in found.images]
    names = UniqueNames()
    single = len(sources) == 1
    ids = [record.get("image_id", i) if single else i for i, record in enumerate(records)]
    if any(isinstance(image_id, str) for image_id in ids):  # a table has one type a column
        ids = [str(image_id) for image_id in ids]
    return [
        {
            "file_name": record["file_name"],
            "image_id": image_id,
            "stem": names(_stem(record["file_name"])),
        }
        for record, image_id in zip(records, ids, strict=True)
    ]


def build_worker(job: BulkJob, folder: Path, device: str) -> PartWorker:
    """Build the predictor of one process.

    Args:
        job: of the run.
        folder: of the run.
        device: of the model.
    """
    return _PredictionWorker(job, folder, device)


class _PredictionWorker:
    """Predicts on the images of parts, and writes the files of single images."""

    def __init__(self, job: BulkJob, folder: Path, device: str) -> None:
        self._job, self._folder, self._predictor = job, folder, job.build(device)
        self._files = ImageFiles(partial(_new_file, folder), job.formats)
        metadata = self._predictor.metadata
        self._names = list(metadata.get("thing_classes") or metadata.get("stuff_classes") or ())
        self._failures = FailureList()

    def __call__(self, items: Sequence[Item], images: Iterable[Loaded]) -> dict[str, Any]:
        """Return ``names`` (of the classes), ``rows`` (`ImageRows`) and ``failed``."""
        rows: list[ImageRows] = []
        failures, size = self._failures, self._job.batch_size
        failures.clear()
        pairs = zip(items, images, strict=True)
        while group := list(islice(pairs, size * AHEAD if size > 1 else 1)):
            readable = [(item, image) for item, image in group if not isinstance(image, Exception)]
            outputs = iter(self._predict([image for _, image in readable]))
            for item, image in group:
                with failures.of(item):
                    if isinstance(image, Exception):
                        raise image
                    output = next(outputs)
                    if isinstance(output, Exception):
                        raise output
                    prediction = self._predictor.wrap(image, output, self._job.kind, item["file_name"])
                    rows.append(self._write(prediction, item))
        return {"names": self._names, "rows": rows, "failed": failures.entries}

    def _write(self, prediction: Prediction, item: Item) -> ImageRows:
        """Write the files of an image; an error of the disk is not the image's fault."""
        try:
            return self._files.write(prediction, item["stem"], item["image_id"])
        except WriteError:
            raise
        except OSError as error:
            raise write_error(self._folder, error) from error

    def _predict(self, images: Sequence[Any]) -> list[Any]:
        """Predict on images; one that the model cannot take gets its error, and the others are predicted."""
        try:
            return self._predictor.predict_pixels(images, self._job.tile, self._job.batch_size)
        except Exception as error:
            if len(images) == 1:
                return [error]
        return [output for image in images for output in self._predict([image])]


def _finish(job: BulkJob, run: PartedRun) -> None:
    """Write the files that cover all images, and print how many there are."""

    def rows() -> Iterator[ImageRows]:
        for content in run.contents():
            yield from content["rows"]

    names = next(run.contents())["names"]
    write_summaries(partial(_new_file, run.folder), job.formats, names, rows, run.failures)
    images = instances = segments = 0
    for row in rows():
        images += 1
        instances += len(row["annotations"])
        segments += len(row["segments"])
    print(f"{images} images, {instances} detections, {segments} segments: {run.folder}")


def _new_file(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _listed(source: str, image_root: str) -> list[Item]:
    """Return the records of a list or of shards."""
    if source.endswith(".json"):
        image_root = image_root or os.path.dirname(source)
    name = f"images of {source}"
    register_images(name, source, image_root and str(Path(image_root).expanduser().absolute()))
    try:
        return list(DatasetCatalog.get(name))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _stem(file_name: str) -> str:
    """Return the name of an image without folder and ending; in a shard, that of its member."""
    if "://" in file_name and "#" in file_name:
        file_name = file_name.rpartition("#")[2]
    return Path(file_name).stem or "image"
