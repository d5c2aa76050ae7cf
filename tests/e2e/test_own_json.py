"""README's "Train on your own COCO json", from the files to AP."""

import json
import runpy
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser

ROOT = Path(__file__).resolve().parents[2]
CLASSES = [f"bird {i}" for i in range(12)]
SIDE = 64

# A nano CLIP in place of CLIP RN50, and three iterations on small images in place of many.
SHORT = """
MODEL.CLIP.NAME shapes-rn MODEL.CLIP.PRETRAINED random MODEL.CLIP.POSITION_GRID 0
MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 16
MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 20
INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0
SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 3 SOLVER.STEPS (2,) TEST.EVAL_PERIOD 0
"""


def command() -> list[str]:
    """The words after ``python tools/train_net.py`` in README's block."""
    _, _, rest = (ROOT / "README.md").read_text().partition("**Train on your own COCO json**")
    block = rest.split("```")[1].replace("\\\n", " ")
    program, script, *words = shlex.split(block)
    assert (program, script) == ("python", "tools/train_net.py")
    return words


def write_json(path: Path, images: Path, count: int) -> None:
    """Images with a rectangle each, and its annotation: a polygon."""
    rng = np.random.default_rng(len(path.name))
    images.mkdir(parents=True, exist_ok=True)
    content: dict[str, list[Any]] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 10 * k + 1, "name": name} for k, name in enumerate(CLASSES)]
    for i in range(count):
        name = f"{path.stem}_{i}.jpg"
        x, y, w, h = 8 + i, 12, 30, 24
        picture = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        picture[y : y + h, x : x + w] += 150
        Image.fromarray(picture).save(images / name)
        content["images"].append({"id": i, "file_name": name, "height": SIDE, "width": SIDE})
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        content["annotations"].append(
            {"id": i + 1, "image_id": i, "category_id": 10 * i + 1, "bbox": [x, y, w, h], "area": w * h}
            | {"iscrowd": 0, "segmentation": [polygon]}
        )
    path.write_text(json.dumps(content))


def test_the_block_trains_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "birds/train.json", tmp_path / "birds/images", 4)
    write_json(tmp_path / "birds/val.json", tmp_path / "birds/images", 2)
    words = [*command(), *shlex.split(SHORT)]
    words[words.index("--config-file") + 1] = str(ROOT / words[words.index("--config-file") + 1])
    main = runpy.run_path(str(ROOT / "tools" / "train_net.py"))["main"]
    monkeypatch.chdir(tmp_path)
    try:
        results = main(default_argument_parser().parse_args(words))
    finally:
        for name in ("birds_train", "birds_val"):
            if name in DatasetCatalog.list():
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)
    assert {"bbox/AP", "bbox/AP50", "segm/AP"} <= set(results)
    output = tmp_path / "output/birds"
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert any("loss_pixel_text" in row for row in rows)
    found = json.loads(
        (output / "inference/birds_val/coco_instances_results.json").read_text()
    )  # with the file's own ids
    assert {row["category_id"] for row in found} <= {10 * k + 1 for k in range(12)}
    assert (output / "model_final.pth").is_file()
    assert (output / "predictions_birds_val.png").is_file()
