"""``clipdense reproduce``: published results, with the published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def reproduce(
    rows: Annotated[
        list[str] | None,
        typer.Argument(metavar="ROW", help="Names of rows or systems; default: every row of the table."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List what is needed and how large it is; fetch and run nothing."),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of weights and results.")] = Path("output/reproduce"),
    table: Annotated[
        Path | None, typer.Option(help="Table of rows; default: projects/headline_rows.yaml.")
    ] = None,
    no_download: Annotated[
        bool, typer.Option("--no-download", help="Ask for files instead of downloading them.")
    ] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Open published files that are pickles. They can run code: use it for trusted sources only.",
        ),
    ] = False,
) -> int:
    """Evaluate published weights, and compare the results with the published ones.

    Fetches or asks for each weight file, converts it, evaluates it on its data, and prints paper, ours and
    difference. Call it again to go on after an interruption: finished rows are kept.
    """
    from clipdense.run.reproduce import Reproduction, compare, default_table, requirements

    reproduction = Reproduction.of_table(
        table or default_table(), rows or (), output, downloads=not no_download, allow_pickle=allow_pickle
    )
    if dry_run:
        print(requirements(reproduction))
        return 0
    failed = reproduction.run()
    comparison, beyond = compare(reproduction)
    print(comparison)
    for name, reason in failed.items():
        print(f"not run, {name}: {reason}")
    # rows that are listed only are no failure, unless they are named
    listed = set() if rows else {row.name for row in reproduction.rows if row.not_run}
    return 1 if failed.keys() - listed or beyond else 0
