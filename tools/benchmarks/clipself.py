"""Suite ``clipself``: a training step beside the forwards and the backward that it cannot avoid."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import MIN_PAIRS, Row, flops, wall
from clipdense import add_clipdense_config
from clipdense.clip import TowerRequest, load_clip
from clipdense.data.loader import build_train_loader
from clipdense.systems.clipself import CLIPSelf, CLIPSelfMapper

from detectron2.config import get_cfg

__all__ = ["FULL", "REDUCED", "add_arguments", "rows"]

FULL: tuple[str, ...] = ("--size", "1024", "--batch", "2", "--workers", "4")
REDUCED: tuple[str, ...] = ("--clip", "shapes-vit", "--size", "128")
"""Options of this suite in a full and in a reduced run of all suites."""

WHAT = "a training step | student forward and backward, teacher forward on the same crops"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the suite."""
    parser.add_argument("--clip", default="EVA02-B-16", help="model name (weights are random)")
    parser.add_argument(
        "--size", type=int, default=512, help="side of the student's image in pixels (published: 1024)"
    )
    parser.add_argument("--batch", type=int, default=1, help="number of images in a batch")
    parser.add_argument("--workers", type=int, default=1, help="number of processes that read images")
    parser.add_argument(
        "--pairs", type=int, default=MIN_PAIRS, help="number of interleaved pairs of timed runs"
    )
    parser.add_argument("--flops-only", action="store_true", help="skip the wall-clock row")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Measure FLOPs and wall time of a step on patches of 640 x 480 images, and the share of time that a run
    waits for data."""
    device = args.device
    torch.manual_seed(0)
    clip = load_clip(args.clip, "random")
    crop_size = clip.image_size[0]
    model = CLIPSelf(clip=clip).to(device)
    with tempfile.TemporaryDirectory() as folder:
        images = _photographs(Path(folder), 4 * args.batch)
        mapper = CLIPSelfMapper(image_size=args.size, crop_size=crop_size)
        batch = [mapper(record) for record in images[: args.batch]]
        crops = sum(len(sample["crops"]) for sample in batch)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            sum(model(batch).values()).backward()

        def floor() -> None:
            model.zero_grad(set_to_none=True)
            x = model.student.normalize(torch.stack([sample["image"] for sample in batch]))
            dense: Tensor = model.student.visual(x, TowerRequest(dense=model.mode)).dense
            with torch.no_grad():
                model.teacher.encode_image(model.student.normalize(torch.cat([s["crops"] for s in batch])))
            dense.sum().backward()

        notes = f"{args.clip}, {args.batch} x {args.size} px, {crops} crops of {crop_size} px."
        cost = flops(step) / 1e9, flops(floor) / 1e9
        yield Row("clipself/step_flops", *cost, "GFLOP", what=WHAT, notes=notes)
        if not args.flops_only:
            row = wall(
                "clipself/step_wall",
                step,
                floor,
                pairs=args.pairs,
                what=WHAT,
                warm_up=False,
                images=args.batch,
            )
            share = _data_wait(images, mapper, args.batch, args.workers, row.ours)
            waiting = f"A run waits for data {share:.1%} of its time ({args.workers} workers)."
            row.notes = f"{row.notes} {waiting}".strip()
            row.values["data_wait"] = share
            yield row


def _data_wait(
    images: list[dict[str, Any]], mapper: CLIPSelfMapper, batch: int, workers: int, step: float
) -> float:
    """Measure the share of time that a run waits for the loader if a step takes ``step`` seconds."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = batch, workers
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    loader = iter(build_train_loader(cfg, seed=0, mapper=mapper, dataset=images))
    next(loader)  # starts the workers
    waited, steps = 0.0, 5
    for _ in range(steps):
        time.sleep(step)
        start = time.perf_counter()
        next(loader)
        waited += time.perf_counter() - start
    return waited / (waited + steps * step)


def _photographs(folder: Path, number: int) -> list[dict[str, Any]]:
    """Write JPEGs of a photograph's size and detail; return their dataset records."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
        path = folder / f"{i}.jpg"
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(path)
        records.append({"file_name": str(path), "image_id": i, "height": 480, "width": 640})
    return records
