"""Damage inputs, kill jobs, fill disks; print a table of what happened, and fail if anything went wrong.

Each result is written at once. A run that was ended goes on where it was when it is called again with the
same sources and options; a complete one, or other sources, begin anew.

python -m tests.reliability                                  # all: 2,000 inputs, 60 kills
python -m tests.reliability --only 'images;COCO' --inputs 200
python -m tests.reliability --only training --kills 10 --seed 3
python -m tests.reliability --markdown docs/reliability.md   # write the figures
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from tests.conftest import ROOT
from tests.reliability.inputs import KINDS
from tests.reliability.interruptions import EVENTS
from tests.reliability.kills import JOBS
from tests.reliability.outcomes import FAULTS, VERDICTS, run_cases
from tests.reliability.processes import Job, warm_up
from tests.reliability.records import Records, digest_sources
from tests.reliability.world import World

TEXT = """# Reliability

`make test-reliability` damages inputs, kills jobs at random times, interrupts tools, fills disks and loses
processes, and writes this page. Its harness is `tests/reliability/`; `make test` runs a short share of it.

- Inputs are whole files with random damage (bits, bytes, JSON values) and hand-made bad ones. *Accepted*:
  used, with a valid result. *Refused*: an error message that names the file or the key. All other columns are
  faults: *unnamed* (a message without the file), *traceback*, *hang*, *crash* (ended by a signal), *wrong* (a
  wrong result without a word, or code of the input ran).
- A killed job (SIGKILL) is called again until it ends. *Different* counts jobs whose files differ from those
  of a job that nobody killed: something lost, doubled or left behind.
- Events are *as expected* if every process ends in time with a message: after Ctrl-C within 60 s, on a full
  disk with the name of the file, after the loss of a rank within 60 s. After the loss of their launcher, the
  ranks end within 20 s.

