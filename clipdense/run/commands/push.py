"""``clipdense push``: a trained model as a folder that others can use, on the hub or on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    run: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="Output folder of a training.")],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="Hub id (organisation/name), or the path of the folder to write."
        ),
    ],
    licence: Annotated[
        str, typer.Option(help="Licence of the weights: apache-2.0, mit, cc-by-nc-4.0, other ...")
    ],
    weights: Annotated[
        Path | None, typer.Option(help="Weight file; default: model_final.pth of the run.")
    ] = None,
    config_file: Annotated[Path | None, typer.Option(help="Config; default: config.yaml of the run.")] = None,
    command: Annotated[
        str, typer.Option(help="Command of the training, for the card; default: that of the run's log.")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Message of the commit on the hub.")] = "",
) -> None:
    """Write config, safetensors weights and a card of a trained model, and send them to the Hugging Face hub.

    Log in with `hf auth login` first. Only the files of the model are sent: no data, log or path of this
    machine.
    """
    from clipdense.run.hub_transfer import Push, push_model

    model = Push(run.expanduser(), licence, weights, config_file, command)
    place = push_model(model, target, private, message)
    print(f"The model is at {place}")
