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
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from tests.conftest import ROOT
from tests.reliability.inputs import KINDS
from tests.reliability.interruptions import EVENTS
from tests.reliability.kills import JOBS
from tests.reliability.outcomes import VERDICTS, run_cases
from tests.reliability.processes import warm_up
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
    figures = Figures()
    damage_inputs(world, figures, [name for name in KINDS if name in chosen], args.inputs, args.seed)
    kill_jobs(world, figures, [name for name in JOBS if name in chosen], args.kills, args.seed)
    cause_events(world, figures, [name for name in EVENTS if name in chosen])
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


class Figures:
    """Tables of a run.

    Attributes:
        lines: lines of the tables.
        faults: number of faults.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.faults = 0

    def head(self, *cells: str) -> None:
        """Begin a table."""
        self.lines += [""] * bool(self.lines) + [_row(*cells), _row(*["---"] * len(cells))]

    def add(self, *cells: object, faults: int = 0, details: Iterable[str] = ()) -> None:
        """Add a row to the last table, and print it with details."""
        self.lines.append(_row(*cells))
        self.faults += faults
        print(self.lines[-1], flush=True)
        for detail in details:
            print(f"    {detail[:300]}", flush=True)


def damage_inputs(world: World, figures: Figures, kinds: list[str], number: int, seed: int) -> None:
    """Use damaged inputs of each kind."""
    if kinds:
        figures.head("inputs", "number", *VERDICTS)
    weights = sum(KINDS[kind][1] for kind in kinds)
    for kind in kinds:
        cases, weight, together = KINDS[kind]
        part = islice(cases(world, seed), math.ceil(number * weight / weights))
        counts, failed = run_cases(part, _records(world, kind), world.folder / "input.log", together)
        figures.add(
            kind,
            counts.total(),
            *(counts[verdict] for verdict in VERDICTS),
            faults=len(failed),
            details=(f"{o.verdict}: {o.name}: {o.message}" for o in failed),
        )


def kill_jobs(world: World, figures: Figures, jobs: list[str], number: int, seed: int) -> None:
    """Kill each job, and let it end."""
    if jobs:
        figures.head("job", "kills", "different", "seconds")
    weights = sum(JOBS[job][1] for job in jobs)
    for job in jobs:
        kill, weight = JOBS[job]
        records = _records(world, job)  # rows: kills, differences, seconds
        done = sum(row[0] for row in records.rows)
        left, start = math.ceil(number * weight / weights) - done, time.monotonic()
        for kills, notes in kill(world, left, random.Random(f"{seed} {done}")) if left > 0 else ():
            records.add([kills, notes, time.monotonic() - start])
            start = time.monotonic()
        different = ["; ".join(row[1]) for row in records.rows if row[1]]
        kills, seconds = (sum(row[i] for row in records.rows) for i in (0, 2))
        figures.add(job, kills, len(different), round(seconds), faults=len(different), details=different)


def cause_events(world: World, figures: Figures, events: list[str]) -> None:
    """Interrupt tools, fill disks and lose processes."""
    if events:
        figures.head("event", "case", "result")
    for event in events:
        records = _records(world, event)
        if not records.rows:
            records.add(*EVENTS[event](world))
        for case, notes in records.rows:
            result = ", ".join(notes) or "as expected"
            figures.add(event, case, result, faults=bool(notes))


def _records(world: World, name: str) -> Records:
    return Records(world.folder / f"{re.sub('[^a-zA-Z-]+', '_', name)}.jsonl")


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
