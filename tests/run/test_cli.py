"""The console command: its table, its help, and its errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from clipdense.run.cli import COMMANDS, Command, main
from tests.test_import_time import HEAVY

ROOT = Path(__file__).resolve().parents[2]
_MODULES = "import json, sys; print('\\n' + json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"


def _help(words: list[str], run_python) -> tuple[str, set[str]]:
    source = f"import sys\nfrom clipdense.run.cli import main\ntry:\n    main({words!r})\n"
    printed = run_python(f"{source}except SystemExit as end:\n    assert not end.code, end.code\n{_MODULES}")
    text, _, modules = printed.strip().rpartition("\n")
    return text, set(json.loads(modules))


def test_help_lists_every_command_and_imports_nothing_heavy(run_python):
    text, modules = _help(["--help"], run_python)
    assert "typer" in modules and not modules & HEAVY
    assert all(f" {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_a_command_imports_nothing_heavy(name, run_python):
    text, modules = _help([name, "--help"], run_python)
    assert f"Usage: clipdense {name} " in text
    assert not modules & HEAVY


def test_help_takes_less_than_a_second():
    """The fastest of some runs, in processor time, as other jobs may use the machine."""
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "clipdense", "--help"], check=True, capture_output=True, cwd=ROOT
        )
        after = os.times()
        times.append(after.children_user + after.children_system - before[2] - before[3])
    assert min(times) < 1.0, times


def test_version_and_no_words(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert not end.value.code and capsys.readouterr().out.startswith("clipdense 0.")
    with pytest.raises(SystemExit):
        main([])
    assert "Commands" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train"], "CONFIG"),
        (["convert", "a"], "OUTPUT"),
        (["convert", "a", "b", "--dataset", "x", "--classes", "y"], "give --dataset or --classes, not both"),
        (["data", "check"], "name a PATH, --dataset or --config"),
        (["data", "check", "a", "--kind", "boxes"], "--kind boxes: expected instances, lvis"),
    ],
)
def test_wrong_arguments(words, expected, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    # typer draws a box, which breaks lines
    printed = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert expected in printed and "Usage: clipdense" in printed and "Traceback" not in printed


def _run_row(target: object, monkeypatch, *words: str) -> object:
    """Call a command of the table that is ``target``; return the exit status."""
    monkeypatch.setattr("tests.run.test_cli.SUBJECT", target, raising=False)
    monkeypatch.setitem(COMMANDS, "subject", Command("tests.run.test_cli:SUBJECT", "Help.", "begin again"))
    with pytest.raises(SystemExit) as end:
        main(["subject", *words])
    return end.value.code


def test_errors_are_one_line(monkeypatch, capsys):
    def fail(name: str) -> None:
        Path(name).read_text()

    assert _run_row(fail, monkeypatch, "no/such.txt") == 1
    assert capsys.readouterr().err == "error: no/such.txt: No such file or directory\n"


def test_an_interrupted_command_says_what_to_do(monkeypatch, capsys):
    def stop() -> None:
        raise KeyboardInterrupt

    assert _run_row(stop, monkeypatch) == 130
    assert capsys.readouterr().err == "begin again\n"


def test_a_number_is_the_exit_status(monkeypatch):
    assert _run_row(lambda: 3, monkeypatch) == 3
    assert not _run_row(lambda: 0, monkeypatch)


def test_subcommands(monkeypatch, capsys):
    app = typer.Typer()

    @app.callback()
    def group() -> None:
        """Do things."""

    @app.command()
    def check(path: Path) -> int:
        print(f"checked {path}")
        return 4

    assert _run_row(app, monkeypatch, "check", "a.json") == 4
    assert capsys.readouterr().out == "checked a.json\n"
    assert _run_row(app, monkeypatch, "chekc") == 2


def test_doctor(monkeypatch, capsys):
    monkeypatch.setattr("clipdense.run.doctor.EXTRAS", {"web": (("no_such_module",), "clipdense serve")})
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    printed = capsys.readouterr().out
    assert not end.value.code
    assert "missing no_such_module: clipdense serve" in printed and "pip install 'clipdense[web]'" in printed
    assert "Everything required is installed." in printed

    monkeypatch.setattr("clipdense.run.doctor._REQUIRED", ("no-such-package",))
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 1 and "missing: no-such-package" in capsys.readouterr().out


def test_train_passes_negative_values_and_options(monkeypatch):
    found = {}
    monkeypatch.setattr("clipdense.run.training.run_arguments", lambda args: found.update(vars(args)))
    with pytest.raises(SystemExit) as end:
        main(["train", "a.yaml", "SEED", "-1", "--output", "out", "--resume"])
    assert not end.value.code
    assert found["opts"] == ["SEED", "-1", "OUTPUT_DIR", "out"]
    assert found["resume"] and not found["eval_only"] and found["config_file"] == "a.yaml"
    with pytest.raises(SystemExit):
        main(["evaluate", "a.py", "model.depth=3", "--weights", "w.pth"])
    assert found["opts"] == ["model.depth=3", "train.init_checkpoint=w.pth"] and found["eval_only"]
