"""Mining of a dataset in shards: by several processes and machines, interrupted and resumed at any time.

Images are divided into shards of a fixed size, in order. A finished shard is one file, written atomically;
when all exist, they become one pair file. A killed run therefore neither loses nor repeats finished shards,
and the pair file does not depend on which process made which shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from filelock import FileLock, Timeout
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from clipdense.data.image import BadImageError
from clipdense.data.json_files import load_json
from clipdense.data.mappers import read_image_or_skip
from clipdense.data.nouns import NounFinder
from clipdense.engine.options import ConfigError
from clipdense.files import write_text
from clipdense.systems.mining.pairs import MaskMiner, Record

__all__ = ["MiningRun", "mine_shard"]


@dataclass
class MiningRun:
    """A mining run in a folder.

    Attributes:
        folder: of ``run.json`` (the settings) and ``shards/``.
        records: from `captioned_images`.
        build_miner: builds the miner of one process on a device. It is sent to worker processes: a function
            of a module, or a `functools.partial` of one.
        settings: everything that determines the miner's pairs. A folder keeps them, and a run with other
            settings is refused there.
        nouns: arguments of `NounFinder`.
        shard_size: images in a shard.
        device: "cuda" distributes worker processes over all GPUs.
    """

    folder: Path
    records: Sequence[Record]
    build_miner: Callable[[str], MaskMiner]
    settings: dict[str, Any] = field(default_factory=dict)
    nouns: dict[str, bool] = field(default_factory=dict)
    shard_size: int = 64
    device: str = "cpu"

    def __len__(self) -> int:
        """Number of shards."""
        return -(-len(self.records) // self.shard_size)

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / "shards" / f"{shard:05d}.json"

    def pending(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """Return the unfinished shards of part i of n (i from 0)."""
        return [s for s in range(len(self)) if s % part[1] == part[0] and not self.path(s).is_file()]

    def shards(self) -> Iterator[dict[str, Any]]:
        """Yield the content of the shards in order, see `mine_shard`."""
        for shard in range(len(self)):
            yield load_json(self.path(shard))

    @contextmanager
    def opened(self, part: tuple[int, int] = (0, 1)) -> Iterator[None]:
        """Lock the folder for part i of n; write the settings, or compare them with those of the folder.

        Raises:
            ConfigError: If the folder holds a run with other settings, or another process mines this part.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f".part_{part[0] + 1}_of_{part[1]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"another process is mining part {part[0] + 1} of {part[1]} in {self.folder}"
            ) from error
        try:
            self._check_settings()
            yield
        finally:
            lock.release()

    def _check_settings(self) -> None:
        digest = hashlib.sha256(json.dumps([self.records]).encode()).hexdigest()[:16]
        current = self.settings | {
            "images": len(self.records),
            "images and captions": digest,
            "nouns": self.nouns,
            "shard size": self.shard_size,
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

    def run(self, part: tuple[int, int] = (0, 1), jobs: int = 1) -> None:
        """Mine the unfinished shards of part i of n, with a progress bar.

        Args:
            part: i and n, i from 0.
            jobs: number of processes.
        """
        pending = self.pending(part)
        if not pending:
            return
        total = sum(len(self._images(shard)) for shard in pending)
        with tqdm(total=total, desc=f"Mining {self.folder}", unit="image") as bar:
            if jobs == 1:
                self.mine(pending, bar.update, self.device)
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

    def mine(self, shards: Iterator[int] | Sequence[int], advance: Callable[[], Any], device: str) -> None:
        """Mine some shards in this process; ``advance`` is called after each image."""
        finder = NounFinder(**self.nouns)
        miner = self.build_miner(device)
        for shard in shards:
            content = mine_shard(miner, finder, self._images(shard), advance)
            write_text(self.path(shard), json.dumps(content))

    def _images(self, shard: int) -> Sequence[Record]:
        return self.records[shard * self.shard_size : (shard + 1) * self.shard_size]


def mine_shard(
    miner: MaskMiner,
    finder: Callable[[Sequence[str]], list[list[str]]],
    records: Sequence[Record],
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Mine the pairs of some images.

    Args:
        miner: finds the pairs of an image.
        finder: returns the nouns of each caption.
        records: from `captioned_images`.
        advance: called after each image.

    Returns:
        ``pairs``; the numbers of ``images``, ``captions`` and ``nouns`` (counted once for each image); the
        ``too_long`` nouns; the ``unreadable`` image files.
    """
    captions = [caption for record in records for caption in record["captions"]]
    found = iter(zip(finder(captions), captions, strict=True))
    pairs: list[Record] = []
    too_long: set[str] = set()
    unreadable: list[str] = []
    num_nouns = 0
    for record in records:
        nouns: dict[str, str] = {}  # noun -> the first caption that contains it
        for _ in record["captions"]:
            caption_nouns, caption = next(found)
            for noun in caption_nouns:
                nouns.setdefault(noun, caption)
        num_nouns += len(nouns)
        too_long |= {noun for noun in nouns if miner.embed(noun) is None}
        try:
            image = read_image_or_skip(record, "RGB", skip=False)
            assert image is not None
        except BadImageError:
            unreadable.append(record["file_name"])
        else:
            pairs += miner(record, image, nouns)
        advance()
    return {
        "images": len(records),
        "captions": len(captions),
        "nouns": num_nouns,
        "too_long": sorted(too_long),
        "unreadable": unreadable,
        "pairs": pairs,
    }


def _work(rank: int, run: MiningRun, pending: list[int], started: Any, finished: Any, jobs: int) -> None:
    """Mine in a worker process: take the next shard until none is left."""

    def shards() -> Iterator[int]:
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
    run.mine(shards(), advance, device)
