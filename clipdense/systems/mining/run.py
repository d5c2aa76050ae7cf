"""Mining a whole data set: in shards, by several processes and machines, stopped and continued at will.

Images are parted into shards of a set size, in their order. A finished shard is one file that appears whole
or not at all; when all are there they become one pair file. So whatever a killed run has finished is neither
lost nor done again, and the pair file does not depend on who made which shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from filelock import FileLock, Timeout
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from clipdense.checkpoint import config_leaves
from clipdense.clip.text import TextBank
from clipdense.data.checks import check_dataset_names
from clipdense.data.datasets import register_from_config
from clipdense.data.datasets.layouts import load_captions, load_json
from clipdense.data.image import BadImageError, read_image
from clipdense.data.mappers import build_mapper
from clipdense.data.nouns import NounFinder
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.engine.options import ConfigError
from clipdense.files import write_text
from clipdense.systems.mining.pairs import (
    Filters,
    MaskMiner,
    ModelProposals,
    NounEmbedder,
    Proposals,
    Record,
)
from clipdense.systems.two_stage.meta_arch import OVSeg

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

__all__ = ["MiningRun", "build_miner", "captioned_images"]


def captioned_images(
    data: str, image_root: str = "", *, captions: int = 1, images: int | None = None
) -> list[Record]:
    """Images with their captions.

    Args:
        data: a registered data set whose dicts have ``captions``; a ``.json`` file of COCO captions; or a
            ``.jsonl`` file with ``file_name``, ``captions`` (a list) and perhaps ``image_id`` in each line.
        image_root: folder of a file's images; default: where the file lies.
        captions: the first so many of each image.
        images: only the first so many; None for all.

    Returns:
        Dicts with ``file_name`` (absolute), ``image_id`` and ``captions``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown data set, or one without captions.
    """
    path = Path(data)
    if path.suffix in (".json", ".jsonl"):
        root = image_root or str(path.parent)
        records = load_captions(data, root) if path.suffix == ".json" else _captioned_lines(path, root)
    else:
        check_dataset_names([data])
        records = DatasetCatalog.get(data)
    if not records or "captions" not in records[0]:
        raise ValueError(f"{data}: no image has captions")
    return [
        {
            "file_name": os.path.abspath(record["file_name"]),
            "image_id": record["image_id"],
            "captions": list(record["captions"][:captions]),
        }
        for record in records[:images]
    ]


def _captioned_lines(path: Path, root: str) -> list[Record]:
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                name, words = str(record["file_name"]), list(map(str, record["captions"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no file_name and captions ({error!r})") from error
            image_id = record.get("image_id", name)
            records.append({"file_name": os.path.join(root, name), "image_id": image_id, "captions": words})
    return records


def build_miner(
    cfg: CfgNode, proposals: Proposals | None = None, filters: Filters | None = None
) -> MaskMiner:
    """A miner with the OVSeg model of a config: its masks, its CLIP, its crops, its templates of crops.

    Args:
        proposals: instead of the model's masks; then the config need not name weights.

    Raises:
        ConfigError: another meta-architecture, or no weights.
    """
    if cfg.MODEL.META_ARCHITECTURE != "OVSeg":
        raise ConfigError(f"mining needs MODEL.META_ARCHITECTURE OVSeg, not {cfg.MODEL.META_ARCHITECTURE}")
    if proposals is None and not cfg.MODEL.WEIGHTS:
        raise ConfigError("untrained proposals are no masks: set MODEL.WEIGHTS, or take other --proposals")
    model = build_model(cfg).eval()
    assert isinstance(model, OVSeg)
    if cfg.MODEL.WEIGHTS:
        checkpointer = TrainingCheckpointer(model, "", cfg.MODEL.WEIGHTS_SKIP, cfg.MODEL.ALLOW_PICKLE)
        checkpointer.load_weights(cfg.MODEL.WEIGHTS, complete=True)
    keys = cfg.MODEL.TWO_STAGE
    bank = TextBank(
        model.encoder.clip,
        keys.CROP_TEMPLATES or keys.TEMPLATES,
        prompts=model.prompts,
        cache_dir=None,
        progress=False,
    )
    if proposals is None:
        proposals = ModelProposals(model, build_mapper(cfg, False))
    return MaskMiner(proposals, model.encoder, NounEmbedder(bank), filters)


@dataclass
class MiningRun:
    """A run in a folder.

    Attributes:
        folder: of ``run.json`` (its settings) and ``shards/``.
        cfg: of an OVSeg model.
        records: from `captioned_images`.
        proposals: None for the model's own.
        nouns: arguments of `NounFinder`.
        filters: of pairs.
        shard_size: images a shard.
        named: what else tells two runs apart, by name: where data and proposals come from.
    """

    folder: Path
    cfg: CfgNode
    records: Sequence[Record]
    proposals: Proposals | None = None
    nouns: dict[str, bool] = field(default_factory=dict)
    filters: Filters = field(default_factory=Filters)
    shard_size: int = 64
    named: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of shards."""
        return -(-len(self.records) // self.shard_size)

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / "shards" / f"{shard:05d}.json"

    def pending(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """Shards that are not there, of part i of n."""
        return [s for s in range(len(self)) if s % part[1] == part[0] and not self.path(s).is_file()]

    def shards(self) -> Iterator[dict[str, Any]]:
        """What the shards hold, in order; see `mine_shard`."""
        for shard in range(len(self)):
            yield load_json(self.path(shard))

    @contextmanager
    def opened(self, part: tuple[int, int] = (0, 1)) -> Iterator[None]:
        """Take the folder for part i of n, whose settings are written down or compared.

        Raises:
            ConfigError: the folder holds a run with other settings, which are named; or another process is at
                work on this part.
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
            self._compare()
            yield
        finally:
            lock.release()

    def _compare(self) -> None:
        path, now = self.folder / "run.json", json.loads(json.dumps(self.settings()))
        if not path.is_file():
            write_text(path, json.dumps(now, indent=1))
            return
        there = load_json(path)
        differing = [
            f"{key} was {there.get(key, 'not set')}, is {now.get(key, 'not set')}"
            for key in dict.fromkeys([*there, *now])
            if there.get(key) != now.get(key)
        ]
        if differing:
            raise ConfigError(
                f"{self.folder} holds a run with other settings: {'; '.join(differing)}. "
                "Give the same, or another folder."
            )

    def settings(self) -> dict[str, Any]:
        """All that decides what is mined."""
        cfg = self.cfg
        shape = dict(config_leaves(json.loads(json.dumps(cfg.MODEL)), "MODEL"))
        shape |= {f"INPUT.{k}": cfg.INPUT[k] for k in ("FORMAT", "MAPPER", "MIN_SIZE_TEST", "MAX_SIZE_TEST")}
        for key in ("MODEL.DEVICE", "MODEL.WEIGHTS"):
            shape.pop(key)
        adapted = [
            cfg.MODEL.TWO_STAGE.ADAPTED_CLIP,
            cfg.MODEL.CLIP.PRETRAINED,
            *cfg.MODEL.TWO_STAGE.CROP_CLIP.values(),
        ]
        words = hashlib.sha256(json.dumps([self.records]).encode()).hexdigest()[:16]
        return {
            **self.named,
            "images": len(self.records),
            "images and captions": words,
            "nouns": self.nouns,
            "filters": asdict(self.filters),
            "shard size": self.shard_size,
            "MODEL.WEIGHTS (content)": _digest(cfg.MODEL.WEIGHTS),
            "CLIP (content)": [_digest(name) for name in adapted],
            **shape,
        }

    def run(self, part: tuple[int, int] = (0, 1), jobs: int = 1) -> None:
        """Make the shards of part i of n that are missing, in so many processes, with a progress bar.

        On a machine with several GPUs, processes take turns with them.
        """
        todo = self.pending(part)
        total = sum(len(self._images(shard)) for shard in todo)
        if not todo:
            return
        with tqdm(total=total, desc=f"Mining {self.folder}", unit="image") as bar:
            if jobs == 1:
                self._work(todo, bar.update)
                return
            context = mp.get_context("spawn")
            taken, done = context.Value("q", 0), context.Value("q", 0)
            jobs = min(jobs, len(todo))
            # torch's start_processes: workers end with this process, however it ends
            processes = start_processes(
                _worker, (self, todo, taken, done, jobs), nprocs=jobs, join=False, start_method="spawn"
            )
            try:
                while not processes.join(timeout=0.5):
                    bar.update(done.value - bar.n)
            finally:
                bar.update(done.value - bar.n)
                for process in processes.processes:
                    process.terminate()

    def _images(self, shard: int) -> Sequence[Record]:
        return self.records[shard * self.shard_size : (shard + 1) * self.shard_size]

    def _work(self, shards: Iterator[int] | Sequence[int], advance: Any) -> None:
        register_from_config(self.cfg)
        finder = NounFinder(**self.nouns)
        miner = build_miner(self.cfg, self.proposals, self.filters)
        for shard in shards:
            content = mine_shard(miner, finder, self._images(shard), advance)
            write_text(self.path(shard), json.dumps(content))


def mine_shard(
    miner: MaskMiner, finder: NounFinder, records: Sequence[Record], advance: Any = lambda: None
) -> dict[str, Any]:
    """Mine some images.

    Args:
        advance: called after each image.

    Returns:
        ``pairs``; numbers of ``images``, ``captions`` and ``nouns`` (an image's, each once); ``too_long``
        nouns for the text tower; ``unreadable`` images.
    """
    captions = [caption for record in records for caption in record["captions"]]
    found = iter(zip(finder(captions), captions, strict=True))
    pairs: list[Record] = []
    too_long: set[str] = set()
    unreadable: list[str] = []
    count = 0
    for record in records:
        nouns: dict[str, str] = {}
        for _ in record["captions"]:
            words, caption = next(found)
            for word in words:
                nouns.setdefault(word, caption)
        count += len(nouns)
        too_long |= {noun for noun in nouns if miner.embed(noun) is None}
        try:
            image = read_image(record["file_name"])
        except BadImageError:
            unreadable.append(record["file_name"])
        else:
            pairs += miner(record, image, nouns)
        advance()
    return {
        "images": len(records),
        "captions": len(captions),
        "nouns": count,
        "too_long": sorted(too_long),
        "unreadable": unreadable,
        "pairs": pairs,
    }


def _worker(rank: int, run: MiningRun, todo: list[int], taken: Any, done: Any, jobs: int) -> None:
    """One of several processes: takes the next shard until none is left."""

    def shards() -> Iterator[int]:
        while True:
            with taken.get_lock():
                index = taken.value
                taken.value += 1
            if index >= len(todo):
                return
            yield todo[index]

    def advance() -> None:
        with done.get_lock():
            done.value += 1

    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    if run.cfg.MODEL.DEVICE == "cuda":
        run.cfg.defrost()
        run.cfg.MODEL.DEVICE = f"cuda:{rank % torch.cuda.device_count()}"
    run._work(shards(), advance)


def _digest(path: str) -> str:
    """A hash of a file; "" where there is none."""
    if not path or not os.path.isfile(path):
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:16]
