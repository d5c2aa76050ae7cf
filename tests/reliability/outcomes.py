"""Verdict on what happens with one damaged input."""

import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from clipdense.run.boundary import describe_error
from tests.reliability.processes import Job
from tests.reliability.records import Records

__all__ = ["FAULTS", "VERDICTS", "Case", "WrongResultError", "run_case", "run_cases", "run_together"]

VERDICTS = ("accepted", "refused", "unnamed", "traceback", "hang", "crash", "wrong")
FAULTS = VERDICTS[2:]


class WrongResultError(Exception):
    """A damaged input was accepted without a word, and the result is wrong; or it ran code."""


@dataclass(frozen=True)
class Case:
    """A damaged input.

    Attributes:
        name: name for the report.
        action: uses the input as the product does; raises `WrongResultError` if the result is wrong.
        names: texts of which an error message must contain one: the file, or the config key.
        limit: seconds after which it counts as hanging; far more than it takes on a busy machine.
        witness: file that exists afterwards if the input ran code.
    """

    name: str
    action: Callable[[], object]
    names: tuple[str, ...]
    limit: float = 120.0
    witness: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """Verdict on a case: one of `VERDICTS`, and the message."""

    name: str
    verdict: str
    message: str


def run_case(case: Case, log: Path) -> Outcome:
    """Run a case in a forked process of its own (see `run_together`)."""
    return next(run_together([case], log))


def run_together(cases: Sequence[Case], log: Path) -> Iterator[Outcome]:
    """Run cases one after the other in a forked process, and the rest in another one after a hang or crash.

    The verdicts: accepted; refused (an error that the tools print without a traceback, and which names the
    input); unnamed (such an error without the name); traceback (an error that the tools do not expect); hang;
    crash (ended by a signal); wrong (see `WrongResultError`). Processes that are left are a hang, too.
    """
    while cases:
        read, write = os.pipe()
        log.unlink(missing_ok=True)
        job = Job(partial(_run_all, cases, read, write), log)
        os.close(write)
        with os.fdopen(read, "rb") as file:
            for number, case in enumerate(cases, 1):
                line = _read_line(file, case.limit)
                last = line is None or not line.endswith(b"\n") or number == len(cases)
                yield _finish(case, job, line) if last else Outcome(case.name, *json.loads(line or b""))
                if last:
                    break
        cases = cases[number:]


def _run_all(cases: Sequence[Case], read: int, write: int) -> None:
    os.close(read)
    for case in cases:
        verdict, message = _result(case)
        if case.witness is not None and case.witness.exists():
            case.witness.unlink()
            verdict, message = "wrong", "the input ran code"
        data = json.dumps([verdict, message]).encode() + b"\n"
        while data:
            data = data[os.write(write, data) :]


def _read_line(file: BinaryIO, limit: float) -> bytes | None:
    """Read a line; None if it takes too long, an incomplete one if the writer ends."""
    end, line = time.monotonic() + limit, b""
    while not line.endswith(b"\n"):
        if not select.select([file], [], [], max(end - time.monotonic(), 0))[0]:
            return None
        part = os.read(file.fileno(), 1)  # not more: the next line has its own time
        if not part:
            break
        line += part
    return line


def _finish(case: Case, job: Job, line: bytes | None) -> Outcome:
    """Return the outcome of the last case of a job, and end the job with all its processes."""
    if line is None:
        job.send(signal.SIGKILL)
        job.wait()
        return Outcome(case.name, "hang", f"no result after {case.limit:g} s")
    ended, left = job.wait(timeout=30.0), job.remaining()
    job.send(signal.SIGKILL)
    if not line.endswith(b"\n"):
        return Outcome(case.name, "crash", f"status {ended.code}: {ended.text[-300:]}")
    verdict, message = json.loads(line)
    if left:
        verdict, message = "hang", f"{len(left)} processes are left, after: {message}"
    return Outcome(case.name, verdict, message)


def _result(case: Case) -> tuple[str, str]:
    try:
        return "accepted", str(case.action())[:300]
    except WrongResultError as e:
        return "wrong", str(e)[:500]
    except SystemExit as e:
        text: str | None = str(e.code)
    except KeyboardInterrupt:
        return "traceback", "KeyboardInterrupt"
    except Exception as e:
        text = describe_error(e)
        if text is None:
            return "traceback", f"{type(e).__name__}: {e} ({_place(e)})"[:1500]
    named = any(name and name in text for name in case.names)
    return ("refused" if named else "unnamed"), text[:1500]


def _place(error: BaseException) -> str:
    """Return where our code was when an error occurred: file:line."""
    trace, place = error.__traceback__, "?"
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if "clipdense" in file.parts:
            place = f"{file.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def run_cases(cases: Iterable[Case], records: Records, log: Path, together: int = 1) -> None:
    """Run cases one after the other, except those whose outcome is recorded.

    Args:
        cases: the cases, in the order of the records.
        records: gets a row per case.
        log: file for the output of a case.
        together: number of cases that share a process.
    """
    pending = iter(cases)
    names = [case.name for case in islice(pending, len(records.rows))]
    recorded = [row["name"] for row in records.rows[: len(names)]]
    assert names == recorded, f"{records.path} is of other cases; delete it"
    while group := list(islice(pending, together)):
        for outcome in run_together(group, log):
            records.add(vars(outcome))
