"""Sections of a report on one or two runs."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipdense.data.image import read_image
from clipdense.visualization.pictures import draw_output, draw_truth
from clipdense.visualization.report import figures
from clipdense.visualization.report.analysis import Analysis, Options
from clipdense.visualization.report.document import (
    Block,
    Cell,
    Figure,
    Gallery,
    Preformatted,
    Section,
    Table,
)
from clipdense.visualization.report.runs import Run

__all__ = ["Side", "dataset_sections", "run_sections", "settings_sections"]

MAX_MATRIX = 30
"""Classes in the drawing of a confusion matrix: those that are confused most."""

_CLASS_METRIC = re.compile(r"(?:.*/)?(AP|IoU|ACC|PQ)-(.+)")
"""Name of the metric of one class in ``results.json``."""

Side = tuple[Run, Analysis]
"""A run, and the analysis of its predictions on a dataset."""


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """Return summary and training curves."""
    names = {name for run in runs for name in run.results if not _CLASS_METRIC.fullmatch(name)}
    rows = [
        [name, *(_number(run.results.get(name)) for run in runs)] for name in sorted(names, key=_metric_order)
    ]
    if len(runs) > 1:
        for row in rows:
            row.append(_difference(row[1], row[2]))
    headers = ["metric", *_labels(runs), *(["difference"] if len(runs) > 1 else [])]
    blocks: list[Block] = (
        [Table(headers, rows, "Metrics in percent, as the runs wrote them.", 2)] if rows else []
    )
    missing = [run.name for run in runs if not run.results]
    text = f"{' and '.join(missing)} has no results.json: the run was not evaluated." if missing else ""
    drawn: list[Block] = []
    for run, label in zip(runs, _labels(runs), strict=True):
        try:
            drawn.append(Figure(figures.curves(run.metrics_file), label))
        except (ValueError, FileNotFoundError):
            continue
    without = "" if drawn else "There is no metrics.json with losses: the run was evaluated, not trained."
    return [
        Section("Summary", blocks, text),
        Section("Training curves", drawn, without),
        *_panoptic_classes(runs),
    ]


def _panoptic_classes(runs: Sequence[Run]) -> list[Section]:
    """Return a section on PQ by class, if the runs recorded it (``TEST.PER_CLASS``)."""
    matches = {name: _CLASS_METRIC.fullmatch(name) for run in runs for name in run.results}
    names = [(name, match[2]) for name, match in matches.items() if match and match[1] == "PQ"]
    if not names:
        return []
    rows = [[title, *(_number(run.results.get(name)) for run in runs)] for name, title in names]
    caption = "PQ in percent, as the runs wrote it; a dash: neither in the ground truth nor predicted."
    return [Section("Classes, PQ", [Table(["class", *_labels(runs)], rows, caption)])]


def dataset_sections(
    sides: Sequence[Side], records: Mapping[Any, Any], metadata: Any, options: Options
) -> list[Section]:
    """Return the sections on one dataset.

    Args:
        sides: one or two runs with their analyses.
        records: image -> dict of the dataset.
        metadata: of the dataset.
        options: settings.
    """
    first = sides[0][1]
    sections = [_difference_section(sides, options.bootstrap)] if len(sides) > 1 else []
    sections += [
        _class_section(sides),
        _confusion_section(sides),
        _precision_section(sides),
        _error_section(sides),
        _breakdown_section(sides),
        _image_section(sides, records, metadata, options.images),
    ]
    group = f"{first.dataset}, {first.kind}"
    return [replace(section, group=group) for section in sections]


def settings_sections(runs: Sequence[Run]) -> list[Section]:
    """Return config and environment."""
    blocks: list[Block] = []
    for run, label in zip(runs, _labels(runs), strict=True):
        if run.config:
            blocks.append(Preformatted(f"config.yaml of {label}", run.config))
        if run.environment:
            blocks.append(Preformatted(f"environment.txt of {label}", run.environment))
    text = "" if blocks else "The folder has neither config.yaml nor environment.txt."
    if len(runs) > 1 and all(run.config for run in runs):
        before, after = (run.config.splitlines() for run in runs)
        name, other = _labels(runs)
        lines = list(difflib.unified_diff(before, after, name, other, lineterm="", n=0))
        text = "" if lines else "The configs are equal."
        if lines:
            blocks.insert(0, Preformatted("differences of config.yaml", "\n".join(lines)))
    return [Section("Config and environment", blocks, text)]


def _difference_section(sides: Sequence[Side], samples: int) -> Section:
    heading = "Differences"
    (_, first), (_, second) = sides
    if first.kind != second.kind:
        return Section(heading, text=f"One run predicts {first.kind}, the other {second.kind}.")
    if first.image_scores.keys() != second.image_scores.keys():
        return Section(heading, text="The runs have predictions of different images.")
    intervals = first.compare(second, samples)
    rows: list[list[Cell]] = []
    for name, row in intervals.items():
        clear = "" if not (math.isfinite(row.low) and row.low * row.high > 0) else "yes"
        rows.append([name, row.first, row.second, row.second - row.first, row.low, row.high, clear])
    a, b = _labels([run for run, _ in sides])
    headers = ["metric", a, b, "difference", "from", "to", "interval without 0"]
    caption = (
        f"Second run minus first run in points, with the 95 % interval of {samples} bootstrap samples of the "
        "images, the same images for both runs. The interval covers the choice of images, not that of the "
        "training seed."
    )
    keys = first.image_scores.keys()
    gains = [second.image_scores[key] - first.image_scores[key] for key in keys]
    text = (
        f"Of {len(gains)} images, {sum(g > 0 for g in gains)} are better in {b}, "
        f"{sum(g < 0 for g in gains)} in {a}; the mean difference is {np.mean(gains):+.1f} points."
    )
    return Section(heading, [Table(headers, rows, caption, 2)], text)


def _class_section(sides: Sequence[Side]) -> Section:
    first = sides[0][1]
    unit = "pixels" if first.kind == "pixels" else "objects"
    if len(sides) == 1:
        others = list(first.classes[0].others) if first.classes else []
        headers = ["class", unit, first.score_name, *others]
        rows: list[list[Cell]] = [
            [row.name, row.count, row.score, *(row.others[name] for name in others)] for row in first.classes
        ]
    else:
        labels = _labels([run for run, _ in sides])
        headers = ["class", unit, *(f"{first.score_name}, {label}" for label in labels), "difference"]
        known = {row.name: row.score for row in sides[1][1].classes}
        rows = [
            [row.name, row.count, row.score, known.get(row.name), _difference(row.score, known.get(row.name))]
            for row in first.classes
        ]
    caption = f"{first.score_name} in percent. A click on a heading sorts; a dash: not in the ground truth."
    return Section("Classes", [Table(headers, rows, caption)])


def _confusion_section(sides: Sequence[Side]) -> Section:
    blocks: list[Block] = []
    for label, analysis in _analyses(sides):
        names, wrong = analysis.confusion_names, analysis.confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")
        shown = np.sort(order[:MAX_MATRIX]).tolist()
        which = f"The {len(shown)} rows of most errors." if len(shown) < len(wrong) else "All classes."
        caption = f"{label}: {analysis.confusion_caption} Percent of each row. {which}"
        blocks.append(Figure(figures.confusion_matrix(analysis.confusion, names, shown), caption))
        classes = len(analysis.classes)
        pairs = wrong[:classes, :classes]
        rows: list[list[Cell]] = [
            [names[i], names[j], int(pairs[i, j])]
            for i, j in zip(
                *np.unravel_index(np.argsort(-pairs, axis=None, kind="stable")[:20], pairs.shape), strict=True
            )
            if pairs[i, j]
        ]
        blocks.append(
            Table(["true", "predicted", "count"], rows, f"{label}: classes that are taken for others")
        )
    return Section("Confusion", blocks)


def _precision_section(sides: Sequence[Side]) -> Section:
    heading, runs = "Precision and recall", {label: a.precision_recall for label, a in _analyses(sides)}
    if not all(runs.values()):
        text = "Label maps have no scores to rank, so that precision over recall is not defined."
        return Section(heading, text=text)
    caption = "Mean over the classes with ground truth, at 101 recalls."
    return Section(heading, [Figure(figures.precision_recall(runs), caption)])


def _error_section(sides: Sequence[Side]) -> Section:
    heading = "Kinds of errors"
    if not sides[0][1].errors:
        return Section(
            heading, text="TIDE's kinds of errors are defined for boxes and masks of objects only."
        )
    runs = {label: analysis.errors for label, analysis in _analyses(sides)}
    caption = "TIDE (Bolya et al., ECCV 2020): gain of AP50 if one kind of error were mended."
    blocks: list[Block] = [Figure(figures.error_bars(runs), caption)]
    for label, rows in runs.items():
        blocks.append(Table(["error", "gain of AP50", "number"], rows, label))
    return Section(heading, blocks)


def _breakdown_section(sides: Sequence[Side]) -> Section:
    blocks: list[Block] = []
    for name, (headers, rows) in sides[0][1].breakdowns.items():
        if len(sides) > 1:
            labels, other = _labels([run for run, _ in sides]), sides[1][1].breakdowns[name][1]
            headers = [*headers[:-1], *(f"{headers[-1]}, {label}" for label in labels)]
            rows = [[*row, second[-1]] for row, second in zip(rows, other, strict=True)]
        blocks.append(Table(headers, rows, name))
    text = ""
    if sides[0][1].kind == "pixels":
        text = "Label maps do not tell objects apart, so that there is no breakdown by size."
    return Section("Size and frequency", blocks, text)


def _image_section(sides: Sequence[Side], records: Mapping[Any, Any], metadata: Any, count: int) -> Section:
    first, name = sides[0][1], "AP" if sides[0][1].kind != "pixels" else "mean IoU"
    scores = dict(first.image_scores)
    if len(sides) > 1:
        other = sides[1][1].image_scores
        scores = {key: other[key] - value for key, value in scores.items() if key in other}
    order = sorted((key for key in scores if key in records), key=lambda key: (scores[key], str(key)))
    if not order:
        return Section("Images", text="No image has both a prediction and ground truth.")
    labels = [label for label, _ in _analyses(sides)]
    ends = (("Worst", order[:count]), ("Best", order[::-1][:count]))
    if len(sides) > 1:
        ends = ((f"Better in {labels[0]}", ends[0][1]), (f"Better in {labels[1]}", ends[1][1]))
    blocks: list[Block] = []
    for caption, keys in ends:
        rows = []
        for key in keys:
            text = ", ".join(f"{a.image_scores.get(key, math.nan):.1f}" for _, a in _analyses(sides))
            file = Path(records[key]["file_name"]).name
            rows.append((f"{file}: {name} {text}", _pictures(sides, records[key], key, metadata)))
        blocks.append(Gallery(["ground truth", *labels], rows, caption))
    return Section("Images", blocks)


def _pictures(sides: Sequence[Side], record: Any, key: Any, metadata: Any) -> list[str]:
    """Draw the ground truth and the predictions of an image."""
    image = read_image(record["file_name"])
    kind = "semantic" if sides[0][1].kind == "pixels" else "instances"
    cell = 340
    drawn = [draw_truth(image, record, metadata, cell=cell, kind=kind)]
    drawn += [draw_output(image, a.draw(key), metadata, score_threshold=0, cell=cell) for _, a in sides]
    return [figures.picture(pixels) for pixels in drawn]


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run, different from each other."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _analyses(sides: Sequence[Side]) -> list[tuple[str, Analysis]]:
    labels = _labels([run for run, _ in sides])
    return [(label, analysis) for label, (_, analysis) in zip(labels, sides, strict=True)]


def _number(value: Any) -> Cell:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None if value is None else str(value)
    return float(value)


def _difference(first: Cell, second: Cell) -> Cell:
    if isinstance(first, float) and isinstance(second, float):
        return second - first
    return None


def _metric_order(name: str) -> tuple[str, int, str]:
    """Sort key: by task, the headline metric first."""
    task, _, metric = name.rpartition("/")
    first = ("AP", "mIoU", "PQ", "AP50", "AP75")
    return task, first.index(metric) if metric in first else len(first), metric
