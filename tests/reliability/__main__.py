"""Damage inputs, kill jobs, fill disks; print a table of what happened, and fail if anything went wrong.

python -m tests.reliability                                  # all: 2,000 inputs, 60 kills
python -m tests.reliability --only 'images;COCO' --inputs 200
python -m tests.reliability --only training --kills 10 --seed 3
python -m tests.reliability --markdown docs/reliability.md   # write the figures
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from tests.reliability.inputs import KINDS
from tests.reliability.interruptions import EVENTS
from tests.reliability.kills import JOBS
from tests.reliability.outcomes import VERDICTS, run_cases
from tests.reliability.processes import warm_up
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

{tables}
Seed {seed}. Made by `{command}`.
"""


def main() -> int:
    args = _arguments()
    chosen = args.only.split(";") if args.only else [*KINDS, *JOBS, *EVENTS]
    folder = args.folder or Path(tempfile.mkdtemp(prefix="clipdense-reliability-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["CLIPDENSE_CACHE"] = str(folder / "cache")
    warm_up()
    world, figures = World(folder), Figures()
    damage_inputs(world, figures, [name for name in KINDS if name in chosen], args.inputs, args.seed)
    kill_jobs(world, figures, [name for name in JOBS if name in chosen], args.kills, args.seed)
    cause_events(world, figures, [name for name in EVENTS if name in chosen])
    if args.markdown:
        only = f" -m tests.reliability --only '{args.only}'"
        command = f"python{only}" if args.only else "make test-reliability"
        tables = "\n".join(figures.lines) + "\n"
        args.markdown.write_text(TEXT.format(tables=tables, seed=args.seed, command=command))
    print(f"{figures.faults} faults; logs in {folder}")
    return 1 if figures.faults else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = "; ".join([*KINDS, *JOBS, *EVENTS])
    parser.add_argument("--only", default="", help=f"names separated by semicolons, of: {names}")
    parser.add_argument("--inputs", type=int, default=2000, help="number of damaged inputs (default 2000)")
    parser.add_argument("--kills", type=int, default=60, help="number of kills (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="working folder to reuse (default: a temporary one)")
    parser.add_argument("--markdown", type=Path, help="write the figures to this file")
    return parser.parse_args()


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
        cases, weight = KINDS[kind]
        part = islice(cases(world, seed), round(number * weight / weights))
        counts, failed = run_cases(kind.split(",")[0].replace(" ", "_"), part, world.folder)
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
        start = time.monotonic()
        ends = list(kill(world, max(1, round(number * weight / weights)), random.Random(seed)))
        different = ["; ".join(notes) for _, notes in ends if notes]
        seconds = round(time.monotonic() - start)
        kills = sum(n for n, _ in ends)
        figures.add(job, kills, len(different), seconds, faults=len(different), details=different)


def cause_events(world: World, figures: Figures, events: list[str]) -> None:
    """Interrupt tools, fill disks and lose processes."""
    if events:
        figures.head("event", "case", "result")
    for event in events:
        for case, notes in EVENTS[event](world):
            result = ", ".join(notes) or "ended in time, with a sentence"
            figures.add(event, case, result, faults=bool(notes))


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
