"""Run the cells of a table (rows x seeds); call it again to continue after an interruption.

    python tools/run_table.py TABLE.yaml --jobs 2 --markdown results.md
    python tools/run_table.py TABLE.yaml --retry          # run failed cells again
    python tools/run_table.py TABLE.yaml --collect        # print the table, run nothing

The table file is described in clipdense/run/table.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

TRAIN_NET = str(Path(__file__).with_name("train_net.py"))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", metavar="TABLE.yaml")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="number of simultaneous runs (default 1)"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the table to this file after each cell"
    )
    parser.add_argument("--retry", action="store_true", help="run failed cells again")
    parser.add_argument("--collect", action="store_true", help="print the table, run nothing")
    parser.add_argument(
        "--tool", default=TRAIN_NET, help="program that runs a cell (default: train_net.py beside this)"
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    return args


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

from tqdm import tqdm

from clipdense.files import write_text
from clipdense.run.boundary import tool_errors
from clipdense.run.table import TableError, load_table, markdown, run_cells


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    command = shlex.join(["python", "tools/run_table.py", args.table])

    def write() -> None:
        if args.markdown:
            write_text(args.markdown, markdown(table, command))

    def write_early() -> None:
        try:
            write()
        except TableError as error:  # a missing metric does not stop the other runs
            tqdm.write(f"warning: {error}", file=sys.stderr)

    table = load_table(args.table)
    failed = []
    if not args.collect:
        failed = run_cells(table, args.tool, jobs=args.jobs, retry=args.retry, finished=write_early)
    write()
    print(markdown(table, command))
    for cell in failed:
        print(
            f"failed: {cell.name}; its log: {cell.folder / 'run.log'}; --retry runs it again", file=sys.stderr
        )
    return 1 if failed else 0


if __name__ == "__main__":
    with tool_errors("interrupted; finished cells are kept, and the same command continues"):
        sys.exit(main())
