"""``clipdense pull``: a model folder from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pull(
    name: Annotated[str, typer.Argument(help="Hub id (organisation/name), or the path of a model folder.")],
    folder: Annotated[Path, typer.Argument(help="New folder for its files.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: main.")] = None,
) -> None:
    """Copy a model from the Hugging Face hub into a folder, after a check of its config and weights."""
    from clipdense.run.hub_transfer import pull_model

    pulled = pull_model(name, folder, revision)
    print(f"The model is in {pulled.path}. In Python: clipdense.Predictor.from_pretrained({str(folder)!r})")
