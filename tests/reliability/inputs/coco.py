"""COCO files of a user, through the stages of training and evaluation: setup, loader, mapper, evaluator."""

import argparse
import copy
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.reliability.mutations import damage_json
from tests.reliability.outcomes import Case, WrongResultError
from tests.reliability.world import CONFIG, World

NAN, INF = float("nan"), float("inf")
SIZE = [256, 256]

# Field of the first row -> values.
FIELDS: dict[str, list[Any]] = {
    "annotations/bbox": [
        *([NAN, 1, 5, 5], [1, 1, INF, 5], [10, 10, -5, 5], [10, 10, 0, 0], [0, 0, 1e30, 1e30]),
        *([1e9, 1e9, 5, 5], [1, 2, 3], [1, 2, 3, 4, 5], [], "1,2,3,4", ["1", "2", "3", "4"], None, 5),
        *({"x": 1}, [[1, 2, 3, 4]], [None] * 4),
    ],
    "annotations/segmentation": [
        *([], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [["a"] * 6], [[NAN] * 6], [[INF, 1, 2, 3, 4, 5]]),
        *([[1e18, 1e18, -1e18, 3, 4, 5]], [[0, 0, 1e6, 0, 1e6, 1e6]], [[]], "abc", 5, {}, None),
        *({"size": SIZE}, {"counts": "abc"}, {"size": SIZE, "counts": "\u00e9\0zz"}),
        *({"size": SIZE, "counts": ""}, {"size": SIZE, "counts": "0"}, {"size": SIZE, "counts": "o" * 3000}),
        *({"size": SIZE, "counts": [1, 2, 3]}, {"size": SIZE, "counts": [10**7]}),
        *({"size": SIZE, "counts": [-5, 65541]}, {"size": SIZE, "counts": [10**30]}),
        *({"size": SIZE, "counts": [NAN]}, {"size": [10, 10], "counts": [50, 50]}),
        *({"size": [0, 0], "counts": [0]}, {"size": [-1, -1], "counts": [1]}),
        *({"size": [60000, 60000], "counts": [60000**2]}, {"size": [2**40, 2**40], "counts": [5]}),
        *({"size": [1, 2, 3], "counts": [6]}, {"size": ["256", "256"], "counts": [65536]}),
    ],
    "annotations/image_id": ["1", 1.5, -1, 10**30, 999999, [1], True, None],
    "annotations/category_id": ["1", 1.5, -1, 10**30, 999999, [1], True, None],
    "annotations/id": ["1", 1.5, -1, 10**30, [1], None],
    "annotations/iscrowd": ["1", 2, -1, None, []],
    "annotations/area": ["1", -1, None, NAN],
    "categories/id": ["1", 1.5, -1, 10**30, None],
    "categories/name": [None, 5, "", "red CIRCLE", ["a"], "x" * 100_000, "a\nb"],
    "images/id": ["1", 1.5, -1, 10**30, [1], None],
    "images/width": ["x", -5, 0, 256.0, 100, 10**12, None, NAN],
    "images/height": ["x", -5, 0, 256.0, 100, 10**12, None, NAN],
    "images/file_name": [
        *("nothere.png", ".", "", "/etc/passwd", "../../../../../etc/passwd", "http://127.0.0.1:9/a.png"),
        *(None, 5, "a\0b.png", "a" * 5000, "\ud800.png", "../annotations/instances_closed_val_4.json"),
    ],
}


def cases(world: World, seed: int) -> Iterator[Case]:
    """Yield files with one bad field, without a part, as other text, then randomly damaged ones."""
    rng, folder = random.Random(seed), world.folder / "coco"
    folder.mkdir(exist_ok=True)
    base = json.loads((world.shapes4 / "annotations/instances_closed_val_4.json").read_text())

    def case(name: str, data: bytes) -> Case:
        path = folder / f"{name}.json"
        path.write_bytes(data)
        names = (path.name, "dataset own", "DATASETS.COCO_JSON", str(world.shapes4 / "val"), "/etc/passwd")
        return Case(name, lambda: _use(world, path), names)

    for i, (name, data) in enumerate(_systematic(base)):
        yield case(f"{i:03d}_{name}", data)
    for i in itertools.count():
        kind, data = damage_json(base, rng)
        yield case(f"random_{i:04d}_{kind.replace(' ', '')}", data)


