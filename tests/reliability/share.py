"""A share of the checks with fixed seeds, in the process of its own that ``test_reliability.py`` starts."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from clipdense.engine.options import ConfigError
from tests.reliability.__main__ import main
from tests.reliability.inputs import KINDS
from tests.reliability.outcomes import Case, WrongResultError, run_case, run_together
from tests.reliability.processes import require_single_thread, warm_up

# 60 damaged inputs and two kills, in seconds.
KINDS_OF_SHARE = [kind for kind in KINDS if kind != "state files"]
ARGUMENTS = ["--only", ";".join([*KINDS_OF_SHARE, "tables"]), "--inputs", "60", "--kills", "2"]


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    warm_up()


def test_a_share_of_the_run_holds_and_a_stopped_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    arguments = [*ARGUMENTS, "--folder", str(tmp_path), "--markdown", str(page)]
    assert main(arguments) == 0, capfd.readouterr().out
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    refused = {row[0].removeprefix("| "): int(row[3]) for row in rows if row[0].removeprefix("| ") in KINDS}
    assert len(refused) == len(KINDS_OF_SHARE) and sum(refused.values()) > 20
    assert sum(refused[kind] == 0 for kind in refused) <= 1

    # as if it had been killed while it wrote the outcome of an input
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "complete").unlink()
    record = folder / "COCO.jsonl"
    whole = record.read_bytes()
    record.write_bytes(whole[: len(whole) - 30])
    (folder / "images.jsonl").write_text(_with_fault((folder / "images.jsonl").read_text()))
    assert main(arguments) == 1
    assert "1 faults" in capfd.readouterr().out
    assert record.read_bytes() == whole


def _with_fault(lines: str) -> str:
    first, *others = lines.splitlines(keepends=True)
    return json.dumps({**json.loads(first), "verdict": "traceback"}) + "\n" + "".join(others)


# ---- the harness itself


def _raise(error: BaseException) -> None:
    raise error


def test_verdicts(tmp_path: Path) -> None:
    expected = {
        "accepted": lambda: None,
        "refused": lambda: _raise(ConfigError("input.json: no")),
        "unnamed": lambda: _raise(ConfigError("no")),
        "traceback": lambda: [][1],
        "hang": lambda: time.sleep(60),
        "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "wrong": lambda: _raise(WrongResultError("class 1000")),
    }
    cases = {}
    for verdict, action in expected.items():
        limit = 1.0 if verdict == "hang" else 30.0
        cases[verdict] = Case(verdict, action, ("input.json",), limit)
        assert run_case(cases[verdict], tmp_path / "log").verdict == verdict
    together = run_together([*cases.values(), *cases.values()], tmp_path / "log")
    assert [outcome.verdict for outcome in together] == 2 * list(expected)


def test_a_process_that_is_left_is_found_and_ended(tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    def action() -> None:
        if os.fork() == 0:
            time.sleep(1.0)
            witness.touch()
            os._exit(0)

    outcome = run_case(Case("left", action, ()), tmp_path / "log")
    assert outcome.verdict == "hang" and "1 processes are left" in outcome.message
    time.sleep(1.5)
    assert not witness.exists()


def test_an_input_that_runs_code_is_found(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    assert run_case(Case("code", witness.touch, (), witness=witness), tmp_path / "log").verdict == "wrong"


def test_a_process_with_threads_is_not_forked(tmp_path: Path) -> None:
    require_single_thread()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="one thread, but it has 2"):
            run_case(Case("any", lambda: None, ()), tmp_path / "log")
    finally:
        stop.set()
        thread.join()
