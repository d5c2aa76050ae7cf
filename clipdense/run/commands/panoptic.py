"""``clipdense panoptic``: objects and ground together."""

from __future__ import annotations

from clipdense.run.commands.prediction import declare_prediction_arguments

panoptic = declare_prediction_arguments(
    "panoptic",
    """Segment objects and ground together.

    Give a trained panoptic model in --config. Without it, objects are the connected areas of a segmentation
    by
    CLIP: two objects of a class that touch are one.
    """,
)
