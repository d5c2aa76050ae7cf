"""``clipdense models``: the models that clipdense runs."""

from __future__ import annotations

from typing import Annotated

import typer


def models(
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="Show the rows that contain a text, such as panoptic.")
    ] = "",
    commands: Annotated[
        bool, typer.Option("--commands", help="Print the command of each model instead of the table.")
    ] = False,
) -> int:
    """List the models: those in the package, and published weights that clipdense converts.

    projects/SYSTEM/README.md names the files, how to convert them, and all results.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from clipdense.run.zoo import ZOO

    rows = [e for e in ZOO if text.lower() in " ".join(map(str, vars(e).values())).lower()]
    if not rows:
        print(f"no model matches {text!r}")
        return 1
    if commands:
        print("\n".join(entry.command for entry in rows))
        return 0
    name = Column("model", no_wrap=True)
    table = Table(name, "task", "image encoder", "published result", "licence of the weights", "system")
    for e in rows:
        weights = e.licence if e.source != "package" else f"{e.licence}, in the package"
        table.add_row(e.name, e.task, e.backbone, e.numbers, weights, e.system)
    # a file or a pipe gets whole rows
    Console(width=None if Console().is_terminal else 170).print(table)
    print("clipdense models --commands prints how to run each of them.")
    return 0
