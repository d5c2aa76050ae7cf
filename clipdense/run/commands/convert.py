"""``clipdense convert``: published weights to safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="The published file.")],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The safetensors file to write.")],
    dataset: Annotated[
        str | None, typer.Option(help="Registered dataset whose classes the file must have.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Class names that the file must have: a .txt or .json file, or comma-separated names."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Config key that the tensors do not determine, if it differs from the released models, such "
            "as MODEL.CLIP.CONFIG.text_cfg.heads=4. Can be repeated.",
        ),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Open a pickle. It can run code: use it for trusted sources only."
        ),
    ] = False,
) -> None:
    """Convert published weights to safetensors that contain the config keys which they need.

    The file of a CLIP (OpenAI, EVA-CLIP, CLIPSelf) becomes one for MODEL.CLIP.NAME.
    """
    if dataset is not None and classes is not None:
        raise typer.BadParameter("give --dataset or --classes, not both")
    from clipdense.run.conversion import convert_and_describe

    lines = convert_and_describe(
        source, target, dataset=dataset, classes=classes, options=option or (), allow_pickle=allow_pickle
    )
    print("\n".join(lines))
