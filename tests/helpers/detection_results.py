"""Detections in COCO's result format for tests of the evaluators."""

import copy
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask (H, W) as run lengths with text ``counts``."""
    encoded = mask_utils.encode(np.asfortranarray(mask, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def decode_mask(annotation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Decode the mask (H, W) of an annotation: polygons, or run lengths of either kind."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        return mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        segmentation = mask_utils.frPyObjects(segmentation, height, width)
    return mask_utils.decode([segmentation])[..., 0]


def perturbed_detections(dataset: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Make detections from a ground truth: shifted, doubled, of wrong classes, with tied scores and empty
    masks. An eighth of the images has none, and one has 150 of one class.
    """
    rng = np.random.default_rng(seed)
    images = {image["id"]: image for image in dataset["images"]}
    classes = [category["id"] for category in dataset["categories"]]
    bare = set(rng.choice(list(images), len(images) // 8, replace=False).tolist())
    results: list[dict[str, Any]] = []
    for annotation in dataset["annotations"]:
        image_id = annotation["image_id"]
        if image_id in bare:
            continue
        mask = decode_mask(annotation, images[image_id]["height"], images[image_id]["width"])
        for _ in range(rng.integers(0, 4)):
            dx, dy = rng.integers(-6, 7, 2) * (rng.random() < 0.7)
            x, y, w, h = annotation["bbox"]
            tied = rng.random() < 0.5
            image = images[image_id]
            federated = image.get("neg_category_ids", []) + image.get("not_exhaustive_category_ids", [])
            label = annotation["category_id"]
            if rng.random() < 0.2:
                label = int(rng.choice(federated or classes))
            results.append(
                {
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [x + float(dx), y + float(dy), w * float(1 + 0.1 * rng.normal()), h],
                    "score": round(rng.random(), 1) if tied else rng.random(),
                    "segmentation": encode_mask(np.roll(mask, (dy, dx), (0, 1)) * (rng.random() < 0.97)),
                }
            )
            if rng.random() < 0.1:
                results.append(copy.deepcopy(results[-1]))
    crowded = dataset["images"][0]
    for _ in range(150):
        x, y = rng.random(2) * (crowded["width"] * 0.7, crowded["height"] * 0.7)
        w, h = rng.random(2) * 90 + 5
        mask = np.zeros((crowded["height"], crowded["width"]), np.uint8)
        mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
        row = {"image_id": crowded["id"], "category_id": classes[0], "score": round(rng.random(), 1)}
        results.append({**row, "bbox": [float(v) for v in (x, y, w, h)], "segmentation": encode_mask(mask)})
    return results
