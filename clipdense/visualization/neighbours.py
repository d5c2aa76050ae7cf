"""t-SNE pictures of pixel features and class embeddings in one space (as in the figure of DenseCLIP)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from clipdense.files import atomic_path
from clipdense.visualization.curves import class_color

__all__ = ["draw_neighbours", "neighbour_positions", "sample_pixels"]

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def sample_pixels(features: Tensor, labels: Tensor, count: int, seed: int = 0) -> tuple[Array, Labels]:
    """Draw pixels of every class of an image.

    Args:
        features: (D, h, w) over the image.
        labels: classes (H, W); a cell of the features has the label at its centre.
        count: largest number of pixels of a class.
        seed: random seed of the draw.

    Returns:
        Features (N, D) and their labels (N,), sorted by label.
    """
    size = (features.shape[1], features.shape[2])
    cells = F.interpolate(labels[None, None].float(), size, mode="nearest-exact")[0, 0].long()
    values, where = features.flatten(1).T.float().cpu().numpy(), cells.flatten().cpu().numpy()
    rng = np.random.default_rng(seed)
    chosen = np.concatenate(
        [rng.permutation(np.flatnonzero(where == label))[:count] for label in np.unique(where)]
    )
    return values[chosen], where[chosen]


def neighbour_positions(pixels: Array, texts: Array, seed: int = 0) -> tuple[Array, Array]:
    """Place features in the plane so that near ones stay near (t-SNE, van der Maaten and Hinton, JMLR 2008).

    All pixels of one modality lie closer to each other than to any text, so that both are centred first.

    Args:
        pixels: (N, D) L2-normalised pixel features.
        texts: (K, D) L2-normalised class embeddings.
        seed: random seed.

    Returns:
        Positions of the pixels (N, 2) and of the texts (K, 2).

    Raises:
        ValueError: If there are fewer than three features.
    """
    if len(pixels) + len(texts) < 3:
        raise ValueError(f"t-SNE needs at least 3 features, not {len(pixels) + len(texts)}")
    points = np.concatenate([_centred(pixels), _centred(texts)])
    perplexity = min(30.0, (len(points) - 1) / 3)
    placed = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(
        points
    )
    return placed[: len(pixels)], placed[len(pixels) :]


def _centred(features: Array) -> Array:
    centred = features - features.mean(0)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True).clip(min=1e-12)
    return np.asarray(centred / lengths, np.float32)


def draw_neighbours(
    pixels: Array, labels: Labels, texts: Array, names: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Draw pixels as dots and class embeddings as stars with their names, one colour a class, as a PNG.

    Args:
        pixels: (N, 2), see `neighbour_positions`.
        labels: (N,) in 0 .. K - 1.
        texts: (K, 2).
        names: K class names.
        path: file to write.

    Raises:
        ValueError: If the numbers of texts and names differ.
    """
    if len(texts) != len(names):
        raise ValueError(f"expected a name for each text; got {len(texts)} texts, {len(names)} names")
    figure = Figure(figsize=(8, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    colors = np.array([class_color(k) for k in range(len(names))])
    ax.scatter(pixels[:, 0], pixels[:, 1], s=8, c=colors[labels], linewidths=0)
    ax.scatter(texts[:, 0], texts[:, 1], s=160, marker="*", c=colors, edgecolors="black", zorder=3)
    for (x, y), name in zip(texts, names, strict=True):
        ax.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    ax.margins(x=0.15)  # room for the names
    ax.set_xticks([])
    ax.set_yticks([])
    with atomic_path(os.fspath(path)) as part:
        figure.savefig(part, format="png")