{tables}
Made by `{command}`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the harness; return the exit status, 1 if there are faults."""
    parser = _parser()
    args = parser.parse_args(arguments)
    chosen = args.only.split(";") if args.only else [*KINDS, *JOBS, *EVENTS]
    if unknown := set(chosen) - {*KINDS, *JOBS, *EVENTS}:
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}")
    world, complete = _folder(args)
    os.environ["CLIPDENSE_CACHE"] = str(world.folder / "cache")
    warm_up()
    kinds, jobs, events = ([name for name in names if name in chosen] for names in (KINDS, JOBS, EVENTS))
    inputs = _shares({kind: KINDS[kind][1] for kind in kinds}, args.inputs)
    kills = _shares({job: JOBS[job][1] for job in jobs}, args.kills)
    parts: dict[str, Callable[[], None]] = {
        **{kind: partial(damage_inputs, world, kind, inputs[kind], args.seed) for kind in kinds},
        **{job: partial(kill_job, world, job, kills[job], args.seed) for job in jobs},
        **{event: partial(cause_event, world, event) for event in events},
    }
    run_parts(world, parts, args.jobs)
    figures = Figures()
    figures.add_inputs(world, kinds)
    figures.add_kills(world, jobs)
    figures.add_events(world, events)
    complete.touch()
    if args.markdown:
        changed = [
            f"--{name} {shlex.quote(str(getattr(args, name)))}"
            for name in ("only", "inputs", "kills", "seed")
            if getattr(args, name) != parser.get_default(name)
        ]
        command = " ".join(["python -m tests.reliability", *changed]) if changed else "make test-reliability"
        args.markdown.write_text(TEXT.format(tables="\n".join(figures.lines) + "\n", command=command))
    print(f"{figures.faults} faults; inputs and logs in {world.folder}")
    return 1 if figures.faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = "; ".join([*KINDS, *JOBS, *EVENTS])
    parser.add_argument("--only", default="", help=f"names separated by semicolons, of: {names}")
    parser.add_argument("--inputs", type=int, default=2000, help="number of damaged inputs (default 2000)")
    parser.add_argument("--kills", type=int, default=60, help="number of kills (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="number of parts at the same time (default 1)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "output/reliability",
        help="working folder, with a subfolder per state of the sources (default output/reliability)",
    )
    parser.add_argument("--markdown", type=Path, help="write the figures to this file")
    return parser


def _folder(args: argparse.Namespace) -> tuple[World, Path]:
    """Return the world of these sources and options, and the file that marks a complete run."""
    options = json.dumps([args.only, args.inputs, args.kills, args.seed])
    name = f"{digest_sources()}-{hashlib.sha256(options.encode()).hexdigest()[:6]}"
    folder = args.folder.resolve() / name
    complete = folder / "complete"
    if complete.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return World(folder), complete


def _shares(weights: dict[str, float], number: int) -> dict[str, int]:
    """Divide a number, rounding up."""
    return {name: math.ceil(number * weight / sum(weights.values())) for name, weight in weights.items()}


# ---- parts of a run: each adds to its records what they lack


def run_parts(world: World, parts: dict[str, Callable[[], None]], number: int) -> None:
    """Run the parts, a number of them at the same time, each in a process of its own."""
    world.prepare()
    waiting, running = dict(parts), dict[str, Job]()
    while waiting or running:
        while waiting and len(running) < number:
            name = next(iter(waiting))
            running[name] = Job(waiting.pop(name), world.folder / f"{_slug(name)}.log")
        for name in [name for name, job in running.items() if job.has_ended()]:
            ended = running.pop(name).wait()
            if ended.code:
                raise RuntimeError(f"{name}: exit status {ended.code}\n{ended.text[-3000:]}")
            print(f"{name}: {ended.seconds:.0f} s", flush=True)
        time.sleep(0.1)


def damage_inputs(world: World, kind: str, number: int, seed: int) -> None:
    """Use damaged inputs of a kind."""
    cases, _, together = KINDS[kind]
    log = world.folder / f"{_slug(kind)}_input.log"
    run_cases(islice(cases(world, seed), number), _records(world, kind), log, together)


def kill_job(world: World, job: str, number: int, seed: int) -> None:
    """Kill a job, and let it end."""
    records = _records(world, job)  # rows: kills, differences, seconds
    done, start = sum(row[0] for row in records.rows), time.monotonic()
    if number <= done:
        return
    for kills, notes in JOBS[job][0](world, number - done, random.Random(f"{seed} {done}")):
        records.add([kills, notes, time.monotonic() - start])
        start = time.monotonic()


def cause_event(world: World, event: str) -> None:
    """Interrupt tools, fill disks, or lose processes."""
    records = _records(world, event)  # rows: case, what is wrong
    if not records.rows:
        records.add(*EVENTS[event](world))


# ---- figures


class Figures:
    """Tables of a run.

    Attributes:
        lines: lines of the tables.
        faults: number of faults.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.faults = 0

    def add_inputs(self, world: World, kinds: list[str]) -> None:
        """Add the table of damaged inputs."""
        self._head(kinds, "inputs", "number", *VERDICTS)
        total = Counter[str]()
        for kind in kinds:
            rows = _records(world, kind).rows
            counts = Counter(row["verdict"] for row in rows)
            failed = [row for row in rows if row["verdict"] in FAULTS]
            self._add(
                kind,
                len(rows),
                *(counts[verdict] for verdict in VERDICTS),
                faults=len(failed),
                details=(f"{row['verdict']}: {row['name']}: {row['message']}" for row in failed),
            )
            total += counts
        if len(kinds) > 1:
            self._add("all", total.total(), *(total[verdict] for verdict in VERDICTS))

    def add_kills(self, world: World, jobs: list[str]) -> None:
        """Add the table of killed jobs."""
        self._head(jobs, "job", "kills", "different", "seconds")
        for job in jobs:
            rows = _records(world, job).rows
            different = ["; ".join(row[1]) for row in rows if row[1]]
            kills, seconds = (sum(row[i] for row in rows) for i in (0, 2))
            self._add(job, kills, len(different), round(seconds), faults=len(different), details=different)

    def add_events(self, world: World, events: list[str]) -> None:
        """Add the table of events."""
        self._head(events, "event", "case", "result")
        for event in events:
            for case, notes in _records(world, event).rows:
                self._add(event, case, ", ".join(notes) or "as expected", faults=bool(notes))

    def _head(self, names: list[str], *cells: str) -> None:
        if names:
            self.lines += [""] * bool(self.lines) + [_row(*cells), _row(*["---"] * len(cells))]

    def _add(self, *cells: object, faults: int = 0, details: Iterable[str] = ()) -> None:
        """Add a row to the last table, and print it with details."""
        self.lines.append(_row(*cells))
        self.faults += faults
        print(self.lines[-1], flush=True)
        for detail in details:
            print(f"    {detail[:300]}", flush=True)


def _slug(name: str) -> str:
    return re.sub("[^a-zA-Z-]+", "_", name)


def _records(world: World, name: str) -> Records:
    return Records(world.folder / f"{_slug(name)}.jsonl")


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
