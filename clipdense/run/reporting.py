"""Report of one or two runs, from their output folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipdense.engine.options import ConfigError
from clipdense.engine.run_config import run_config
from clipdense.run.setup import load_config
from clipdense.visualization.report.build import Options, build_report
from clipdense.visualization.report.runs import read_run

__all__ = ["write_report"]


def write_report(folders: Sequence[Path], path: Path | None = None, options: Options | None = None) -> Path:
    """Write a report on one or two runs as a single HTML file.

    The datasets are registered from the ``config.yaml`` of the runs; where this fails, the report says so.

    Args:
        folders: output folders (``OUTPUT_DIR``) of the runs.
        path: file to write; None: ``report.html`` in the first folder.
        options: settings of the report.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If a folder is not that of a run.
        ValueError: If a file of a run is damaged, or the report would be larger than 20 MB.
    """
    runs = [read_run(folder) for folder in folders]
    reasons = []
    for run in runs:
        if not run.config:
            reasons.append(f"{run.name} has no config.yaml")
            continue
        try:  # the weights are not needed
            config = run_config(load_config(str(run.folder / "config.yaml"), ["MODEL.WEIGHTS", ""]))
            config.register_datasets()
        except (ConfigError, OSError, ValueError) as error:
            reasons.append(f"{run.name}: {error}")
    path = path or folders[0] / "report.html"
    build_report(runs, path, options, "; ".join(reasons))
    return path
