"""ROC curves as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clipdense.files import atomic_path
from clipdense.visualization.curves import class_color

__all__ = ["draw_roc"]


def draw_roc(curves: Mapping[str, Sequence[Sequence[float]]], path: str | os.PathLike[str]) -> None:
    """Draw ROC curves in one picture, as a PNG.

    Args:
        curves: Name -> points [false positive rate, true positive rate], ascending.
        path: File to write.

    Raises:
        ValueError: If there is no curve, or one has no points.
    """
    if not curves or not all(curves.values()):
        raise ValueError("no ROC curve to draw: it needs pairs of one class and of two classes")
    figure = Figure(figsize=(5.2, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color="0.7", lw=1, ls="--")
    for i, (name, points) in enumerate(curves.items()):
        ax.plot([x for x, _ in points], [y for _, y in points], color=class_color(i), lw=1.8, label=name)
    ax.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1))
    ax.grid(color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    for text in ax.legend(fontsize=8, frameon=False, loc="lower right").get_texts():
        text.set_parse_math(False)  # a file name may contain "$"
    with atomic_path(path) as part:
        figure.savefig(part, format="png")
