"""Tables of numbers as pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clipdense.files import atomic_path

__all__ = ["draw_heatmaps"]


def draw_heatmaps(
    tables: Mapping[str, Sequence[Sequence[float]]],
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | os.PathLike[str],
    *,
    row_title: str = "",
    column_title: str = "",
) -> None:
    """Draw tables of the same size side by side as a PNG; the largest value of each is framed.

    Args:
        tables: Title -> values by row and column; NaN is left blank.
        rows: Names of the rows.
        columns: Names of the columns.
        path: File to write.
        row_title: Title of the vertical axis.
        column_title: Title of the horizontal axis.

    Raises:
        ValueError: If there is no table.
    """
    if not tables:
        raise ValueError("there is no table to draw")
    width = 1.4 + 0.62 * len(columns)
    figure = Figure(figsize=(width * len(tables), 1.4 + 0.42 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        values = np.asarray(table, float)
        ax.imshow(values, cmap="viridis", aspect="auto")
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        ax.set(title=title, xlabel=column_title, ylabel=row_title)
        finite = np.isfinite(values)
        middle = (np.nanmin(values) + np.nanmax(values)) / 2 if finite.any() else 0.0
        for y, x in np.argwhere(finite):
            color = "white" if values[y, x] < middle else "black"
            ax.text(x, y, f"{values[y, x]:.1f}", ha="center", va="center", fontsize=8, color=color)
        if finite.any():
            y, x = np.unravel_index(np.nanargmax(values), values.shape)
            ax.add_patch(_frame(int(x), int(y)))
    with atomic_path(path) as part:
        figure.savefig(part, format="png")


def _frame(x: int, y: int) -> Rectangle:
    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec="red", lw=2)
