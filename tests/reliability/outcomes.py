"""Verdict on what happens with one damaged input."""

import json
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from clipdense.run.boundary import describe_error
from tests.reliability.processes import Job
from tests.reliability.records import Records

__all__ = ["FAULTS", "VERDICTS", "Case", "WrongResultError", "run_case", "run_cases"]

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
    """Run a case in a forked process.

    The verdicts: accepted; refused (an error that the tools print without a traceback, and which names the
    input); unnamed (such an error without the name); traceback (an error that the tools do not expect); hang;
    crash (ended by a signal); wrong (see `WrongResultError`). Processes that it leaves are a hang, too.
    """
    read, write = os.pipe()

    def body() -> None:
        os.close(read)
        os.write(write, json.dumps(_result(case)).encode() + b"\n")

    log.unlink(missing_ok=True)
    job = Job(body, log)
    os.close(write)
    data, end = b"", time.monotonic() + case.limit
    while select.select([read], [], [], max(end - time.monotonic(), 0))[0]:
        part = os.read(read, 65536)
        data += part
        if not part or data.endswith(b"\n"):
            break
    os.close(read)
    if not data and time.monotonic() >= end:
        job.send(signal.SIGKILL)
        job.wait()
        return Outcome(case.name, "hang", f"no result after {case.limit:g} s")
    ended, left = job.wait(timeout=30.0), job.remaining()
    job.send(signal.SIGKILL)
    if case.witness is not None and case.witness.exists():
        case.witness.unlink()
        return Outcome(case.name, "wrong", "the input ran code")
    if not data:
        return Outcome(case.name, "crash", f"status {ended.code}: {ended.text[-300:]}")
    verdict, message = json.loads(data)
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


def run_cases(cases: Iterable[Case], records: Records, log: Path) -> tuple[Counter[str], list[Outcome]]:
    """Run cases one after the other, except those whose outcome is recorded.

    Args:
        cases: the cases, in the order of the records.
        records: gets a row per case.
        log: file for the output of a case.

    Returns:
        Number of cases per verdict, and the outcomes that are faults.
    """
    outcomes = []
    for number, case in enumerate(cases):
        if number < len(records.rows):
            outcomes.append(Outcome(**records.rows[number]))
            assert outcomes[-1].name == case.name, f"{records.path} belongs to other cases; delete it"
            continue
        outcomes.append(run_case(case, log))
        records.add(vars(outcomes[-1]))
    return Counter(o.verdict for o in outcomes), [o for o in outcomes if o.verdict in FAULTS]
