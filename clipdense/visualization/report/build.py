"""Building of a report from runs whose datasets are registered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipdense.files import write_text
from clipdense.visualization.report import instances, semantic
from clipdense.visualization.report.analysis import Analysis, Options
from clipdense.visualization.report.document import Section, render
from clipdense.visualization.report.runs import Run
from clipdense.visualization.report.sections import (
    Side,
    dataset_sections,
    run_sections,
    settings_sections,
)

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["MAX_BYTES", "Options", "build_report"]

MAX_BYTES = 20_000_000
"""Size of a report."""


def build_report(
    runs: Sequence[Run], path: Path, options: Options | None = None, unavailable: str = ""
) -> None:
    """Write a report on one or two runs.

    Args:
        runs: the runs. The datasets of their predictions are registered.
        path: HTML file to write.
        options: settings.
        unavailable: why the datasets could not be registered; "" if they are.

    Raises:
        ValueError: If there are not one or two runs, or the file would exceed `MAX_BYTES`.
    """
    if not 1 <= len(runs) <= 2:
        raise ValueError(f"a report is on one or two runs, not on {len(runs)}")
    options = options or Options()
    sections = run_sections(runs)
    datasets = [name for name in runs[0].datasets if all(name in run.datasets for run in runs)]
    if not datasets:
        text = "There is no folder inference/DATASET: the run wrote no predictions."
        if len(runs) > 1 and any(run.datasets for run in runs):
            text = "The runs have no dataset in common: " + " and ".join(
                f"{run.name} has {', '.join(run.datasets) or 'none'}" for run in runs
            )
        sections.append(Section("Predictions", text=text))
    for name in datasets:
        sections += _sections(runs, name, options, unavailable)
    title = " and ".join(run.name for run in runs)
    page = render(f"Report on {title}", [*sections, *settings_sections(runs)])
    if len(page.encode()) > MAX_BYTES:
        raise ValueError(
            f"{path}: the report would have {len(page.encode()) / 1e6:.0f} MB; show fewer images (--images 2)"
        )
    write_text(path, page)


def _sections(runs: Sequence[Run], dataset: str, options: Options, unavailable: str) -> list[Section]:
    """Return the sections on a dataset, or one that says why there are none."""
    heading = f"Predictions: {dataset}"
    if dataset not in DatasetCatalog.list():
        reason = unavailable or "no dataset of this name is registered"
        return [Section(heading, text=f"The ground truth is not available: {reason}.")]
    metadata = MetadataCatalog.get(dataset)
    found: list[Section] = []
    for kind in ("instances", "semantic"):
        finder: Any = instances if kind == "instances" else semantic
        present = [finder.predictions_file(run.predictions(dataset)) is not None for run in runs]
        if not all(present):
            continue
        try:
            records = DatasetCatalog.get(dataset)
            sides: list[Side] = [
                (run, _analyze(kind, run.predictions(dataset), dataset, metadata, records, options))
                for run in runs
            ]
            key = "image_id" if kind == "instances" else "file_name"
            found += dataset_sections(sides, {record[key]: record for record in records}, metadata, options)
        except (OSError, ValueError) as error:
            found.append(Section(f"{heading}, {kind}", text=f"This part is not available: {error}"))
    text = (
        "There are neither detections (coco_instances_results.json) nor label maps "
        "(sem_seg_predictions.json), which these sections are computed from."
    )
    return found or [Section(heading, text=text)]


def _analyze(
    kind: str, folder: Path, dataset: str, metadata: Any, records: Any, options: Options
) -> Analysis:
    if kind == "instances":
        return instances.analyze_instances(folder, dataset, metadata, options.min_score)
    return semantic.analyze_semantic(folder, dataset, metadata, records)
