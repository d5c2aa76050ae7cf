"""``clipdense evaluate``: metrics of a trained model."""

from __future__ import annotations

from typing import Annotated

import typer

from clipdense.run.commands.train import OVERRIDES, run

app = typer.Typer()


@app.command(context_settings=OVERRIDES)
def evaluate(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="Config file, such as the config.yaml in the output folder of a training; configs of the "
            "package are found by name.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY VALUE", help="Config overrides, such as DATASETS.TEST \"('coco_2017_val',)\"."
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(metavar="FILE", help="Weights to evaluate (default: MODEL.WEIGHTS of the config).")
    ] = "",
    output: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for the results and pictures (OUTPUT_DIR).")
    ] = "",
    num_gpus: Annotated[int, typer.Option(min=1, help="GPUs of this machine.")] = 1,
) -> None:
    """Evaluate a trained model on its test datasets (DATASETS.TEST).

    Prints the metrics, and writes them to inference/results.json in the output folder.
    """
    run(config, overrides, weights, output, evaluate=True, num_gpus=num_gpus)
