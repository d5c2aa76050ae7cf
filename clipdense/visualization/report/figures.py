"""Figures of a report, as data URIs."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay

from clipdense.visualization.canvas import Picture
from clipdense.visualization.curves import class_color, draw_curve
from clipdense.visualization.report.document import data_uri

__all__ = ["confusion_matrix", "curves", "error_bars", "picture", "precision_recall"]


def picture(pixels: Picture) -> str:
    """Return a picture (H, W, 3) uint8 RGB as a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=85)
    return data_uri(buffer.getvalue(), "image/jpeg")


def curves(metrics_file: Path) -> str:
    """Return the training curves of a ``metrics.json``.

    Raises:
        ValueError: If the file has nothing to draw.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "curve.png")
        draw_curve(metrics_file, path)
        return data_uri(path.read_bytes(), "image/png")


def confusion_matrix(confusion: npt.NDArray[np.int64], names: Sequence[str], shown: Sequence[int]) -> str:
    """Draw a confusion matrix, each row divided by its sum.

    Args:
        confusion: counts (N, N), true class by predicted class.
        names: N names.
        shown: rows and columns to draw.
    """
    total = confusion.sum(1, keepdims=True)
    share = np.divide(100 * confusion, total, out=np.zeros(confusion.shape), where=total > 0)
    share, names = share[np.ix_(shown, shown)], [names[k] for k in shown]
    side = 2.6 + 0.34 * len(names)
    plot = _plot(side + 0.8, side)
    axes = plot.subplots()
    ConfusionMatrixDisplay(share, display_labels=names).plot(
        ax=axes, cmap="Blues", xticks_rotation="vertical", include_values=False, colorbar=False
    )
    axes.set(xlabel="predicted", ylabel="true")
    axes.tick_params(labelsize=8)
    for y, x in np.argwhere(share >= 0.5):
        color = "white" if share[y, x] > 50 else "black"
        axes.text(x, y, f"{share[y, x]:.0f}", ha="center", va="center", fontsize=6.5, color=color)
    return _svg(plot)


_BESIDE: dict[str, Any] = {
    "frameon": False,
    "fontsize": 8,
    "loc": "center left",
    "bbox_to_anchor": (1.0, 0.5),
}
"""Place of a legend: beside the axes, where it covers nothing."""


def precision_recall(runs: Mapping[str, Mapping[str, npt.NDArray[np.float64]]]) -> str:
    """Draw mean precision over recall, a line style for each run, a colour for each IoU threshold.

    Args:
        runs: name of the run -> name of the curve -> precision (101,).
    """
    plot = _plot(6.4 if len(runs) == 1 else 8, 4)
    axes = plot.subplots()
    recall = np.linspace(0, 1, 101)
    for style, (run, lines) in zip(("-", "--"), runs.items(), strict=False):
        for number, (name, precision) in enumerate(lines.items()):
            label = f"{run}, {name}" if len(runs) > 1 else name
            axes.plot(recall, precision, style, color=class_color(number), label=label)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    _finish(axes)
    return _svg(plot)


def error_bars(runs: Mapping[str, Sequence[tuple[str, float, int | None]]]) -> str:
    """Draw the gain of AP50 by kind of error, a bar for each run."""
    names = [name.partition(":")[0] for name, _, _ in next(iter(runs.values()))]
    plot = _plot(7.5, 0.9 + 0.4 * len(names) * len(runs))
    axes = plot.subplots()
    height = 0.8 / len(runs)
    for number, (run, rows) in enumerate(runs.items()):
        places = np.arange(len(names)) + (number - (len(runs) - 1) / 2) * height
        bars = axes.barh(places, [gain for _, gain, _ in rows], 0.9 * height, color=class_color(number))
        bars.set_label(run)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("gain of AP50 in points if these errors were mended")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        axes.legend(**_BESIDE)
    return _svg(plot)


def _plot(width: float, height: float) -> Plot:
    plot = Plot(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(plot)
    return plot


def _finish(axes: object) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(**_BESIDE)


def _svg(plot: Plot) -> str:
    buffer = io.BytesIO()
    plot.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")
