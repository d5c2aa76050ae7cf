"""Small datasets that tests write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, get_cfg


@pytest.fixture
def cfg() -> CfgNode:
    """A detection config for images of about 32 pixels."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (32, 40, 48), 96
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 32, 96
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = 4, 7, 0
    return cfg


@pytest.fixture
def coco_json(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Write a COCO dataset of random images, wide and tall, with a polygon and an RLE mask each."""

    def write(
        count: int = 10, categories: tuple[str, ...] = ("cat", "dog"), folder: str = "own"
    ) -> tuple[Path, Path]:
        rng = np.random.default_rng(0)
        root = tmp_path / folder
        (root / "images").mkdir(parents=True)
        content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 3 * k + 2, "name": name} for k, name in enumerate(categories)],
        }
        for i in range(count):
            height, width = ((24, 36), (36, 24))[i % 2]
            name = f"{i:03d}.png"
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(
                root / "images" / name
            )
            content["images"].append({"id": i, "file_name": name, "height": height, "width": width})
            mask = np.zeros((height, width), np.uint8, order="F")
            mask[4:12, 6:18] = 1
            rle = mask_util.encode(mask)
            rle["counts"] = rle["counts"].decode()
            masks = [[[2, 2, 20, 2, 20, 20, 2, 20]], rle]
            for k, (box, mask) in enumerate(zip([[2, 2, 18, 18], [6, 4, 12, 8]], masks, strict=True)):
                annotation = {
                    "id": 2 * i + k + 1,
                    "image_id": i,
                    "category_id": 3 * ((i + k) % len(categories)) + 2,
                }
                content["annotations"].append(
                    annotation | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0, "segmentation": mask}
                )
        (root / "annotations.json").write_text(json.dumps(content))
        return root / "annotations.json", root / "images"

    return write