def _systematic(base: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
        content = copy.deepcopy(base)
        change(content)
        return json.dumps(content).encode()

    text = json.dumps(base)
    yield "whole", text.encode()
    for key in ("images", "annotations", "categories"):
        yield f"without_{key}", changed(lambda c, key=key: c.pop(key))
        for value in (None, "x", 3, {}, [], ["a", 1, None]):
            yield f"{key}_{type(value).__name__}", changed(lambda c, key=key, v=value: c.update({key: v}))
    for field, values in FIELDS.items():
        part, key = field.split("/")
        for k, value in enumerate(values):
            yield f"{part}_{key}_{k}", changed(lambda c, p=part, key=key, v=value: c[p][0].update({key: v}))
        yield f"{part}_without_{key}", changed(lambda c, p=part, key=key: c[p][0].pop(key, None))
        yield (
            f"{part}_twice_{key}",
            changed(lambda c, p=part, key=key: c[p][1].update({key: c[p][0].get(key)})),
        )
    yield "all_crowd", changed(lambda c: [a.update(iscrowd=1) for a in c["annotations"]])
    yield "empty", b""
    yield "byte_order_mark", b"\xef\xbb\xbf" + text.encode()
    yield "utf16", text.encode("utf-16")
    yield "zeros", bytes(1000)
    yield "deep_list", b"[" * 200_000
    yield "deep_dict", b'{"a":' * 100_000
    yield "large_number", b'{"images": ' + b"9" * 6000 + b"}"
    yield "trailing", text.encode() + b"]"


class _FixedDetections(torch.nn.Module):
    """Model that finds the same object in every image."""

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        from detectron2.structures import Boxes, Instances

        outputs = []
        for sample in batch:
            found = Instances((sample["height"], sample["width"]))
            found.pred_boxes = Boxes(torch.tensor([[1.0, 1.0, 50.0, 50.0]]))
            found.scores, found.pred_classes = torch.tensor([0.5]), torch.tensor([0])
            found.pred_masks = torch.zeros(1, int(sample["height"]), int(sample["width"]), dtype=torch.bool)
            outputs.append({"instances": found})
        return outputs


def _use(world: World, path: Path) -> str:
    from clipdense.data.loader import build_test_loader, build_train_loader
    from clipdense.engine.evaluate import run_inference
    from clipdense.evaluation import build_evaluator
    from clipdense.run.setup import setup

    options = world.training_options(
        world.folder / "coco_output",
        DATASETS__COCO_JSON=str([f"own:{path}:{world.shapes4}/val"]),
        DATASETS__TRAIN="['own']",
        DATASETS__TEST="['own']",
        DATALOADER__NUM_WORKERS=0,
    )
    cfg = setup(argparse.Namespace(config_file=CONFIG, opts=options, resume=False, eval_only=False)).cfg
    dataset = build_train_loader(cfg, seed=7).dataset
    count = 0
    for record in dataset.items:
        instances = dataset.mapper(record)["instances"]
        boxes, classes = instances.gt_boxes.tensor, instances.gt_classes
        count += len(instances)
        if not boxes.isfinite().all() or not (boxes[:, 2:] > boxes[:, :2]).all():
            raise WrongResultError(f"boxes {boxes.tolist()[:2]}")
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < 80:
            raise WrongResultError(f"classes {classes.min()} to {classes.max()}, expected 0 to 79")
    run_inference(_FixedDetections(), build_test_loader(cfg, "own"), build_evaluator(cfg, "own"), 0, "own")
    return f"{count} objects"
