"""Run a benchmark suite: ours, the other, the ratio.

    python tools/benchmark.py evaluation --json output/benchmark.json
    python tools/benchmark.py --list
    python tools/benchmark.py evaluation --help

Wall-clock ratios compare the minimum of each side over at least 7 interleaved pairs; raw times stand in the
JSON file. FLOPs are exact. A row "x the cost" is ours / other, a row "x as fast" other / ours.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

SUITES = sorted(path.stem for path in Path(__file__).with_name("benchmarks").glob("[!_]*.py"))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", help=f"one of: {', '.join(SUITES)}")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write rows, raw times and the machine there"
    )
    parser.add_argument("--list", action="store_true", help="name the suites")
    # A suite adds options of its own, and takes seconds to import: only if it is named.
    name = next((word for word in arguments if word in SUITES), None)
    if name:
        suite = import_module(f"benchmarks.{name}")
        if hasattr(suite, "add_arguments"):
            suite.add_arguments(parser)
    args = parser.parse_args(arguments)
    if not args.list and args.suite not in SUITES:
        parser.error(f"name a suite: {', '.join(SUITES)}")
    return args


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import torch
from benchmarks import Row, load_suite, table

import clipdense
from clipdense.files import json_text, write_text
from clipdense.run.boundary import tool_errors


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.list:
        for each in SUITES:
            print(f"{each:16}{(load_suite(each).__doc__ or '').strip().splitlines()[0]}")
        return 0
    suite = load_suite(args.suite)
    rows = []
    for row in suite.rows(args):
        rows.append(row)
        if args.json:
            write(args.json, args.suite, rows)  # after each row: a later one may take long, or fail
    print(table(rows))
    return 0


def write(path: Path, suite: str, rows: list[Row]) -> None:
    content = {"suite": suite, "machine": machine(), "rows": [row.to_json() for row in rows]}
    write_text(path, json_text(content, indent=1) + "\n")


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "clipdense": clipdense.__version__,
    }


if __name__ == "__main__":
    with tool_errors("interrupted; rows that were written stay in the --json file"):
        sys.exit(main())
