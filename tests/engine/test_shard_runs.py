"""Trainings on webdataset shards that are killed at random points and resumed."""

import io
import itertools
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from clipdense.data.datasets.own import register_entry
from clipdense.data.image import read_image
from clipdense.data.mappers import MAPPER_REGISTRY
from clipdense.engine.trainer import Trainer
from tests.helpers.engine_toy import ToyMapper

Build = Callable[..., Trainer]
SIZES = (7, 1, 11, 4, 6)
TOTAL = sum(SIZES)


class Killed(BaseException):
    """Stand-in for SIGKILL: nothing catches it, nothing is saved."""


@MAPPER_REGISTRY.register()
class ToyShardMapper(ToyMapper):
    """`ToyMapper` for images that hold their number."""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        number = int(read_image(record["file_name"])[0, 0, 0])
        return super().__call__({**record, "image_id": number, "poison": ""})


@pytest.fixture
def folder(tmp_path: Path, catalogs: None) -> Path:
    """Five shards of unequal size."""
    (tmp_path / "shards").mkdir()
    numbers = itertools.count()
    for k, size in enumerate(SIZES):
        with webdataset.TarWriter(str(tmp_path / f"shards/{k}.tar"), encoder=False) as tar:
            for i in itertools.islice(numbers, size):
                file = io.BytesIO()
                Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(file, "png")
                tar.write({"__key__": f"{i:04d}", "png": file.getvalue()})
    register_entry("IMAGES", f"toy_shards:{tmp_path}/shards/*.tar")
    return tmp_path


SETTINGS = (
    *("DATASETS.TRAIN", ("toy_shards",), "DATASETS.TEST", (), "INPUT.MAPPER", "ToyShardMapper"),
    *("SOLVER.MAX_ITER", 15, "SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", 2),
    *("DATALOADER.SHUFFLE_SHARDS", 2),
)


def test_killed_at_random_every_sample_is_trained_once_an_epoch(build_trainer: Build, folder: Path) -> None:
    whole = build_trainer(*SETTINGS, folder="whole")
    whole.train()
    order = list(itertools.chain.from_iterable(whole.model.seen))
    assert sorted(order[:TOTAL]) == sorted(order[TOTAL : 2 * TOTAL]) == list(range(TOTAL))

    rng, seen, kills, finished = random.Random(1), {}, 0, False
    while not finished:
        trainer = build_trainer(*SETTINGS, resume=True)
        last, step = trainer.start_iter + rng.randint(1, 5), trainer.run_step

        def run_step(trainer: Trainer = trainer, last: int = last, step: Any = step) -> None:
            if trainer.iter == last:
                raise Killed
            step()

        trainer.run_step = run_step  # type: ignore[method-assign]
        try:
            trainer.train()
            finished = True
        except Killed:
            kills += 1
        seen.update(enumerate(trainer.model.seen, trainer.start_iter))
    assert kills > 2 and [seen[i] for i in range(15)] == whole.model.seen
    weights = [torch.load(folder / name / "model_final.pth") for name in ("run", "whole")]
    assert all(torch.equal(v, weights[1]["model"][k]) for k, v in weights[0]["model"].items())
    assert weights[0]["data_order"] == {"samples": TOTAL, "shards": 5, "shards_mixed": 2, "batch_size": 4}


def test_a_run_that_finds_other_shards_says_so(
    build_trainer: Build, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_trainer(*SETTINGS, "SOLVER.MAX_ITER", 2).train()
    register_entry("IMAGES", f"fewer:{folder}/shards/{{0..2}}.tar")
    resumed = build_trainer(*SETTINGS, "SOLVER.MAX_ITER", 3, "DATASETS.TRAIN", ("fewer",), resume=True)
    with caplog.at_level(logging.WARNING):
        resumed.train()
    assert "'samples': 29" in caplog.text and "it will see some samples twice" in caplog.text
