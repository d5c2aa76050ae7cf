"""Pictures of what a dense map tells apart: k-means clusters of its unit vectors (the figure of CLIPSelf)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from torch import Tensor

from clipdense.files import atomic_path
from clipdense.visualization.curves import class_color

__all__ = ["cluster_map", "draw_clusters"]

Labels = npt.NDArray[np.int32]


def cluster_map(dense: Tensor, image_size: tuple[int, int], clusters: int, seed: int = 0) -> Labels:
    """Cluster the cells of one image's dense map by their direction.

    Args:
        dense: (1, D, g, g) of the image letterboxed to a square; cells of the padding are left out.
        image_size: (H, W) of the image.
        clusters: how many, at most; there are no more than cells.
        seed: of the initial centres.

    Returns:
        (H, W) int32, enlarged by nearest neighbour; cluster 0 has the most cells, 1 the second most.
    """
    side, longest = dense.shape[-1], max(image_size)
    rows, columns = (math.ceil(length * side / longest) for length in image_size)
    cells = dense[0, :, :rows, :columns].flatten(1).T.double().cpu().numpy()
    cells /= np.linalg.norm(cells, axis=1, keepdims=True).clip(min=1e-12)
    kmeans = KMeans(min(clusters, len(cells)), n_init=4, random_state=seed).fit(cells)
    order = np.argsort(-np.bincount(kmeans.labels_, minlength=kmeans.n_clusters), kind="stable")
    ranked = np.argsort(order)[kmeans.labels_].reshape(rows, columns).astype(np.int32)
    grid = np.zeros((side, side), np.int32)
    grid[:rows, :columns] = ranked
    enlarged = cv2.resize(grid, (longest, longest), interpolation=cv2.INTER_NEAREST_EXACT)
    return enlarged[: image_size[0], : image_size[1]]


def draw_clusters(
    images: Sequence[npt.NDArray[np.uint8]],
    maps: Mapping[str, Sequence[Labels]],
    path: str | os.PathLike[str],
    cell: float = 1.9,
) -> None:
    """A row for each image: the image and its clusters by every model, as a PNG.

    Args:
        images: (H, W, 3) uint8 RGB.
        maps: title -> clusters (H, W) of each image, see `cluster_map`.
        path: file to write.
        cell: side of a picture in inches, of 110 pixels.

    Raises:
        ValueError: no images, or another number of maps.
    """
    if not images or any(len(labels) != len(images) for labels in maps.values()):
        counts = ", ".join(f"{len(labels)} maps of {title}" for title, labels in maps.items())
        raise ValueError(f"clusters are drawn for at least one image: {len(images)} images, {counts}")
    shape = len(images), 1 + len(maps)
    figure = Figure(figsize=(cell * shape[1], cell * shape[0] + 0.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(*shape, squeeze=False)
    for i, image in enumerate(images):
        axes[i, 0].imshow(image)
        for ax, labels in zip(axes[i, 1:], maps.values(), strict=True):
            colors = np.array([class_color(k) for k in range(int(labels[i].max()) + 1)])
            ax.imshow(colors[labels[i]], interpolation="nearest")
    for ax, title in zip(axes[0], ["image", *maps], strict=True):
        ax.set_title(title, fontsize=9)
    for ax in axes.flat:
        ax.set_axis_off()
    with atomic_path(os.fspath(path)) as part:
        figure.savefig(part, format="png")
