"""Nano models of configs/shapes with random heads, their vocabularies and images."""

from typing import Any

import torch

from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.build import build_model
from clipdense.run.setup import load_config

__all__ = ["nano_model", "noise_image"]

_NAMES = [
    f"{colour} {shape}" for colour in ("red", "green", "blue", "white") for shape in ("ball", "cube", "ring")
]


def noise_image(height: int, width: int) -> dict[str, Any]:
    """Return Detectron2's input of an image of noise."""
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": pixels, "height": height, "width": width}


def nano_model(config: str, classes: int = 6, *overrides: Any) -> Any:
    """Build the model of configs/shapes/<config>.yaml on the CPU; the same weights each time.

    Args:
        config: name of the config.
        classes: number of classes to predict, up to 12; 0 leaves the model in training mode.
        overrides: keys and values.
    """
    torch.manual_seed(0)
    words = ["MODEL.DEVICE", "cpu", *map(str, overrides)]
    model: Any = build_model(load_config(f"shapes/{config}.yaml", words))
    if classes:
        names = tuple((name,) for name in _NAMES[:classes])
        model.eval().set_vocabulary(Vocabulary(names, base=tuple(i % 2 == 0 for i in range(classes))))
    return model
