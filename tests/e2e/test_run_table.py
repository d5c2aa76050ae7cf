"""`tools/run_table.py`: cells are run once, failures and interruptions lose nothing, the table says what
it holds."""

import importlib.util
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipdense.run.table import Cell, TableError, load_table

ROOT = Path(__file__).resolve().parents[2]

# Stands in for train_net.py: notes each call, then does as the config override MODE says.
FAKE = """
import json, pathlib, sys, time
words = sys.argv[1:]
values = dict(zip(words, words[1:]))
out, seed = pathlib.Path(values["OUTPUT_DIR"]), int(values["SEED"])
with open(out.parents[1] / "calls.txt", "a") as file:
    file.write(json.dumps(words) + "\\n")
mode = values.get("MODE", "")
if mode == "fail" and not (out.parents[1] / "mended").exists():
    sys.exit("the loss is NaN")
if mode == "slow" and "--resume" not in words:
    (out / "last_checkpoint").write_text("model_0000001.pth")
    (out.parents[1] / "started").touch()
    time.sleep(60)
ap = float(values["LR"]) + seed
lines = [json.dumps({"iteration": i, "total_loss": loss}) for i, loss in ((1, 9), (2, seed))]
(out / "metrics.json").write_text("\\n".join([*lines, '{"it']))
results = {"shapes_val": {"bbox": {"AP": ap, "AP50": 2 * ap, "AP-a/b": 1.0}}}
(out / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def tool(tmp_path: Path) -> str:
    (tmp_path / "fake.py").write_text(FAKE)
    return str(tmp_path / "fake.py")


def write_table(tmp_path: Path, **changes: Any) -> Path:
    content = {
        "title": "Learning rates",
        "output": str(tmp_path / "runs"),
        "overrides": {"SOLVER.STEPS": [3, 4]},
        "seeds": [1, 2, 4],
        "metrics": {"AP": "bbox/AP", "AP50": "shapes_val/bbox/AP50", "loss": "total_loss"},
        "rows": [
            {"name": "low", "config": "a.yaml", "overrides": {"LR": 10}},
            {"name": "high lr", "config": "b.yaml", "overrides": {"LR": 20}, "arguments": ["--num-gpus", 1]},
        ],
        **changes,
    }
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def load_tool() -> Any:
    """The tool as a module: a new interpreter for each case would take long."""
    spec = importlib.util.spec_from_file_location("run_table_tool", ROOT / "tools" / "run_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(table: Path, tool: str, *options: str) -> int:
    result: int = load_tool().main([str(table), "--tool", tool, *options])
    return result


def table_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table: header, rule, rows."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]


def calls(tmp_path: Path) -> list[list[str]]:
    path = tmp_path / "runs" / "calls.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_differences_to_the_baseline_are_paired_by_seed(
    tmp_path: Path, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"name": "base", "config": "a.yaml", "overrides": {"LR": 10}},
        {"name": "other", "config": "a.yaml", "overrides": {"LR": 12.5}},
    ]
    table = write_table(tmp_path, baseline="base", rows=rows, metrics={"AP": "bbox/AP"}, digits=2)
    assert run(table, tool) == 0
    header, _, base, other = table_of(capsys.readouterr().out)[:4]
    assert header == ["", "AP", "Δ AP", "seeds"]
    assert base == ["base", "12.33 ± 1.53", "", "3"]
    assert other == ["other", "14.83 ± 1.53", "+2.50 ± 0.00", "3"]  # the spread of the seeds cancels out
    # A seed that one of the two rows lacks is left out of the differences.
    (tmp_path / "runs" / "base" / "seed_2" / "cell.json").unlink()
    assert run(table, tool, "--collect") == 0
    assert table_of(capsys.readouterr().out)[3][2] == "+2.50 ± 0.00"
    with pytest.raises(TableError, match="baseline 'none' is the name of no row"):
        load_table(write_table(tmp_path, baseline="none"))


def test_every_cell_runs_once_and_the_table_is_right(tmp_path: Path, tool: str, capsys: Any) -> None:
    path = write_table(tmp_path)
    assert run(path, tool, "--jobs", "2", "--markdown", str(tmp_path / "out" / "t.md")) == 0
    assert len(calls(tmp_path)) == 6
    first = next(
        words for words in calls(tmp_path) if "b.yaml" in words and words[words.index("SEED") + 1] == "1"
    )
    assert first == [
        *("--config-file", "b.yaml", "--num-gpus", "1", "SOLVER.STEPS", "[3, 4]", "LR", "20"),
        *("SEED", "1", "OUTPUT_DIR", str(tmp_path / "runs" / "high_lr" / "seed_1")),
    ]
    text = (tmp_path / "out" / "t.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    spread = statistics.stdev([1, 2, 4])
    lines = table_of(text)
    assert lines[0] == ["", "AP", "AP50", "loss", "seeds"]
    assert lines[2] == ["low", f"12.3 ± {spread:.1f}", f"24.7 ± {2 * spread:.1f}", f"2.3 ± {spread:.1f}", "3"]
    assert lines[3][:2] == ["high lr", f"22.3 ± {spread:.1f}"]
    assert f"Made by `python tools/run_table.py {path}`" in text and "SOLVER.STEPS [3, 4]" in text

    # a second call runs nothing; a new seed, and a row whose overrides changed, run alone
    assert run(path, tool) == 0 and len(calls(tmp_path)) == 6
    rows = [{"name": "low", "config": "a.yaml", "overrides": {"LR": 11}}]
    assert run(write_table(tmp_path, rows=rows, seeds=[1, 5]), tool) == 0
    assert len(calls(tmp_path)) == 8
    # a metric that is added later needs no run
    metrics = {"first": "bbox/AP", "odd": "bbox/AP-a/b", "file": "results.json:shapes_val/bbox/AP50"}
    assert run(write_table(tmp_path, metrics=metrics, rows=rows, seeds=[1]), tool) == 0
    assert len(calls(tmp_path)) == 8
    capsys.readouterr()
    run(path, tool)
    assert table_of(capsys.readouterr().out)[2] == ["low", "12.0", "1.0", "24.0", "1"]


def test_failed_cells_are_noted_and_run_again_on_request(tmp_path: Path, tool: str, capsys: Any) -> None:
    rows = [
        {"name": "good", "config": "a.yaml", "overrides": {"LR": 10}},
        {"name": "bad", "config": "a.yaml", "overrides": {"LR": 20, "MODE": "fail"}},
    ]
    path = write_table(tmp_path, rows=rows, seeds=[1])
    assert run(path, tool) == 1
    printed = capsys.readouterr()
    log = tmp_path / "runs" / "bad" / "seed_1" / "run.log"
    assert str(log) in printed.err and "the loss is NaN" in log.read_text()
    assert table_of(printed.out)[3] == ["bad", "–", "–", "–", "0 of 1, 1 failed"]
    assert run(path, tool) == 1 and len(calls(tmp_path)) == 2  # not by itself
    (tmp_path / "runs" / "mended").touch()
    capsys.readouterr()
    assert run(path, tool, "--retry") == 0 and len(calls(tmp_path)) == 3
    assert table_of(capsys.readouterr().out)[3][:2] == ["bad", "21.0"]
    assert log.read_text().count("$ ") == 2  # the log of the failure is kept


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C works, also where the shell that started the tests in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_killed_table_goes_on(tmp_path: Path, tool: str) -> None:
    rows = [
        {"name": "done", "config": "a.yaml", "overrides": {"LR": 10}},
        {"name": "slow", "config": "a.yaml", "overrides": {"LR": 20, "MODE": "slow"}},
    ]
    path = write_table(tmp_path, rows=rows, seeds=[1])
    started = tmp_path / "runs" / "started"

    def interrupt() -> None:
        for _ in range(600):
            if started.exists():
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        run(path, tool)
    killer.join()
    table = load_table(path)
    assert [cell.read() is not None for cell in table.cells()] == [True, False]
    assert run(path, tool) == 0
    assert [words[0] for words in calls(tmp_path)] == ["--config-file", "--config-file", "--resume"]


def test_what_is_there_can_be_shown_without_running(tmp_path: Path, tool: str, capsys: Any) -> None:
    path = write_table(tmp_path)
    assert run(path, tool, "--collect") == 0
    assert calls(tmp_path) == []
    assert "0 of 3" in capsys.readouterr().out


def test_a_missing_metric_is_named_and_the_runs_are_kept(tmp_path: Path, tool: str) -> None:
    path = write_table(tmp_path, metrics={"AP": "segm/AP"})
    with pytest.raises(TableError, match=r"low, seed 1: metric 'segm/AP' is missing"):
        run(path, tool)
    assert len(calls(tmp_path)) == 6
    assert run(write_table(tmp_path), tool) == 0 and len(calls(tmp_path)) == 6


@pytest.mark.parametrize("text", ["", "null", "5", '{"command": null}', "[" * 100_000, '{"status": "done"}'])
def test_a_damaged_cell_is_run_again(tmp_path: Path, text: str) -> None:
    table = load_table(write_table(tmp_path, seeds=[1], rows=[{"name": "a", "config": "c.yaml"}]))
    (cell,) = table.cells()
    cell.folder.mkdir(parents=True)
    (cell.folder / "cell.json").write_text(text)
    assert cell.read() is None


def test_several_data_sets(tmp_path: Path, tool: str) -> None:
    cell = load_table(write_table(tmp_path)).cells()[0]
    from clipdense.run.table import _at

    results = {"a": {"bbox": {"AP": 1.0}}, "b": {"bbox": {"AP": 2.0}}}
    assert list(_at(results, "bbox/AP")) == [1.0, 2.0] and list(_at(results, "b/bbox/AP")) == [2.0]
    assert list(_at({"bbox/AP": 3.0}, "bbox/AP")) == [3.0]  # flattened, too
    assert list(_at({"bbox": {"AP": 4.0}}, "bbox/AP")) == [4.0]
    assert isinstance(cell, Cell) and cell.name == "low, seed 1"


def test_lazy_configs_take_other_overrides(tmp_path: Path) -> None:
    rows = [{"name": "lazy", "config": "a.py", "overrides": {"optimizer.lr": 0.1}}]
    command = load_table(write_table(tmp_path, rows=rows, overrides={})).cells()[0].command("train.py")
    assert command[3:5] == ["optimizer.lr=0.1", "train.seed=1"]


def test_files_of_the_own_seed(tmp_path: Path) -> None:
    overrides = {"MODEL.WEIGHTS": "runs/seed_{seed}/model.pth", "DATA": ["{seed}.jsonl"]}
    rows = [{"name": "next", "config": "a.yaml", "overrides": overrides}]
    cells = load_table(write_table(tmp_path, rows=rows, overrides={})).cells()
    assert cells[2].command("train.py")[3:7] == [
        "MODEL.WEIGHTS",
        "runs/seed_4/model.pth",
        "DATA",
        "['4.jsonl']",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds'"),
        ({"seeds": 3}, "seeds must be a list, got 3"),
        ({"seeds": []}, "at least one row, one seed"),
        ({"seeds": [1, 1]}, "two seeds are equal"),
        ({"seeds": ["a"]}, "seeds are whole numbers"),
        ({"rows": [{"name": "x"}]}, "row 1: config is missing"),
        (
            {"rows": [{"name": "x y", "config": "a"}, {"name": "x  y", "config": "b"}]},
            "two row names are equal",
        ),
        ({"rows": ["x"]}, "row 1: expected keys and values, got str"),
    ],
)
def test_mistakes_in_the_table_file_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TableError, match=message):
        load_table(write_table(tmp_path, **changes))


def test_a_table_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="No such file"):
        load_table(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("rows: [")
    with pytest.raises(TableError, match="not valid YAML"):
        load_table(tmp_path / "broken.yaml")
