"""Import of mask-category pairs that are stored as crops with a painted background (OVSeg's released format).

The mask of such a crop is everything that does not have the background colour. It is recovered once, from
lossless files, and stored with the pair.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util

from clipdense.data.image import BadImageError, file_format, read_image
from clipdense.files import read_text

__all__ = ["BACKGROUND", "keyed_mask", "read_keyed_csv", "read_keyed_pair"]

BACKGROUND = (124, 116, 103)
"""RGB of the background in OVSeg's released crops: ImageNet's mean colour, rounded."""

LOSSLESS = ("BMP", "PNG", "PPM", "TIFF")
_COLUMNS = ("filepath", "title")


def read_keyed_csv(path: str | Path) -> list[tuple[str, str]]:
    """Read the rows (image file, noun) of a tab-separated file with the columns ``filepath`` and ``title``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a column is missing, or a row lacks an entry; names the line.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
        raise ValueError(f"{path}: no column {' and no column '.join(missing)} (tab-separated)")
    rows = []
    for row in reader:
        name, noun = (row[column] for column in _COLUMNS)
        if not name or not noun:
            raise ValueError(f"{path}, line {reader.line_num}: lacks filepath or title")
        rows.append((name, noun))
    return rows


def keyed_mask(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return the mask (H, W) of the pixels (H, W, 3) RGB whose colour differs from `BACKGROUND`."""
    return (pixels != np.array(BACKGROUND, np.uint8)).any(-1)


def read_keyed_pair(name: str, noun: str, image_root: str | Path) -> dict[str, Any] | None:
    """Read one crop as a pair, see `clipdense.data.mask_pairs.read_pairs`.

    Args:
        name: image file, relative to ``image_root``.
        noun: of the pair.
        image_root: folder of the images.

    Returns:
        The pair; None if the whole crop is background.

    Raises:
        FileNotFoundError: If the image does not exist.
        ValueError: If the file is not an image, or has a lossy format; names it.
    """
    path = os.path.join(image_root, name)
    try:
        if (found := file_format(path)) not in LOSSLESS:
            raise ValueError(
                f"{path} is a {found} file, a format that may change colours, so that its background, "
                f"RGB {BACKGROUND}, cannot be recognised. Import the original crops ({', '.join(LOSSLESS)})"
            )
        mask = keyed_mask(read_image(path, orientation="ignore"))
    except BadImageError as error:
        raise ValueError(str(error)) from error
    if not mask.any():
        return None
    code = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {
        "file_name": name,
        "height": mask.shape[0],
        "width": mask.shape[1],
        "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode()},
        "noun": noun,
    }
