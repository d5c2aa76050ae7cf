"""t-SNE pictures: which pixels are drawn, and that near features are drawn near."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.visualization.neighbours import draw_neighbours, neighbour_positions, sample_pixels


def test_pixels_have_the_label_at_their_centre() -> None:
    labels = torch.zeros(8, 12, dtype=torch.int64)
    labels[:, 6:], labels[4:, :] = 3, 255
    features = torch.arange(6.0).view(1, 2, 3)
    values, found = sample_pixels(features, labels, count=5)
    assert dict(zip(values[:, 0].tolist(), found.tolist(), strict=True)) == {
        0: 0,
        1: 3,
        2: 3,
        3: 255,
        4: 255,
        5: 255,
    }
    assert sample_pixels(features, labels, count=1)[1].tolist() == [0, 3, 255]


def test_classes_are_drawn_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    directions = np.eye(8)[:3]
    labels = np.repeat(np.arange(3), 30)
    # pixels lie far from texts, as CLIP's two modalities do
    pixels = directions[labels] + 0.1 * rng.standard_normal((90, 8)) + 3 * np.eye(8)[6]
    texts = directions + 3 * np.eye(8)[7]
    pixels, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (pixels, texts))
    dots, stars = neighbour_positions(pixels.astype(np.float32), texts.astype(np.float32))
    nearest = np.linalg.norm(dots[:, None] - stars[None], axis=2).argmin(1)
    assert (nearest == labels).mean() > 0.9
    draw_neighbours(dots, labels, stars, ["red", "blue", "sky"], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    with pytest.raises(ValueError, match="3 texts, 1 names"):
        draw_neighbours(dots, labels, stars, ["red"], tmp_path / "b.png")
    with pytest.raises(ValueError, match="at least 3 features"):
        neighbour_positions(pixels[:1].astype(np.float32), texts[:1].astype(np.float32))
