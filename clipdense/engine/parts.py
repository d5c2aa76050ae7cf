"""Runs over many images in parts: by several processes or a Ray cluster, interrupted and resumed at any time.

Images are divided into parts of a fixed size, in order. A finished part is one file, written atomically; when
all exist, the caller merges them. A killed run therefore neither loses nor repeats finished parts, and the
result does not depend on which process computed which part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.multiprocessing as mp
from filelock import FileLock, Timeout
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from clipdense.data.image import MAX_PIXELS
from clipdense.data.json_files import load_json
from clipdense.data.mappers import read_image_or_skip
from clipdense.engine.options import ConfigError
from clipdense.files import WriteError, file_sha256, json_text, remove_leftovers, write_text

__all__ = ["FailureList", "Item", "Loaded", "PartWorker", "PartedRun", "file_digest"]

Item = dict[str, Any]
"""An image: ``file_name`` and whatever a worker needs."""

Loaded = npt.NDArray[np.uint8] | Exception
"""Pixels (H, W, 3) RGB, or why there are none."""

PartWorker = Callable[[Sequence[Item], Iterable[Loaded]], dict[str, Any]]
"""Computes a part from its images, which are read one after the other: JSON-ready content of its file.

The content has the list ``failed`` of entries ``file_name`` and ``reason``, one for each image that the
worker cannot use (`FailureList`). It raises an exception only for what makes the whole run useless.
"""

_IMAGE_ERRORS = (OSError, ValueError, MemoryError, torch.OutOfMemoryError)
"""Errors that belong to a single image."""

_GIVE_UP = 8
"""Images after which a model that never succeeded ends the run."""


class FailureList:
    """Failures of single images in one process; they do not end a run.

    A model that fails with an unexpected error on the first images that it sees, and never succeeds, is
    broken: then the error is raised.

    Attributes:
        entries: ``file_name`` and ``reason`` of each image that failed since `clear`.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, str]] = []
        self._unexpected, self._succeeded = 0, False

    def clear(self) -> None:
        """Start the list of the next part."""
        self.entries = []

    @contextmanager
    def of(self, item: Item) -> Iterator[None]:
        """Turn an exception within the block into the entry of an image."""
        try:
            yield
            self._succeeded = True
        except WriteError:  # a full disk is not the image's fault
            raise
        except Exception as error:
            if not isinstance(error, _IMAGE_ERRORS) and not self._succeeded:
                self._unexpected += 1
                if self._unexpected == _GIVE_UP:
                    raise
            self.entries.append(_entry(item, error))


