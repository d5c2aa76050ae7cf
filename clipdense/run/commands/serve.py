"""``clipdense serve``: the web page."""

from __future__ import annotations

from typing import Annotated

import typer


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:PRETRAINED",
            help="open_clip model to offer besides the embedded ones, with a tag or a weight file, such as "
            "ViT-B-16-quickgelu:openai. Can be repeated; the first one is loaded at the start.",
        ),
    ] = None,
    config: Annotated[
        str, typer.Option(metavar="FILE", help="Config of a trained model to offer, .yaml or .py.")
    ] = "",
    weights: Annotated[
        str,
        typer.Option(metavar="FILE", help="Weights of that model (default: MODEL.WEIGHTS of the config)."),
    ] = "",
    method: Annotated[
        str,
        typer.Option(
            help="Training-free method of each --model, such as naclip (default: sclip; maskclip for a CLIP "
            "without a ViT)."
        ),
    ] = "",
    device: Annotated[
        str | None, typer.Option(help="Device of the models, such as cpu or cuda:1 (default: a GPU if any).")
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. 0.0.0.0 opens the page to your networks; it has no password."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    max_images: Annotated[int, typer.Option(min=1, help="Images of a request.")] = 8,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Size of an uploaded file.")] = 20,
    max_megapixels: Annotated[int, typer.Option(min=1, help="Size of an image, in millions of pixels.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in the queue; others are refused.")] = 16,
) -> None:
    """Serve a web page: drop images, type words, see where they are.

    It works at once with the CLIPs that come with the package, which know coloured shapes. Only this
    machine can open the page unless --host says otherwise. It sends nothing to other servers.
    """
    from clipdense.run.web.server import check_port
    from clipdense.run.web.server import serve as serve_page

    check_port(host, port)  # before the imports that take seconds
    from clipdense.run.web.limits import Limits
    from clipdense.run.web.models import served_models

    limits = Limits(
        images=max_images, megabytes=max_megabytes, megapixels=max_megapixels, waiting=max_waiting
    )
    serve_page(served_models(model or (), config, weights, method, device), limits, host=host, port=port)
