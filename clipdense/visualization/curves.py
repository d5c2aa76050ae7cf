"""Training curves, and the class colours of all pictures."""

from __future__ import annotations

import colorsys
import json
import math
import os

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from clipdense.files import atomic_path

__all__ = ["class_color", "draw_curve", "read_metrics"]


def class_color(index: int) -> tuple[float, float, float]:
    """Return the colour of a class, RGB in 0..1; consecutive classes have very different hues."""
    hue = (0.02 + 0.61803398875 * index) % 1
    return colorsys.hsv_to_rgb(hue, (0.95, 0.7, 0.85)[index % 3], (1.0, 0.95, 0.8)[index // 3 % 3])


Series = tuple[list[int], list[float]]
"""Ascending iterations, and their values."""

_METRICS = {
    *(f"{metric}{group}" for metric in ("AP", "AP50", "PQ", "mIoU") for group in ("", "_base", "_novel")),
    *("APr", "top1", "rois.thing.macc1", "maskpool.stuff.macc1", "crops.thing.macc1"),
}
_VALIDATION = "validation/total_loss"
_OTHER = ("lr", "time", "data_time", "eta_seconds", "rank_data_time", "iteration")


def draw_curve(metrics_json: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Draw losses, learning rate and metrics of a training run as a PNG.

    Args:
        metrics_json: file of Detectron2's `JSONWriter`, with one JSON object per line. Incomplete lines are
            ignored; if an iteration occurs twice, the later line counts.
        path: file to write.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has no losses, learning rates or metrics.
    """
    series = read_metrics(metrics_json)
    losses = {n: s for n, s in series.items() if "loss" in n and ("/" not in n or n == _VALIDATION)}
    metrics = {n: s for n, s in series.items() if "/" in n and n.rpartition("/")[2] in _METRICS}
    rates = {n: s for n, s in series.items() if n == "lr"}
    parts = [(t, s) for t, s in (("loss", losses), ("learning rate", rates), ("evaluation", metrics)) if s]
    if not parts:
        raise ValueError(f"{metrics_json} has no losses, learning rates or metrics to draw")
    figure = Figure(
        figsize=(10, 1.2 + sum(_HEIGHTS[title] for title, _ in parts)), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(parts), 1, sharex=True, squeeze=False, height_ratios=[_HEIGHTS[title] for title, _ in parts]
    )[:, 0]
    for ax, (title, lines) in zip(axes, parts, strict=True):
        _plot(ax, title, lines)
    axes[-1].set_xlabel("iteration")
    with atomic_path(path) as part:
        figure.savefig(part, format="png")


_HEIGHTS = {"loss": 3.2, "learning rate": 1.2, "evaluation": 2.6}
_CROWDED = 60
"""Number of points from which a loss is drawn faintly, below its running mean."""


def _plot(ax: Axes, title: str, lines: dict[str, Series]) -> None:
    ordered = sorted(lines.items(), key=lambda item: item[0] != "total_loss")
    for i, (name, (x, y)) in enumerate(ordered):
        total = name in ("total_loss", _VALIDATION)
        color = "black" if total or name == "lr" else class_color(i)
        if title == "loss" and len(y) > _CROWDED:
            ax.plot(x, y, color=color, lw=0.8, alpha=0.2)
            y = _smooth(y).tolist()
        marker = "o" if title == "evaluation" or name == _VALIDATION else None
        ax.plot(x, y, color=color, lw=2.2 if total else 1.5, marker=marker, ms=3.5, label=name)
    ax.set_ylabel("evaluation (%)" if title == "evaluation" else title)
    ax.grid(color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    if title == "loss" and all(value > 0 for _, y in lines.values() for value in y):
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        # three labels a decade do not overlap; a range with fewer than two of them gets even steps
        steps = (1.0, 2.0, 5.0)
        inside = [s * 10.0**e for e in range(-12, 13) for s in steps if low <= s * 10.0**e <= high]
        ax.yaxis.set_major_locator(LogLocator(subs=steps) if len(inside) > 1 else MaxNLocator(4))
        ax.yaxis.set_major_formatter("{x:.3g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    if title != "learning rate":
        legend = ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        for text in legend.get_texts():
            text.set_parse_math(False)  # a class name may contain "$"


def read_metrics(path: str | os.PathLike[str]) -> dict[str, Series]:
    """Read every scalar of a `JSONWriter` file as (iterations, values), ordered by iteration."""
    series: dict[str, dict[int, float]] = {}
    with open(path) as file:
        for line in file:
            try:
                row = json.loads(line)
                iteration = int(row.pop("iteration"))
            except (ValueError, KeyError, AttributeError, TypeError):
                continue
            for name, value in row.items():
                if isinstance(value, (int, float)) and math.isfinite(value) and name not in _OTHER[1:]:
                    series.setdefault(name, {})[iteration] = float(value)
    return {name: (sorted(values), [values[i] for i in sorted(values)]) for name, values in series.items()}


def _smooth(values: list[float]) -> npt.NDArray[np.float64]:
    """Return the running mean over about a thirtieth of the values, fewer at both ends."""
    window = max(3, len(values) // 30) | 1
    kernel = np.ones(window)
    count = np.convolve(np.ones(len(values)), kernel, "same")
    return np.convolve(np.asarray(values), kernel, "same") / count
