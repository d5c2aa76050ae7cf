"""``clipdense predict``: many images, in parts that can be interrupted and spread over a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipdense.run.commands.prediction import (
    Background,
    BatchSize,
    ClassThresholds,
    Config,
    Device,
    Examples,
    ExampleWeight,
    Method,
    Model,
    Overrides,
    Pretrained,
    Recursive,
    Threshold,
    Tile,
    Weights,
    Words,
    split_formats,
)

_FILES, _RUN = "Files", "Run"


def predict(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCES...",
            help="Folders, files, quoted globs, lists of images (COCO's .json, .jsonl, .txt), or webdataset "
            "shards (shards/{000..331}.tar).",
        ),
    ],
    kind: Annotated[
        str,
        typer.Option(
            help="semantic, instances or panoptic. Default: the first of panoptic, instances and "
            "semantic that the model has."
        ),
    ] = "",
    words: Words = None,
    background: Background = None,
    example: Examples = None,
    example_weight: ExampleWeight = 1.0,
    threshold: Threshold = None,
    class_threshold: ClassThresholds = None,
    model: Model = "shapes-rn",
    pretrained: Pretrained = "",
    method: Method = "",
    config: Config = "",
    weights: Weights = "",
    overrides: Overrides = None,
    device: Device = "",
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", rich_help_panel=_FILES, help="Folder of the run."),
    ] = Path("output/bulk"),
    save: Annotated[
        str,
        typer.Option(
            metavar="FORMATS",
            rich_help_panel=_FILES,
            help="Comma-separated: coco (results.json), parquet (masks.parquet), labels (PNG label maps), "
            "panoptic, yolo, yolo-seg, csv.",
        ),
    ] = "coco,parquet",
    image_root: Annotated[
        str,
        typer.Option(
            metavar="DIR", rich_help_panel=_FILES, help="Folder of the images of lists. Default: the list's."
        ),
    ] = "",
    recursive: Recursive = True,
    tile: Tile = 0,
    batch_size: BatchSize = 1,
    part_size: Annotated[
        int,
        typer.Option(
            min=1, rich_help_panel=_RUN, help="Images in a part, which is done as a whole or again."
        ),
    ] = 64,
    jobs: Annotated[int, typer.Option(min=1, rich_help_panel=_RUN, help="Processes on this machine.")] = 1,
    ray: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS|auto",
            rich_help_panel=_RUN,
            help="Run on a Ray cluster: HOST:PORT of its head, auto (the cluster of this machine), or local.",
        ),
    ] = "",
    actors: Annotated[
        int,
        typer.Option(
            min=0,
            rich_help_panel=_RUN,
            help="Largest number of models on the cluster. Default: one for each GPU, or for each CPU but "
            "one.",
        ),
    ] = 0,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", rich_help_panel=_RUN, help="Try the images of errors.jsonl again."),
    ] = False,
) -> int:
    """Predict on many images: resumable, on one machine or a Ray cluster.

    The same command continues an interrupted run. An image that fails does not end it: errors.jsonl lists it
    with its reason, and the exit status is 1.

    clipdense predict photos --words "red star, blue ring" --output output/bulk
    """
    from clipdense.run.boundary import announce_imports

    announce_imports()
    from clipdense.run.bulk import BulkJob, run_bulk_job
    from clipdense.run.execution import Execution

    job = BulkJob(
        kind=kind,
        sources=tuple(sources),
        words=words,
        background=background,
        examples=tuple(example or ()),
        example_weight=example_weight,
        threshold=threshold,
        class_thresholds=tuple(class_threshold or ()),
        model=model,
        pretrained=pretrained,
        method=method,
        config=config,
        weights=weights,
        overrides=tuple(overrides or ()),
        device=device,
        output=output,
        formats=split_formats(save),
        image_root=image_root,
        recursive=recursive,
        tile=tile,
        batch_size=batch_size,
        execution=Execution(jobs, ray, actors, part_size, retry_failed),
    )
    return run_bulk_job(job)
