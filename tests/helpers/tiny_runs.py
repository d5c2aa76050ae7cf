"""Output folders of runs on tiny datasets: detections with one error of each kind, and label maps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

CLASSES = ("cat", "dog", "bird", "fish")
SIZE = 100

# (class, box) of the object in each image; x, y, width, height
OBJECTS = [
    (0, (10, 10, 40, 40)),
    (0, (10, 10, 40, 40)),
    (1, (10, 10, 40, 40)),
    (1, (10, 10, 40, 40)),
    (2, (10, 10, 40, 40)),
    (2, (10, 10, 20, 20)),
]
# (image, class, box, score) of each detection
DETECTIONS = [
    (0, 0, (10, 10, 40, 40), 0.9),  # correct
    (1, 1, (10, 10, 40, 40), 0.85),  # wrong class
    (2, 1, (30, 10, 40, 40), 0.8),  # IoU of 1/3
    (3, 2, (30, 10, 40, 40), 0.75),  # both
    (4, 2, (10, 10, 40, 40), 0.7),  # correct
    (4, 2, (11, 10, 40, 40), 0.65),  # duplicate
    (5, 2, (60, 60, 20, 20), 0.6),  # background
]


def coco_content(objects: list[Any] = OBJECTS) -> dict[str, Any]:
    """Return an annotation file; its ids do not begin at 1."""
    return {
        "images": [
            {"id": 10 + i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE}
            for i in range(len(OBJECTS))
        ],
        "categories": [{"id": 5 + k, "name": name} for k, name in enumerate(CLASSES)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 10 + i,
                "category_id": 5 + row[0],
                "bbox": list(row[1]),
                "area": row[1][2] * row[1][3],
                "iscrowd": 0,
            }
            for i, row in enumerate(objects)
            if row is not None
        ],
    }


def detection_rows(detections: list[Any] = DETECTIONS) -> list[dict[str, Any]]:
    """Return detections in COCO's result format."""
    return [
        {"image_id": 10 + image, "category_id": 5 + k, "bbox": list(box), "score": score}
        for image, k, box, score in detections
    ]


def detector_run(folder: Path, data: Path, dataset: str, detections: list[Any] = DETECTIONS) -> Path:
    """Write the output folder of a detector that was evaluated and trained for two iterations."""
    data.mkdir(parents=True, exist_ok=True)
    for image in coco_content()["images"]:
        Image.new("RGB", (SIZE, SIZE), (90, 120, 90)).save(data / image["file_name"])
    (data / "a.json").write_text(json.dumps(coco_content()))
    predictions = folder / "inference" / dataset
    predictions.mkdir(parents=True)
    (predictions / "coco_instances_results.json").write_text(json.dumps(detection_rows(detections)))
    (folder / "config.yaml").write_text(
        f"DATASETS:\n  COCO_JSON: ['{dataset}:{data}/a.json:{data}']\n  TEST: ['{dataset}']\n  TRAIN: []\n"
        f"OUTPUT_DIR: {folder}\nVERSION: 2\n"
    )
    (folder / "environment.txt").write_text("torch  2.0 <of this test>\n")
    (folder / "results.json").write_text(json.dumps({"bbox/AP": 40.25, "bbox/AP50": None, "ended_by": "x"}))
    lines = [{"iteration": i, "total_loss": 2.0 - i, "lr": 0.1} for i in (0, 1)]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def label_maps(seed: int, count: int = 4) -> list[np.ndarray]:
    """Return random label maps of three classes, with some ignored pixels (255)."""
    random = np.random.default_rng(seed)
    maps = [random.integers(0, 3, (16, 12)).astype(np.uint8) for _ in range(count)]
    for labels in maps:
        labels[0, :3] = 255
    return maps


def semantic_predictions(folder: Path, files: list[str], maps: list[np.ndarray]) -> None:
    """Write predictions in COCO's format for stuff."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for file, labels in zip(files, maps, strict=True):
        for k in np.unique(labels).tolist():
            mask = mask_util.encode(np.asfortranarray(labels == k, np.uint8))
            segmentation = {"size": mask["size"], "counts": mask["counts"].decode()}
            rows.append({"file_name": file, "category_id": k, "segmentation": segmentation})
    (folder / "sem_seg_predictions.json").write_text(json.dumps(rows))
