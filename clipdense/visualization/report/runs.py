"""Files that a run left in its output folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdense.files import read_text
from clipdense.visualization.curves import Series, read_metrics

__all__ = ["Run", "read_run"]


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        folder: output folder.
        name: last part of the folder's path.
        results: metric -> value, of ``results.json`` or, after ``--eval-only``, ``inference/results.json``.
        series: scalars of ``metrics.json``: name -> iterations and values.
        config: text of ``config.yaml``; "" without one.
        environment: text of ``environment.txt``; "" without one.
    """

    folder: Path
    name: str
    results: dict[str, Any]
    series: dict[str, Series]
    config: str
    environment: str

    @property
    def datasets(self) -> list[str]:
        """Names of the datasets with predictions, in alphabetical order."""
        return sorted(path.name for path in (self.folder / "inference").glob("*") if path.is_dir())

    def predictions(self, dataset: str) -> Path:
        """Return the folder with the predictions of a dataset."""
        return self.folder / "inference" / dataset

    @property
    def metrics_file(self) -> Path:
        """Path of ``metrics.json``."""
        return self.folder / "metrics.json"


def read_run(folder: Path) -> Run:
    """Read the files of a run; those that are missing are empty.

    Raises:
        FileNotFoundError: If the folder does not exist, or holds no file of a run.
        ValueError: If ``results.json`` is not JSON.
    """
    files = ("config.yaml", "metrics.json", "results.json", "inference")
    if not any((folder / name).exists() for name in files):
        raise FileNotFoundError(
            f"{folder} is not the output folder of a run: it has none of {', '.join(files)}; name the folder "
            "that OUTPUT_DIR was"
        )
    return Run(
        folder,
        folder.resolve().name,
        _results(folder),
        read_metrics(folder / "metrics.json") if (folder / "metrics.json").is_file() else {},
        *(
            read_text(folder / n) if (folder / n).is_file() else ""
            for n in ("config.yaml", "environment.txt")
        ),
    )


def _results(folder: Path) -> dict[str, Any]:
    for path in (folder / "results.json", folder / "inference" / "results.json"):
        if path.is_file():
            try:
                content = json.loads(read_text(path))
            except ValueError as error:
                raise ValueError(f"{path}: not JSON ({error})") from error
            return content if isinstance(content, dict) else {}
    return {}
