"""``clipdense train``: training with a config."""

from __future__ import annotations

from argparse import Namespace
from typing import Annotated

import typer

app = typer.Typer()
# so that a value such as -1 is not taken for an option; setup names a key that does not exist
OVERRIDES = {"ignore_unknown_options": True}


@app.command(context_settings=OVERRIDES)
def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="Config file (.yaml, or .py, which is run as a program); configs of the package are found "
            "by name, such as shapes/denseclip_mask_rcnn_rn.yaml.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY VALUE",
            help="Config overrides, such as SOLVER.MAX_ITER 1000; key=value for a .py config.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in the output folder.")
    ] = False,
    weights: Annotated[str, typer.Option(metavar="FILE", help="Weights to start from (MODEL.WEIGHTS).")] = "",
    output: Annotated[str, typer.Option(metavar="DIR", help="Output folder (OUTPUT_DIR).")] = "",
    num_gpus: Annotated[
        int, typer.Option(min=1, help="GPUs of this machine; use torchrun for several machines.")
    ] = 1,
) -> None:
    """Train a model from a config.

    The output folder gets the checkpoints, the log, the metrics and pictures of predictions.
    """
    run(config, overrides, weights, output, resume=resume, num_gpus=num_gpus)


def run(
    config: str,
    overrides: list[str] | None,
    weights: str,
    output: str,
    *,
    resume: bool = False,
    evaluate: bool = False,
    num_gpus: int = 1,
) -> None:
    """Train or evaluate, with the options of a command in place of config overrides."""
    from clipdense.run.boundary import announce_imports

    announce_imports()
    from clipdense.run.training import run_arguments

    lazy = config.endswith(".py")
    keys = ("train.init_checkpoint", "train.output_dir") if lazy else ("MODEL.WEIGHTS", "OUTPUT_DIR")
    given = [(key, value) for key, value in zip(keys, (weights, output), strict=True) if value]
    options = (
        [f"{key}={value}" for key, value in given] if lazy else [word for pair in given for word in pair]
    )
    run_arguments(
        Namespace(
            config_file=config,
            opts=[*(overrides or ()), *options],
            resume=resume,
            eval_only=evaluate,
            num_gpus=num_gpus,
            num_machines=1,
            machine_rank=0,
            dist_url="auto",
        )
    )
