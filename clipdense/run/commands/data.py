"""``clipdense data``: check and split of your own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Check your own data before training, and split them.")

_PATH = Annotated[
    Path | None,
    typer.Argument(
        metavar="PATH",
        help="COCO json, YOLO data.yaml, or a folder: YOLO, Pascal VOC, images with label maps, or images.",
    ),
]
_IMAGES = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Images, if they are not found near the annotations.")
]
_PANOPTIC = Annotated[Path | None, typer.Option(metavar="FOLDER", help="PNGs of a COCO panoptic json.")]
_CLASSES = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Class names of label maps, one a line, with or without colours."),
]
_OPTION = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OPTION",
        help="How label maps are read: the ignored value or class, zero_unlabelled, unknown_ignored. Can be "
        "repeated.",
    ),
]


@app.command()
def check(
    path: _PATH = None,
    images: _IMAGES = None,
    panoptic: _PANOPTIC = None,
    classes: _CLASSES = None,
    option: _OPTION = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Only read a COCO json of this layout: instances, lvis, captions or panoptic."),
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Check a registered dataset. Can be repeated.")
    ] = None,
    config: Annotated[
        str, typer.Option(metavar="FILE", help="Check DATASETS.TRAIN and DATASETS.TEST of a config.")
    ] = "",
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Open every image and label map, not some hundreds.")
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Contact sheet to draw (default: data_sheet.png).")
    ] = None,
) -> int:
    """Print classes, counts, sizes and suspicious annotations, and draw a contact sheet.

    The exit status is 1 if anything is refused. Every training and evaluation checks its data, too.
    """
    if path is None and not dataset and not config:
        raise typer.BadParameter("name a PATH, --dataset or --config")
    if kind not in (None, "instances", "lvis", "captions", "panoptic"):
        raise typer.BadParameter(f"--kind {kind}: expected instances, lvis, captions or panoptic")
    from clipdense.data.datasets.recognise import Hints
    from clipdense.run.data_check import check_path, check_registered

    faulty = False
    if path is not None:
        hints = Hints(images, panoptic, classes, tuple(option or ()))
        found = check_path(path, hints, kind=kind, thorough=thorough, sheet=sheet or Path("data_sheet.png"))  # type: ignore[arg-type]
        print("\n".join(found.lines))
        faulty = found.faulty
    if dataset or config:
        found = check_registered(dataset or (), config, thorough=thorough)
        print("\n".join(found.lines))
        faulty |= found.faulty
    return int(faulty)


@app.command()
def split(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="As for check.")],
    fraction: Annotated[float, typer.Option(help="Share of the training images, between 0 and 1.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the random choice.")] = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder to write (default: that of the data).")
    ] = None,
    images: _IMAGES = None,
    panoptic: _PANOPTIC = None,
    classes: _CLASSES = None,
    option: _OPTION = None,
) -> None:
    """Split data into training and validation at random, in the same format; images are not copied."""
    from clipdense.data.datasets.recognise import Hints
    from clipdense.run.data_check import split_path

    hints = Hints(images, panoptic, classes, tuple(option or ()))
    print("\n".join(split_path(path, hints, fraction=fraction, seed=seed, output=output)))
