"""``clipdense export``: a trained model, or a CLIP's tower, as an ONNX or .pt2 file."""

from __future__ import annotations

from typing import Annotated

import typer

from clipdense.run.commands.train import OVERRIDES

app = typer.Typer()


@app.command(context_settings=OVERRIDES)
def export(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="Config file; leave it out with --clip or --list.")
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY VALUE", help="Config overrides.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="File to write: .onnx or .pt2.")
    ] = "model.onnx",
    weights: Annotated[
        str, typer.Option(metavar="FILE", help="Weights to export (default: MODEL.WEIGHTS of the config).")
    ] = "",
    clip: Annotated[
        str,
        typer.Option(metavar="NAME", help="Export the dense map of this CLIP instead of a trained model."),
    ] = "",
    pretrained: Annotated[str, typer.Option(metavar="TAG", help="--clip: open_clip tag or file.")] = "",
    mode: Annotated[str, typer.Option(help="--clip: last-block mode of the dense map.")] = "plain",
    vocabulary: Annotated[
        str, typer.Option(help="Classes of --text-output: names, or a .txt or .json file.")
    ] = "",
    templates: Annotated[str, typer.Option(help="--clip: prompt templates of --text-output.")] = "single",
    text_output: Annotated[
        str,
        typer.Option(metavar="FILE", help="Write the classes as the text inputs of the file (.safetensors)."),
    ] = "",
    size: Annotated[
        tuple[int, int],
        typer.Option(metavar="HEIGHT WIDTH", help="Fixed size of the images in pixels; 0 0: any."),
    ] = (0, 0),
    all_boxes: Annotated[
        bool, typer.Option("--all-boxes", help="Detectors: leave the selection of detections to the caller.")
    ] = False,
    opset: Annotated[int, typer.Option(min=18, help="ONNX operator set.")] = 18,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare the ONNX file with eager execution.")
    ] = False,
    list_models: Annotated[
        bool, typer.Option("--list", help="Print what exports and what does not, and why.")
    ] = False,
) -> None:
    """Export a trained model, or the tower of a CLIP, to an ONNX file (or .pt2 for torch.export).

    Class names stay outside: the file reads their embeddings, so words change without a new export.
    """
    if list_models:
        from clipdense.run.export.families import support_table

        print(support_table())
        return
    if bool(config) == bool(clip):
        raise ValueError("give either a config file, or --clip and the name of a CLIP")
    from clipdense.run.export.api import export_model, export_tower

    if clip:
        report = export_tower(
            clip,
            output,
            pretrained=pretrained or None,
            mode=mode,
            templates=templates,
            vocabulary=vocabulary or None,
            fixed_size=size if any(size) else None,
            opset=opset,
            text_output=text_output or None,
            check=not no_check,
        )
    else:
        report = export_model(
            config,
            output,
            weights=weights or None,
            opts=overrides or (),
            select=not all_boxes,
            vocabulary=vocabulary or None,
            fixed_size=size if any(size) else None,
            opset=opset,
            text_output=text_output or None,
            check=not no_check,
        )
    print("\n".join(report.lines()))
