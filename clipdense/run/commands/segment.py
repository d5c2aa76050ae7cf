"""``clipdense segment``: a class for each pixel."""

from __future__ import annotations

from clipdense.run.commands.prediction import declare_prediction_arguments

segment = declare_prediction_arguments(
    "semantic",
    """Segment images into the classes of words.

    Without --config, a CLIP does it without any training; the one in the package knows coloured shapes:

    clipdense segment scene.png --words "red star, blue ring"
    """,
)
