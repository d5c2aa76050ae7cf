"""Region accuracy: which regions count, how they are cut, what the figures mean."""

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.clip import load_clip
from clipdense.evaluation.regions import (
    Region,
    RegionAccuracy,
    crop_region,
    evaluate_regions,
    regions_of,
)


def record(tmp_path):
    """64 x 96 px: ground 7 everywhere but in a thing at (10, 5)..(30, 25); the right third is ground 8."""
    segments = np.full((64, 96), 1, np.uint8)
    segments[:, 64:] = 2
    segments[5:25, 10:30] = 3
    image = np.zeros((64, 96, 3), np.uint8)
    image[5:25, 10:30] = (255, 0, 0)
    Image.fromarray(image).save(tmp_path / "image.png")
    # panoptic PNG: id = R + 256 G + 65536 B
    Image.fromarray(np.stack([segments, 0 * segments, 0 * segments], -1)).save(tmp_path / "panoptic.png")
    thing = {"category_id": 4, "bbox": [10, 5, 20, 20]}
    return {
        "file_name": str(tmp_path / "image.png"),
        "pan_seg_file_name": str(tmp_path / "panoptic.png"),
        "annotations": [
            {**thing, "visible": 0.9},
            {**thing, "visible": 0.3},
            {**thing, "visible": 0.9, "iscrowd": 1},
        ],
        "segments_info": [
            {"id": 1, "category_id": 7, "isthing": False},
            {"id": 2, "category_id": 8, "isthing": False},
            {"id": 3, "category_id": 4, "isthing": True},
        ],
    }


def test_regions_are_visible_things_and_squares_of_ground(tmp_path):
    sample = record(tmp_path)
    regions = regions_of(sample, things=[2, 4], stuff=[7, 8], min_visible=0.5)
    assert regions[0] == Region((10, 5, 30, 25), 1, True)
    assert [r.label for r in regions if not r.isthing] == [0, 1]
    for region in regions[1:]:
        x0, y0, x1, y1 = map(int, region.box)
        assert x1 - x0 == y1 - y0 >= 24
        segments = np.array(Image.open(sample["pan_seg_file_name"]))[..., 0]
        assert (segments[y0:y1, x0:x1] == region.label + 1).all()
    assert len(regions_of(sample, [2, 4], [7, 8], min_visible=0.0)) == len(regions) + 1


def test_crop_enlarges_clips_and_letterboxes():
    image = np.full((60, 60, 3), 200, np.uint8)
    image[20:40, 10:50] = (0, 0, 255)
    crop = crop_region(image, Region((10, 20, 50, 40), 0, True), 30)
    assert crop.shape == (30, 30, 3)
    # 60 x 30 px of image on 30 x 15 px, black above and below
    assert (crop[:7] == 0).all() and (crop[-7:] == 0).all()
    assert (crop[15, 15] == (0, 0, 255)).all() and (crop[9, 2] == 200).all()
    stuff = crop_region(image, Region((10, 20, 50, 40), 0, False), 40)
    assert (stuff[20] == (0, 0, 255)).all()


def test_accuracy_of_hand_made_predictions():
    accuracy = RegionAccuracy(
        ["red a", "red b", "blue a"],
        groups={"novel": frozenset({2})},
        attributes={"color": ["red", "red", "blue"]},
    )
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 2, 3]])
    accuracy.add(scores, [0, 0, 1, 2])
    assert accuracy.summary() == pytest.approx(
        {
            "top1": 75,
            "macc1": 100 * (1 + 0 + 1) / 3,
            "macc5": 100,
            "top1-color": 100,
            "top1-novel": 100,
            "n": 4,
        }
    )
    assert RegionAccuracy(["a"]).summary() == {"n": 0}


def test_every_region_is_named_once_by_every_source(tmp_path):
    torch.manual_seed(0)
    clip = load_clip("shapes-vit", "random")
    unit = torch.nn.functional.normalize(torch.randn(2, clip.embed_dim), dim=1)
    empty = {True: RegionAccuracy(["x", "y"]), False: RegionAccuracy(["u", "v"])}
    sample = record(tmp_path)
    results = evaluate_regions(
        clip, [sample, sample], unit, unit, [2, 4], [7, 8], empty, modes=["plain", "value"], min_visible=0.5
    )
    assert set(results) == {"crop", "dense/plain", "dense/value"}
    for kinds in results.values():
        assert kinds["things"]["n"] == 2 and kinds["stuff"]["n"] == 4
    # the embeddings decide: with the class of the thing alone, all of them are right
    with torch.inference_mode():
        crop = torch.from_numpy(
            crop_region(
                np.array(Image.open(sample["file_name"])), Region((10, 5, 30, 25), 1, True), 64
            ).copy()
        )
        u = clip.encode_image(((crop / 255 - 0.5) / 0.5).permute(2, 0, 1)[None])
    aligned = torch.nn.functional.normalize(torch.cat([-u, u]), dim=1)
    right = evaluate_regions(clip, [sample], aligned, unit, [2, 4], [7, 8], empty, modes=[], min_visible=0.5)
    assert right["crop"]["things"]["top1"] == 100
    wrong = evaluate_regions(
        clip, [sample], aligned.flip(0), unit, [2, 4], [7, 8], empty, modes=[], min_visible=0.5
    )
    assert wrong["crop"]["things"]["top1"] == 0
