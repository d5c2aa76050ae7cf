"""Reproduction of published results: fetch or ask for the weights, convert, evaluate, compare."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

import clipdense
from clipdense.engine.options import ConfigError
from clipdense.engine.processes import end_with_parent
from clipdense.files import json_text, write_text
from clipdense.paths import datasets_root, shipped_root
from clipdense.run.conversion import convert_weights
from clipdense.run.downloads import check_sum, download
from clipdense.run.headline_rows import EVIDENCE, Data, Row, WeightFile, read_rows, select_rows
from clipdense.systems.training_free.protocols import protocol_overrides

__all__ = ["Reproduction", "compare", "default_table", "requirements"]

logger = logging.getLogger(__name__)

_ROOT = Path(clipdense.__file__).resolve().parents[1]


def default_table() -> Path:
    """Return the table that ships with clipdense."""
    return shipped_root() / "projects" / "headline_rows.yaml"


@dataclass(frozen=True)
class Reproduction:
    """Rows to reproduce, and where.

    Attributes:
        rows: the rows.
        folder: output folder. ``weights/`` holds published and converted files, ``<row>/`` the results.
        root: folder from which the rows name their configs; others are those of the package.
        downloads: whether files whose address is known may be downloaded.
        allow_pickle: whether published files may be opened as pickles, which can run code.
        overrides: config overrides for every row, KEY VALUE in turn.
    """

    rows: Sequence[Row]
    folder: Path
    root: Path = field(default_factory=shipped_root)
    downloads: bool = True
    allow_pickle: bool = False
    overrides: Sequence[str] = ()

    @classmethod
    def of_table(cls, table: Path, names: Sequence[str], folder: Path, **options: Any) -> Reproduction:
        """Select rows of a table by name or system; configs of other tables lie beside them."""
        root = shipped_root()
        if not table.resolve().is_relative_to(root):
            root = table.resolve().parent
        return cls(select_rows(read_rows(table), names), folder, root, **options)

    def run(self) -> dict[str, str]:
        """Reproduce the rows one after the other. A row that has its results is not run again.

        Rows that are listed only fail with their reason.

        Returns:
            Name of a row -> why it failed.
        """
        failed: dict[str, str] = {}
        for row in self.rows:
            if row.not_run:
                failed[row.name] = row.not_run
                continue
            if self.result(row) is not None:
                logger.info("%s has its results in %s", row.name, self._result_file(row))
                continue
            try:
                self._run_row(row)
            except (OSError, ValueError, RuntimeError) as error:
                failed[row.name] = str(error)
                logger.error("%s: %s", row.name, error)
        return failed

    def result(self, row: Row) -> dict[str, float] | None:
        """Return the metrics of a finished row; None if it is not finished, or was run otherwise."""
        if row.not_run:
            return None
        with suppress(OSError, ValueError):
            content = json.loads(self._result_file(row).read_text("utf-8"))
            if content["arguments"] == self._arguments(row):
                return {str(k): float(v) for k, v in content["metrics"].items() if v is not None}
        return None

    def _run_row(self, row: Row) -> None:
        assert row.data is not None
        if missing := _missing_data(row.data):
            raise FileNotFoundError(
                f"{missing} does not exist; it needs {row.data.needs} (datasets/README.md; "
                "DETECTRON2_DATASETS names the folder of datasets)"
            )
        if row.weights is not None:
            self._prepare_weights(row.weights)
        folder, arguments = self.folder / row.name, self._arguments(row)
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / "output"
        command = [sys.executable, "-m", "clipdense", "evaluate", *arguments, "OUTPUT_DIR", str(output)]
        logger.info("%s: evaluating; the log is %s", row.name, output / "log.txt")
        done = subprocess.run(
            command, capture_output=True, text=True, env=_environment(), preexec_fn=end_with_parent()
        )
        write_text(folder / "log.txt", done.stdout + done.stderr)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            reason = errors[-1].removeprefix("error: ") if errors else f"status {done.returncode}"
            raise RuntimeError(f"the evaluation failed ({reason}); see {folder / 'log.txt'}")
        metrics = json.loads((output / "inference" / "results.json").read_text("utf-8"))
        if absent := [value.metric for value in row.values if value.metric not in metrics]:
            raise ConfigError(
                f"the evaluation reports no {absent[0]}; it reports "
                + ", ".join([name for name in sorted(metrics) if "-" not in name][:12])
            )
        write_text(
            self._result_file(row), json_text({"arguments": arguments, "metrics": metrics}, indent=1) + "\n"
        )

    def _prepare_weights(self, weights: WeightFile) -> None:
        """Fetch and convert a published file, unless that has been done."""
        converted = self._converted(weights)
        if converted.is_file():
            return
        published = self.folder / "weights" / weights.local_name
        if not published.is_file():
            if weights.url is None or not self.downloads:
                name = weights.file or "the weights"
                raise FileNotFoundError(
                    f"{name} of {weights.page} is needed ({weights.licence}); download it to {published}, "
                    "and run the same command again"
                )
            logger.info("Downloading %s (licence: %s)", weights.url, weights.licence)
            download(weights.url, published, weights.sha256)
        check_sum(published, weights.sha256)
        done = convert_weights(
            published, converted, options=weights.options, allow_pickle=self.allow_pickle and weights.pickle
        )
        logger.info("Converted %s (layout %s) to %s", published, done.layout, converted)

    def _arguments(self, row: Row) -> list[str]:
        """Return the words after ``clipdense evaluate`` that determine the result."""
        config = self.root / row.config
        words: list[Any] = [config if config.is_file() else row.config]
        if row.protocol:
            words += protocol_overrides(*row.protocol)
        for key, value in (row.options or {}).items():
            words += [key, value]
        if row.weights is not None:
            words += [row.weights.into, self._converted(row.weights)]
        return [str(word) for word in (*words, *self.overrides)]

    def _converted(self, weights: WeightFile) -> Path:
        return (self.folder / "weights" / f"{weights.name}.safetensors").absolute()

    def _result_file(self, row: Row) -> Path:
        return self.folder / row.name / "result.json"


def compare(reproduction: Reproduction) -> tuple[str, int]:
    """Compare the results of the finished rows with the published values.

    Returns:
        A Markdown table (paper, ours, difference), and the number of values beyond their tolerance.
    """
    lines, beyond = [], 0
    for row in reproduction.rows:
        if (metrics := reproduction.result(row)) is None:
            continue
        for value in row.values:
            ours = metrics.get(value.metric, math.nan)
            difference = ours - value.paper
            within = abs(difference) <= value.tolerance
            beyond += not within
            lines.append(
                [
                    row.name,
                    value.metric,
                    f"{value.paper:g} ({value.evidence})",
                    f"{ours:.2f}",
                    f"{difference:+.2f}",
                    "yes" if within else f"no (more than {value.tolerance:g})",
                ]
            )
    if not lines:
        return "No row is finished.", 0
    header = ["row", "metric", "paper", "ours", "difference", "reproduced"]
    table = tabulate(lines, header, tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{_legend(row for row in reproduction.rows)}", beyond


def requirements(reproduction: Reproduction) -> str:
    """Describe what the rows need, how large it is, and whether it is there. Nothing is downloaded or run."""
    rows = [row for row in reproduction.rows if not row.not_run]
    listed = [row for row in reproduction.rows if row.not_run]
    lines = [
        [
            row.name,
            row.system,
            row.weights.name if row.weights else f"{row.clip} (open_clip)",
            row.data.name if row.data else "",
            _published(row),
            "yes" if reproduction.result(row) is not None else "no",
        ]
        for row in rows
    ]
    files = {row.weights.name: row.weights for row in rows if row.weights is not None}
    data = {row.data.name: row.data for row in rows if row.data is not None}
    sets = [
        [d.name, d.needs, _size(d.gigabytes, "GB"), "no" if _missing_data(d) else "yes"]
        for d in data.values()
    ]
    known = [file.megabytes for file in files.values() if file.megabytes]
    weights = [_weight_line(reproduction, file) for file in files.values()]
    columns = ["name", "file", "published at", "size", "licence", "there"]
    others = [[row.name, row.system, _published(row), row.not_run] for row in listed]
    parts = [
        _table("Rows", ["row", "system", "weights", "data", "published", "done"], lines),
        _table(f"Weights, in {reproduction.folder / 'weights'}", columns, weights),
        _table(f"Data, in {datasets_root()}", ["name", "needs", "download", "there"], sets),
        _table("Published, but not run by this command", ["row", "system", "published", "why"], others),
        f"{len(rows)} rows, {len(files)} weight files (about {sum(known) / 1024:.1f} GB of parameters), "
        f"{len(data)} sets of data; {len(listed)} further rows are not run. {_legend(reproduction.rows)}",
        *(f"{row.name}: {row.note}" for row in rows if row.note),
    ]
    return "\n\n".join(part for part in parts if part)


def _published(row: Row) -> str:
    return ", ".join(f"{value.metric} {value.paper:g} ({value.evidence})" for value in row.values)


def _weight_line(reproduction: Reproduction, file: WeightFile) -> list[str]:
    """Describe a weight file, and say whether it is there, as published or converted."""
    published = reproduction.folder / "weights" / file.local_name
    there = published.is_file() or reproduction._converted(file).is_file()
    page = file.page if file.url is None else file.url
    size = _size(file.megabytes, "MB")
    return [file.name, file.local_name, page, size, file.licence, "yes" if there else "no"]


def _table(title: str, header: list[str], lines: list[list[str]]) -> str:
    return f"{title}:\n\n{tabulate(lines, header, tablefmt='github', disable_numparse=True)}" if lines else ""


def _legend(rows: Iterable[Row]) -> str:
    marks = sorted({value.evidence for row in rows for value in row.values})
    return "Published values: " + "; ".join(f"{mark}: {EVIDENCE[mark]}" for mark in marks) + "."


def _size(size: float | None, unit: str) -> str:
    return "not known" if size is None else f"about {size:g} {unit}"


def _missing_data(data: Data) -> Path | None:
    """Return the first path of the data that does not exist; None if all of them do."""
    return next((datasets_root() / p for p in data.paths if not (datasets_root() / p).exists()), None)


def _environment() -> dict[str, str]:
    """Return the environment of an evaluation, which imports this clipdense."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
