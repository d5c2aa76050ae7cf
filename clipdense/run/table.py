"""Tables of training runs: a row is a config, a cell is a run with one seed.

A table file (YAML)::

    title: Trunks for Mask R-CNN on shapes
    output: output/tables/trunks          # folder of the runs; default: output/tables/<file name>
    overrides: {SOLVER.MAX_ITER: 1000}    # budget: config overrides for every row
    seeds: [1, 2, 3]
    digits: 1                             # decimals in the table; default: 1
    baseline: CLIP ResNet                 # row that others are compared with, seed by seed; default: none
    metrics:                              # column -> metric in results.json or metrics.json
      box AP50: bbox/AP50
      mask AP50: segm/AP50
    rows:
      - name: CLIP ResNet
        config: configs/shapes/mask_rcnn_clip_rn.yaml
      - name: CLIP ResNet, frozen
        config: configs/shapes/mask_rcnn_clip_rn.yaml
        overrides: {MODEL.BACKBONE.FREEZE_AT: 5}
        arguments: [--num-gpus, 1]        # arguments for the tool

``{seed}`` in an override or argument is replaced by the cell's seed, e.g. to use the checkpoint of the
same seed from another table.

A metric is a path of keys in ``results.json``: ``task/metric``, or ``dataset/task/metric`` if there are
several datasets. With ``arguments: [--eval-only]`` the file is ``inference/results.json``. If the path is
not there, the last value of that name in ``metrics.json`` is used. Another JSON file of the run is named
before a colon: ``regions.json:crops/top1``.

With a baseline, a second group of columns has the differences to that row, paired by seed: what is common to
the runs of one seed (crops, order of the images) cancels out.

Every cell runs in its own process, with the folder ``<output>/<row>/seed_<seed>`` and its log. The
results of a finished cell are written atomically to ``cell.json``, so that the table continues after any
interruption: finished cells stay, and a killed run resumes from its last checkpoint. A cell runs again if
its overrides, arguments or config path have changed. A change inside a config file is not detected:
delete the cell's folder.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipdense.engine.lock import FolderLock, FolderLockedError
from clipdense.engine.options import ConfigError
from clipdense.engine.processes import end_with_parent
from clipdense.files import write_text
from clipdense.run.config_file import load_yaml

__all__ = ["Cell", "Row", "Table", "TableError", "collect", "load_table", "markdown", "run_cells"]


class TableError(ValueError):
    """Error in a table file; the message names the file and the key."""


@dataclass(frozen=True, eq=False)
class Row:
    """Row of a table: a config with overrides."""

    name: str
    config: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    arguments: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Table:
    """Content of a table file; see the module."""

    path: Path
    title: str
    output: Path
    rows: Sequence[Row]
    seeds: Sequence[int]
    metrics: Mapping[str, str]
    overrides: Mapping[str, Any]
    digits: int
    baseline: str

    def cells(self) -> list[Cell]:
        """Return all cells: every row with the first seed, then with the second, ..."""
        return [Cell(self, row, seed) for seed in self.seeds for row in self.rows]


@dataclass(frozen=True, eq=False)
class Cell:
    """Cell of a table: a row with a seed, which is one run."""

    table: Table
    row: Row
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.table.output / _slug(self.row.name) / f"seed_{self.seed}"

    def command(self, tool: str) -> list[str]:
        """Return the command line of the run, without the interpreter."""
        values = {**self.table.overrides, **self.row.overrides}
        lazy = self.row.config.endswith(".py")
        own = ("train.seed", "train.output_dir") if lazy else ("SEED", "OUTPUT_DIR")
        values.update(zip(own, (self.seed, str(self.folder)), strict=True))
        words = [f"{key}={value}" if lazy else (key, str(value)) for key, value in values.items()]
        options = [word for item in words for word in ([item] if isinstance(item, str) else item)]
        command = [tool, "--config-file", self.row.config, *self.row.arguments, *options]
        return [word.replace("{seed}", str(self.seed)) for word in command]

    def read(self) -> dict[str, Any] | None:
        """Return the content of cell.json; None without one, or if it is damaged or of another command."""
        content = _json(self.folder / "cell.json")
        if not isinstance(content, dict) or content.get("status") not in ("done", "failed"):
            return None
        command = content.get("command")
        same = isinstance(command, list) and command[1:] == self.command("")[1:]
        return {"results": None, "log": None, **content} if same else None


# ---- table files


def load_table(path: str | os.PathLike[str]) -> Table:
    """Read a table file.

    Raises:
        TableError: If the file is missing or malformed.
    """
    path = Path(path)
    try:
        content = load_yaml(path)
    except ConfigError as error:
        raise TableError(str(error)) from error
    top = _checked(content, f"{path}", {"rows": list, "seeds": list, "metrics": dict},
                   {"title": str, "output": str, "overrides": dict,
                    "digits": int, "baseline": str})  # fmt: skip
    rows = []
    for i, entry in enumerate(top["rows"], 1):
        where = f"{path}, row {i}"
        fields = _checked(entry, where, {"name": str, "config": str}, {"overrides": dict, "arguments": list})
        fields["arguments"] = [str(word) for word in fields.get("arguments", ())]
        rows.append(Row(**fields))
    if not (rows and top["seeds"] and top["metrics"]):
        raise TableError(f"{path}: a table needs at least one row, one seed and one metric")
    if not all(type(seed) is int and seed >= 0 for seed in top["seeds"]):
        raise TableError(f"{path}: seeds are whole numbers from 0, got {top['seeds']}")
    for row in rows:
        if _slug(row.name).strip(".") == "":
            raise TableError(f"{path}: row {row.name!r} names no folder; use letters or digits")
    for what, values in (("row names", [_slug(row.name) for row in rows]), ("seeds", top["seeds"])):
        if len(set(values)) < len(values):
            raise TableError(f"{path}: two {what} are equal, or name the same folder: {values}")
    baseline = top.get("baseline", "")
    if baseline and baseline not in [row.name for row in rows]:
        raise TableError(f"{path}: baseline {baseline!r} is the name of no row")
    return Table(
        path,
        top.get("title", path.stem),
        Path(top.get("output", f"output/tables/{path.stem}")),
        rows,
        top["seeds"],
        {str(column): str(where) for column, where in top["metrics"].items()},
        top.get("overrides", {}),
        top.get("digits", 1),
        baseline,
    )


def _checked(content: Any, where: str, needed: dict[str, type], optional: dict[str, type]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TableError(f"{where}: expected keys and values, got {type(content).__name__}")
    known = {**needed, **optional}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise TableError(
                f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if not isinstance(value, known[key]):
            raise TableError(f"{where}: {key} must be a {known[key].__name__}, got {value!r}")
    if missing := [key for key in needed if key not in content]:
        raise TableError(f"{where}: {', '.join(missing)} is missing")
    return dict(content)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name).strip("_") or "row"


# ---- running


def run_cells(
    table: Table,
    tool: str,
    *,
    jobs: int = 1,
    retry: bool = False,
    finished: Callable[[], None] = lambda: None,
) -> list[Cell]:
    """Run the missing cells with a progress bar.

    Args:
        table: the table.
        tool: Python program that runs a cell; it takes ``--config-file``, ``--resume`` and config overrides.
        jobs: number of simultaneous runs.
        retry: whether to run failed cells again.
        finished: called after each cell.

    Returns:
        The failed cells, including those of earlier calls.

    Raises:
        TableError: If another process runs the table.
    """
    table.output.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(table.output, "output folder")
    try:
        lock.acquire()
        return _run_cells(table, tool, jobs, retry, finished)
    except FolderLockedError as error:
        raise TableError(f"{table.path}: {error}") from error
    finally:
        lock.release()


def _run_cells(table: Table, tool: str, jobs: int, retry: bool, finished: Callable[[], None]) -> list[Cell]:
    """See `run_cells`."""
    cells = table.cells()
    states = {cell: cell.read() for cell in cells}
    todo = [c for c in cells if states[c] is None or (retry and states[c]["status"] == "failed")]  # type: ignore[index]
    stop = threading.Event()
    with (
        tqdm(total=len(cells), initial=len(cells) - len(todo), desc=table.title, unit="run") as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        futures = {pool.submit(_run, cell, tool, stop): cell for cell in todo}
        try:
            for future in as_completed(futures):
                state = future.result()
                if state is None:
                    continue
                bar.update()
                if state["status"] == "failed":
                    bar.write(f"failed: {futures[future].name}; see {state['log']}", file=sys.stderr)
                finished()
        except BaseException:
            stop.set()  # the runs stop, and resume at the next call
            raise
    return [cell for cell in cells if (cell.read() or {}).get("status") == "failed"]


def _run(cell: Cell, tool: str, stop: threading.Event) -> dict[str, Any] | None:
    """Run one cell; return the content of its cell.json, or None if it was interrupted."""
    if stop.is_set():
        return None
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / "cell.json").unlink(missing_ok=True)  # it failed, or has another command line
    words = cell.command(tool)
    unfinished = cell.folder / "command.json"
    # only the command line that made a checkpoint may resume it
    resume = (cell.folder / "last_checkpoint").is_file() and _json(unfinished) == words[1:]
    write_text(unfinished, json.dumps(words[1:]))
    log, start = cell.folder / "run.log", time.time()
    command = [sys.executable, words[0], *(["--resume"] if resume else []), *words[1:]]
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent(),  # a killed table leaves no run behind that the next call doubles
        )
        while process.poll() is None:
            if stop.wait(0.2):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                return None
    state = {
        "status": "failed" if process.returncode else "done",
        "returncode": process.returncode,
        "row": asdict(cell.row),
        "seed": cell.seed,
        "seconds": round(time.time() - start, 1),
        "command": words,
        "log": str(log),
        "results": _json(cell.folder / "results.json") or _json(cell.folder / "inference" / "results.json"),
    }
    write_text(cell.folder / "cell.json", json.dumps(state, indent=1))
    return state


def _json(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


# ---- collecting


def collect(table: Table) -> dict[Row, dict[str, dict[int, float]]]:
    """Collect the metrics of all finished cells.

    Returns:
        row -> column -> seed -> value.

    Raises:
        TableError: If a finished run lacks a metric.
    """
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in table.rows:
        columns: dict[str, dict[int, float]] = {column: {} for column in table.metrics}
        values[row.name] = columns
        for cell in (Cell(table, row, seed) for seed in table.seeds):
            state = cell.read()
            if state and state["status"] == "done":
                for column, where in table.metrics.items():
                    columns[column][cell.seed] = _look_up(cell, state, where)
    return {row: values[row.name] for row in table.rows}


def _look_up(cell: Cell, state: dict[str, Any], where: str) -> float:
    file, colon, path = where.rpartition(":")
    found = list(_at(_json(cell.folder / file) if colon else state["results"], path))
    if not found and not colon:
        found = _last(cell.folder / "metrics.json", path)
    if len(found) != 1:
        what = "is missing" if not found else f"occurs {len(found)} times: put the dataset's name before it"
        raise TableError(f"{cell.name}: metric {where!r} {what} (results in {cell.folder})")
    return found[0]


def _at(content: Any, path: str) -> Iterator[float]:
    """Yield the numbers at a path of keys. Keys may contain slashes; the dataset's key may be left out."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key == path and value is None:  # an undefined metric; JSON has no NaN
            yield math.nan
        elif key == path and isinstance(value, (int, float)):
            yield float(value)
        elif path.startswith(f"{key}/"):
            yield from _at(value, path[len(key) + 1 :])
        elif isinstance(value, dict) and all(isinstance(inner, dict) for inner in value.values()):
            yield from _at(value, path)


