"""Options of the commands that predict, and the run of ``clipdense segment``, ``detect`` and ``panoptic``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

_MODEL, _WORDS, _FILES = "Model", "Words", "Files"

Words = Annotated[
    str | None,
    typer.Option(
        "--words",
        "-w",
        rich_help_panel=_WORDS,
        help='Classes: "cat|kitten, red car" (bars separate synonyms, double quotes protect commas), '
        "or a class-list file (.txt, .json, .csv). Default: the classes of --config.",
    ),
]
Background = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_WORDS,
        help="Words for what is not wanted; it stays unlabelled. Default without --config: the usual "
        'surroundings of things (sky, wall, floor ...). "": none.',
    ),
]
Examples = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=IMAGE:x0,y0,x1,y1",
        rich_help_panel=_WORDS,
        help="An object in a picture that stands for a class, in place of its words. Can be repeated.",
    ),
]
ExampleWeight = Annotated[
    float,
    typer.Option(min=0, max=1, rich_help_panel=_WORDS, help="Share of the examples; the rest is the words'."),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        rich_help_panel=_WORDS,
        help="Leave out what scores less: none of these. Default: 0.5 for the detections of --config, "
        "else 0.",
    ),
]
ClassThresholds = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=SCORE", rich_help_panel=_WORDS, help="Threshold of one class. Can be repeated."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        rich_help_panel=_MODEL,
        help="CLIP that segments without training: shapes-rn (in the package; knows the shapes world), "
        "a model of open_clip such as ViT-B-16, or a weight file.",
    ),
]
Pretrained = Annotated[
    str,
    typer.Option(metavar="TAG|FILE", rich_help_panel=_MODEL, help="Weights of --model, such as openai."),
]
Method = Annotated[
    str,
    typer.Option(
        rich_help_panel=_MODEL,
        help="Training-free method: maskclip, sclip, clearclip, naclip, proxyclip ... Default: sclip "
        "for ViTs, maskclip for others.",
    ),
]
Config = Annotated[
    str,
    typer.Option(
        metavar="FILE|DIR",
        rich_help_panel=_MODEL,
        help="A trained model instead of a CLIP: its config, or the output folder of its training.",
    ),
]
Weights = Annotated[str, typer.Option(metavar="FILE", rich_help_panel=_MODEL, help="Weights of --config.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel=_MODEL,
        help="Config key, such as MODEL.ZERO_SHOT.PAMR_STEPS=10. Can be repeated.",
    ),
]
Device = Annotated[
    str, typer.Option(rich_help_panel=_MODEL, help="cpu, cuda ... Default: a GPU if there is one.")
]
Recursive = Annotated[bool, typer.Option(rich_help_panel=_FILES, help="Read the subfolders of folders.")]
Tile = Annotated[
    int,
    typer.Option(
        min=0,
        rich_help_panel=_FILES,
        help="Predict larger images by overlapping tiles of this side in pixels, at full resolution.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(min=1, rich_help_panel=_FILES, help="Images in a batch; images of one size share a batch."),
]


def declare_prediction_arguments(kind: str, summary: str) -> Callable[..., int]:
    """Declare the arguments of a command that predicts one kind of output, and return its function.

    Args:
        kind: "semantic", "instances" or "panoptic".
        summary: first line of its help.
    """

    def command(
        images: Annotated[
            list[str],
            typer.Argument(
                metavar="IMAGES...",
                help="Files, folders, quoted globs, videos, camera:0, or URLs (with --allow-urls).",
            ),
        ],
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
            typer.Option(
                "--output",
                "-o",
                metavar="DIR",
                rich_help_panel=_FILES,
                help="Folder for the results; those of an earlier run are moved to old_1, old_2, ...",
            ),
        ] = Path("output/predictions"),
        save: Annotated[
            str,
            typer.Option(
                metavar="FORMATS",
                rich_help_panel=_FILES,
                help="Comma-separated: pictures, coco (results.json), labels (PNG label maps), panoptic, "
                "yolo, yolo-seg, csv, parquet (masks.parquet).",
            ),
        ] = "pictures,coco",
        recursive: Recursive = True,
        allow_urls: Annotated[
            bool,
            typer.Option("--allow-urls", rich_help_panel=_FILES, help="Download http and https inputs."),
        ] = False,
        tile: Tile = 0,
        batch_size: BatchSize = 1,
        max_frames: Annotated[
            int, typer.Option(min=0, rich_help_panel=_FILES, help="Frames of each video or camera; 0: all.")
        ] = 0,
    ) -> int:
        from clipdense.run.boundary import announce_imports

        announce_imports()
        from clipdense.run.file_jobs import FileJob, run_job

        job = FileJob(
            kind=kind,
            images=images,
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
            recursive=recursive,
            allow_urls=allow_urls,
            tile=tile,
            batch_size=batch_size,
            max_frames=max_frames,
        )
        return run_job(job)

    command.__doc__ = summary
    return command


def split_formats(text: str) -> tuple[str, ...]:
    """Return the formats of ``--save``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
