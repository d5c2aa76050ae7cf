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
    size = Column("size", no_wrap=True, justify="right")
    table = Table(name, "task", "image encoder", "published result", size, "licence", "system", "source")
    for e in rows:
        table.add_row(e.name, e.task, e.backbone, e.numbers, e.size, e.licence, e.system, e.source)
    # a file or a pipe gets whole rows
    Console(width=None if Console().is_terminal else 240).print(table)
    print(
        "Sizes are those of the parameters in float32, in the package of the files. Sources are repositories "
        "of github.com.\n"
        "clipdense models --commands prints how to run each of them."
    )
    return 0
