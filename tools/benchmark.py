"""Run benchmark suites: ours, the floor or the other library, the ratio, images/s and peak memory.

    python tools/benchmark.py all --device cuda --json output/benchmark.json
    python tools/benchmark.py evaluation --json output/benchmark.json
    python tools/benchmark.py all --list
    python tools/benchmark.py evaluation --help

"all" runs every suite, at full size on a GPU and reduced on a CPU; --suites and --scale choose. Wall-clock
ratios compare the minimum of each side over at least 7 interleaved pairs; raw times stand in the JSON file.
FLOPs are exact. A row "x the cost" is ours / floor, a row "x as fast" floor / ours.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

SUITES = sorted(path.stem for path in Path(__file__).with_name("benchmarks").glob("[!_]*.py"))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", help=f"all, or one of: {', '.join(SUITES)}")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write rows, raw times and the machine there"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "meta"),
        help="default: cuda if there is a GPU; meta counts rows of some suites without computing",
    )
    parser.add_argument("--list", action="store_true", help="name the suites; of all, with their options")
    name = next((word for word in arguments if word in ("all", *SUITES)), None)
    if name == "all":
        parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES, help="run only these")
        parser.add_argument(
            "--scale", choices=("full", "reduced"), help="default: full on a GPU, reduced on a CPU"
        )
    elif name:  # it adds options of its own, and takes seconds to import
        suite = import_module(f"benchmarks.{name}")
        if hasattr(suite, "add_arguments"):
            suite.add_arguments(parser)
    args = parser.parse_args(arguments)
    if not args.list and args.suite not in ("all", *SUITES):
        parser.error(f"name a suite: all, {', '.join(SUITES)}")
    return args


if __name__ == "__main__":
    parse_arguments()  # --help and wrong options end here, before the imports that take seconds

import torch
from benchmarks import Row, Scale, load_suite, suite_options, table

import clipdense
from clipdense.files import json_text, write_text
from clipdense.run.boundary import tool_errors


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.list:
        for each in SUITES:
            print(f"{each:16}{(load_suite(each).__doc__ or '').strip().splitlines()[0]}")
            if args.suite == "all":
                for scale in get_args(Scale):
                    print(f"{'':16}{scale}: {' '.join(suite_options(each, scale)) or '(defaults)'}")
        return 0
    args.device = checked_device(args.suite, args.device)
    content: dict[str, Any] = {"suite": args.suite, "machine": machine(args.device), "rows": []}
    return run_all(args, content) if args.suite == "all" else run_suite(args, content)


def checked_device(suite: str, device: str | None) -> str:
    """Return the device to compute on.

    Raises:
        ValueError: If it does not exist, or the suite cannot count without computing.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU; use --device cpu")
    if device == "meta" and (suite == "all" or not getattr(load_suite(suite), "META", False)):
        raise ValueError(f"--device meta: {suite} has no rows without computing; use --device cpu")
    return device


def run_suite(args: argparse.Namespace, content: dict[str, Any]) -> int:
    """Run one suite, and print its rows."""
    rows: list[Row] = []
    collect(args.suite, args, rows, args.json, content)
    print(table(rows))
    return 0


def run_all(args: argparse.Namespace, content: dict[str, Any]) -> int:
    """Run suites one after the other, and print all rows; one that fails does not end the others.

    Returns:
        Exit status: 1 if a suite has failed.
    """
    scale: Scale = args.scale or ("full" if args.device == "cuda" else "reduced")
    errors: dict[str, str] = {}
    options = {name: suite_options(name, scale) for name in args.suites}
    content |= {"scale": scale, "options": options, "errors": errors}
    rows: list[Row] = []
    for name in args.suites:
        own = parse_arguments([name, "--device", args.device, *options[name]])
        try:
            collect(name, own, rows, args.json, content)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
            if args.json:
                write(args.json, rows, content)
        gc.collect()  # the models of the suite
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(table(rows))
    for name, message in errors.items():
        print(f"error: suite {name}: {message}", file=sys.stderr)
    return 1 if errors else 0


def collect(
    name: str, args: argparse.Namespace, rows: list[Row], path: Path | None, content: dict[str, Any]
) -> None:
    """Append the rows of a suite; write all rows after each, as a later one may take long, or fail."""
    for row in load_suite(name).rows(args):
        rows.append(row)
        if path:
            write(path, rows, content)


def write(path: Path, rows: list[Row], content: dict[str, Any]) -> None:
    write_text(path, json_text({**content, "rows": [row.to_json() for row in rows]}, indent=1) + "\n")


def machine(device: str) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "clipdense": clipdense.__version__,
        **{
            name: import_module(name).__version__
            for name in ("detectron2", "torchvision", "open_clip", "timm")
        },
    }


if __name__ == "__main__":
    with tool_errors("interrupted; rows that were written stay in the --json file"):
        sys.exit(main())
