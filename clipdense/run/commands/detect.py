"""``clipdense detect``: boxes and masks of objects."""

from __future__ import annotations

from clipdense.run.commands.prediction import declare_prediction_arguments

detect = declare_prediction_arguments(
    "instances",
    """Find the objects of words: boxes, masks and scores.

    Give a trained detector in --config. Without it, objects are the connected areas of a segmentation by
    CLIP: two objects of a class that touch are one.
    """,
)