def _last(path: Path, name: str) -> list[float]:
    """Return the last value of a name in a file with one JSON object per line; an empty list without one."""
    if not path.is_file():
        return []
    for line in reversed(path.read_text(errors="replace").splitlines()):
        try:
            value = json.loads(line).get(name)
        except (ValueError, AttributeError, RecursionError):
            continue
        if isinstance(value, (int, float)):
            return [float(value)]
    return []


def markdown(table: Table, command: str) -> str:
    """Format the table in Markdown: mean ± sample standard deviation over the seeds, budget and command."""
    rows, found = [], collect(table)
    base = next((columns for row, columns in found.items() if row.name == table.baseline), None)
    for row, columns in found.items():
        states = [state for seed in table.seeds if (state := Cell(table, row, seed).read())]
        failed = sum(state["status"] == "failed" for state in states)
        n = len(states) - failed
        seeds = f"{n}" if n == len(table.seeds) else f"{n} of {len(table.seeds)}"
        seeds += f", {failed} failed" if failed else ""
        values = [_mean(list(column.values()), table.digits) for column in columns.values()]
        if base is not None:
            values += _differences(columns, base, table.digits) if columns is not base else [""] * len(base)
        rows.append([row.name, *values, seeds])
    paired = [f"Δ {column}" for column in table.metrics] if base is not None else []
    header = ["", *table.metrics, *paired, "seeds"]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in (max(w, 2) for w in widths[1:]))]
    cells = [header, rule, *rows]
    aligned = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        for line in cells
    ]
    lines = [f"| {' | '.join(line)} |" for line in aligned]
    budget = ", ".join(f"{key} {value}" for key, value in table.overrides.items())
    notes = ["Mean ± sample standard deviation over seeds."] if len(table.seeds) > 1 else []
    notes += [f"Δ: difference to {table.baseline!r} with the same seed."] if paired else []
    notes += [f"For all rows: {budget}."] if budget else []
    return "\n".join([f"**{table.title}**", "", *lines, "", *notes, f"Made by `{command}`.", ""])


def _differences(
    columns: Mapping[str, Mapping[int, float]], base: Mapping[str, Mapping[int, float]], digits: int
) -> list[str]:
    pairs = ((values, base[column]) for column, values in columns.items())
    return [_mean([a[seed] - b[seed] for seed in a if seed in b], digits, "+") for a, b in pairs]


def _mean(values: list[float], digits: int, sign: str = "") -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "nan" if values else "–"
    mean = f"{statistics.fmean(known):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean
