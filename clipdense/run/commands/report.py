"""``clipdense report``: one or two runs as an HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="Output folder of a run.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER_DIR", help="Output folder of a run to compare with.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write (default: OUTPUT_DIR/report.html).")
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="Best images, and as many worst ones.")] = 6,
    bootstrap: Annotated[
        int, typer.Option(min=1, help="Bootstrap samples for the intervals of differences.")
    ] = 200,
    min_score: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Detections of a lower score are not drawn, and not in the confusion matrix."
        ),
    ] = 0.5,
) -> None:
    """Write one HTML file on a run: metrics, curves, classes, errors, best and worst images, config.

    With a second folder, both runs stand side by side, with the differences and their bootstrap intervals.
    The file needs no other file and no network.
    """
    from clipdense.run.reporting import write_report
    from clipdense.visualization.report.build import Options

    folders = [folder] if other is None else [folder, other]
    print(f"Written to {write_report(folders, output, Options(images, bootstrap, min_score))}")
