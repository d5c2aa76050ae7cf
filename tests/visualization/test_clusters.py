"""Clusters of dense features."""

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.visualization.clusters import cluster_map, draw_clusters


def test_clusters_follow_directions_not_lengths():
    dense = torch.zeros(1, 3, 4, 4)
    dense[0, 0, :2] = torch.rand(2, 4) + 0.1  # one direction, many lengths
    dense[0, 1, 2, :] = torch.rand(4) + 5
    dense[0, 2, 3] = 9.0  # padding: the image is 3 / 4 as high as wide
    labels = cluster_map(dense, (6, 8), clusters=2)
    assert labels.shape == (6, 8)
    assert (labels[:4] == 0).all() and (labels[4:] == 1).all()  # nearest neighbour, the larger one first
    assert np.array_equal(labels, cluster_map(dense, (6, 8), clusters=2))
    assert cluster_map(torch.rand(1, 3, 2, 2), (5, 5), clusters=9).max() <= 3  # no more than cells


def test_panel(tmp_path):
    images = [np.zeros((20, 30, 3), np.uint8), np.full((30, 20, 3), 255, np.uint8)]
    maps = [np.zeros(image.shape[:2], np.int32) for image in images]
    maps[1][:, 10:] = 3
    draw_clusters(images, {"before": maps, "after": maps}, tmp_path / "new" / "panel.png")
    with Image.open(tmp_path / "new" / "panel.png") as panel:
        assert panel.width > panel.height
        assert len(np.unique(np.asarray(panel.convert("RGB")).reshape(-1, 3), axis=0)) > 3
    with pytest.raises(ValueError, match="2 images, 1 maps of before"):
        draw_clusters(images, {"before": maps[:1]}, tmp_path / "panel.png")
    with pytest.raises(ValueError, match="at least one image"):
        draw_clusters([], {}, tmp_path / "panel.png")
