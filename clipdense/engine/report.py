"""Report of a finished run: exported model, training curve and table of metrics."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn

from clipdense.checkpoint import save_checkpoint
from clipdense.engine.checkpoint import model_metadata
from clipdense.files import json_text, write_text

__all__ = ["class_table", "export", "print_results", "results_table", "write_report", "write_results"]

logger = logging.getLogger(__name__)

_MAX_CLASSES = 100
"""Largest number of classes that are printed."""


def write_report(model: nn.Module, output_dir: str, results: dict[str, float], ended_by: str) -> None:
    """Export the model, draw the training curve, and write and log the flattened metrics.

    Args:
        model: the trained model.
        output_dir: folder of the run.
        results: flattened metrics.
        ended_by: setting that ended the training, e.g. "SOLVER.MAX_SECONDS"; written to ``results.json``.
    """
    from clipdense.visualization.curves import draw_curve  # matplotlib takes a second to import

    logger.info("Writing the exported model and the training curve to %s", output_dir)
    export(model, Path(output_dir, "export.safetensors"))
    draw_curve(Path(output_dir, "metrics.json"), Path(output_dir, "curve.png"))
    write_results({**results, "ended_by": ended_by}, Path(output_dir))
    print_results(results)
    files = sorted(
        p.name for p in Path(output_dir).iterdir() if p.suffix in (".pth", ".png", ".json", ".safetensors")
    )
    logger.info("Written to %s: %s", output_dir, ", ".join(files))


def write_results(results: Mapping[str, float | str], folder: Path) -> None:
    """Write flattened metrics to ``results.json`` in a folder; undefined ones (NaN) become null."""
    write_text(folder / "results.json", json_text(results, indent=1))


def print_results(results: dict[str, float]) -> None:
    """Log flattened metrics as a table, and before it those of single classes (``TEST.PER_CLASS``)."""
    if table := class_table(results):
        logger.info("Classes:\n%s", table)
    if results:
        logger.info("Results:\n%s", results_table(results))


def export(model: nn.Module, path: Path) -> None:
    """Save the result of ``model.export_state()``, tensors and metadata, as safetensors.

    Models without that method are not exported.

    The metadata of a model that implements `CheckpointMetadata` is added.

    Raises:
        WriteError: If the file cannot be written.
    """
    export_state: Any = getattr(model, "export_state", None)
    if export_state is not None:
        state, metadata = export_state()
        save_checkpoint(path, state, {**metadata, **model_metadata(model)})


def class_table(results: Mapping[str, float]) -> str:
    """Format the metrics of single classes ("bbox/AP-person") as a table, one row per class; "" for none.

    Of more than 100 classes, the table has the best and the worst ones by the first metric.
    """
    rows: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for name, value in results.items():
        task, _, metric = name.rpartition("/")
        kind, dash, label = metric.partition("-")
        if dash:
            column = f"{task} {kind}".strip()
            columns[column] = None
            rows.setdefault(label, {})[column] = f"{value:.2f}"
    cells = [[label, *(found.get(column, "") for column in columns)] for label, found in rows.items()]
    if len(cells) > _MAX_CLASSES:
        # undefined ones are left out; a class name may occur in one task only
        known = [row for row in cells if row[1] not in ("", "nan")]
        known.sort(key=lambda row: -float(row[1]))
        shown, half = known, _MAX_CLASSES // 2
        if len(known) > _MAX_CLASSES:
            shown = [*known[:half], ["...", *[""] * len(columns)], *known[-half:]]
        cells = [*shown, [f"{len(rows)} classes; results.json has all", *[""] * len(columns)]]
    align = ["left", *["right"] * len(columns)]
    return tabulate(cells, ["class", *columns], disable_numparse=True, colalign=align) if cells else ""


def results_table(results: dict[str, float]) -> str:
    """Format flattened metrics ("bbox/AP50", "dataset/bbox/AP50") as a table.

    Metrics of single classes ("AP-person") are left out.

    Args:
        results: metric -> value.

    Returns:
        Table with one row per task and one column per metric.
    """
    rows: dict[str, dict[str, str]] = {}
    for name, value in results.items():
        task, _, metric = name.rpartition("/")
        if "-" not in metric:
            rows.setdefault(task or "all", {})[metric] = f"{value:.2f}"
    blocks: dict[tuple[str, ...], list[list[str]]] = {}
    for task, metrics in rows.items():
        blocks.setdefault(tuple(metrics), []).append([task, *metrics.values()])
    return "\n\n".join(
        tabulate(
            block,
            headers=["task", *metrics],
            disable_numparse=True,
            colalign=["left", *["right"] * len(metrics)],
        )
        for metrics, block in blocks.items()
    )