@dataclass
class PartedRun:
    """A run in a folder.

    Attributes:
        folder: of ``run.json`` (the settings) and ``parts/``.
        items: the images.
        build_worker: builds the worker of one process on a device. It is sent to other processes: a function
            of a module, or a `functools.partial` of one.
        settings: everything that determines the content of parts. A folder keeps them, and a run with other
            settings is refused there.
        part_size: images in a part.
        device: "cuda" distributes processes over all GPUs.
        max_pixels: larger images fail.
        title: word in front of the progress bar.
    """

    folder: Path
    items: Sequence[Item]
    build_worker: Callable[[str], PartWorker]
    settings: dict[str, Any] = field(default_factory=dict)
    part_size: int = 64
    device: str = "cpu"
    max_pixels: int = MAX_PIXELS
    title: str = "Computing"

    def __len__(self) -> int:
        """Number of parts."""
        return -(-len(self.items) // self.part_size)

    def path(self, part: int) -> Path:
        """Return the file of a part."""
        return self.folder / "parts" / f"{part:05d}.json"

    def part_items(self, part: int) -> Sequence[Item]:
        """Return the images of a part."""
        return self.items[part * self.part_size : (part + 1) * self.part_size]

    def pending(self) -> list[int]:
        """Return the unfinished parts."""
        return [part for part in range(len(self)) if not self.path(part).is_file()]

    def contents(self) -> Iterator[dict[str, Any]]:
        """Yield the content of the parts in order."""
        for part in range(len(self)):
            yield load_json(self.path(part))

    def failures(self) -> Iterator[dict[str, str]]:
        """Yield the entries of all images that failed, in order."""
        for content in self.contents():
            yield from content["failed"]

    def write_errors(self) -> int:
        """Write ``errors.jsonl``: a line with ``file_name`` and ``reason`` for each image that failed.

        Returns:
            The number of lines. If it is 0, the file does not exist.
        """
        path, lines = self.folder / "errors.jsonl", [json_text(entry) + "\n" for entry in self.failures()]
        if lines:
            write_text(path, "".join(lines))
        else:
            path.unlink(missing_ok=True)
        return len(lines)

    def discard_failed(self) -> None:
        """Delete the finished parts in which an image failed, so that they are computed again."""
        for part in range(len(self)):
            if self.path(part).is_file() and load_json(self.path(part))["failed"]:
                self.path(part).unlink()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the folder; write the settings, or compare them with those of the folder.

        Raises:
            ConfigError: If the folder holds a run with other settings, or another process works on it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".run.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"another process is working on the run in {self.folder}") from error
        try:
            self._check_settings()
            yield
            remove_leftovers(self.folder / "parts", "*")  # of killed processes
        finally:
            lock.release()

    def run(self, jobs: int = 1) -> None:
        """Compute the unfinished parts on this machine, with a progress bar.

        Args:
            jobs: number of processes.
        """
        pending = self.pending()
        if not pending:
            return
        with self.progress(pending) as bar:
            if jobs == 1:
                self.compute(pending, bar.update, self.device)
                return
            context = mp.get_context("spawn")
            started, finished = context.Value("q", 0), context.Value("q", 0)
            jobs = min(jobs, len(pending))
            # torch's start_processes: workers end with this process, however it ends
            processes = start_processes(
                _work, (self, pending, started, finished, jobs), nprocs=jobs, join=False, start_method="spawn"
            )
            try:
                while not processes.join(timeout=0.5):
                    bar.update(finished.value - bar.n)
            finally:
                bar.update(finished.value - bar.n)
                for process in processes.processes:
                    process.terminate()

    def progress(self, pending: Sequence[int]) -> tqdm:
        """Return a progress bar over the images of some parts."""
        total = sum(len(self.part_items(part)) for part in pending)
        return tqdm(total=total, desc=f"{self.title} {self.folder}", unit="image")

    def compute(self, parts: Iterable[int], advance: Callable[[], Any], device: str) -> None:
        """Compute some parts in this process; ``advance`` is called after each image."""
        worker = self.build_worker(device)
        for part in parts:
            items = self.part_items(part)
            self.write(part, worker(items, _counted(map(self.read, items), advance)))

    def read(self, item: Item) -> Loaded:
        """Read an image, upright; return the error if it cannot be read."""
        try:
            image = read_image_or_skip(item, "RGB", skip=False, max_pixels=self.max_pixels)
            assert image is not None
            return image
        except _IMAGE_ERRORS as error:
            return error

    def write(self, part: int, content: dict[str, Any]) -> None:
        """Write the file of a part, as a whole or not at all."""
        write_text(self.path(part), json_text(content))

    def without_items(self) -> PartedRun:
        """Return the run without its images, for processes that get those of a part with the part."""
        return replace(self, items=(), settings={})

    def _check_settings(self) -> None:
        digest = hashlib.sha256(json.dumps([self.items]).encode()).hexdigest()[:16]
        current = self.settings | {
            "images": len(self.items),
            "list of images": digest,
            "part size": self.part_size,
        }
        path, current = self.folder / "run.json", json.loads(json.dumps(current))
        if not path.is_file():
            write_text(path, json.dumps(current, indent=1))
            return
        stored = load_json(path)
        differing = [
            f"{key} was {stored.get(key, 'not set')}, is {current.get(key, 'not set')}"
            for key in dict.fromkeys([*stored, *current])
            if stored.get(key) != current.get(key)
        ]
        if differing:
            raise ConfigError(
                f"{self.folder} holds a run with other settings: {'; '.join(differing)}. "
                "Use the same settings, or another folder."
            )


def file_digest(path: str | Path) -> str:
    """Hash the content of a file; "" if there is no such file."""
    return file_sha256(path)[:16] if path and Path(path).is_file() else ""


def _counted(images: Iterable[Loaded], advance: Callable[[], Any]) -> Iterator[Loaded]:
    """Yield images, and call ``advance`` when the next one is requested."""
    for image in images:
        yield image
        advance()


def _work(rank: int, run: PartedRun, pending: list[int], started: Any, finished: Any, jobs: int) -> None:
    """Compute in a worker process: take the next part until none is left."""

    def parts() -> Iterator[int]:
        while True:
            with started.get_lock():
                index = started.value
                started.value += 1
            if index >= len(pending):
                return
            yield pending[index]

    def advance() -> None:
        with finished.get_lock():
            finished.value += 1

    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    device = f"cuda:{rank % torch.cuda.device_count()}" if run.device == "cuda" else run.device
    run.compute(parts(), advance, device)


def _entry(item: Item, error: Exception) -> dict[str, str]:
    """Return the entry of the error table for an image."""
    name, text = (
        str(item["file_name"]),
        (error.strerror if isinstance(error, OSError) else None) or str(error),
    )
    if not isinstance(error, _IMAGE_ERRORS):
        text = f"{type(error).__name__}: {text}"
    return {"file_name": name, "reason": " ".join(text.split()).removeprefix(f"{name}: ")}
