"""Pictures of k-means clusters of a dense feature map (as in the qualitative figure of CLIPSelf)."""

from __future__ import annotations

import math
import os
import textwrap
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
    """Cluster the L2-normalised features of one image.

    Args:
        dense: (1, D, g, g), features of the image letterboxed to a square. Cells of the padding are ignored.
        image_size: (H, W) of the image.
        clusters: number of clusters; at most the number of cells.
        seed: random seed of the initial centres.

    Returns:
        Cluster indices (H, W) int32, enlarged by nearest neighbour and ordered by size, largest first.
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
    """Draw each image beside its clusters by several models, one row per image, as a PNG.

    Args:
        images: (H, W, 3) uint8 RGB.
        maps: title -> clusters (H, W) of each image, see `cluster_map`.
        path: file to write.
        cell: side of a picture in inches (110 pixels each).

    Raises:
        ValueError: If there are no images, or images and maps differ in number.
    """
    if not images or any(len(labels) != len(images) for labels in maps.values()):
        counts = ", ".join(f"{len(labels)} maps of {title}" for title, labels in maps.items())
        raise ValueError(
            f"expected at least one image, and a map per image and title; got {len(images)} images, {counts}"
        )
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
        # a line of 9 points holds about twelve characters an inch
        ax.set_title(textwrap.fill(title, max(8, round(12 * cell))), fontsize=9, parse_math=False)
    for ax in axes.flat:
        ax.set_axis_off()
    with atomic_path(os.fspath(path)) as part:
        figure.savefig(part, format="png")
