"""Images and crops padded to black squares, as CLIPSelf prepares them (Wu et al., ICLR 2024, section 3).

Resampling is Pillow's bicubic filter on 8-bit pixels.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["crop_box", "enlarge_box", "letterbox"]

Uint8 = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]


def letterbox(image: Uint8, size: int, centered: bool = False) -> tuple[Uint8, float]:
    """Resize the longest side to ``size`` and pad with black.

    Args:
        image: (H, W, 3) uint8.
        size: side of the result in pixels.
        centered: pad both sides of an axis (``(size - side) // 2`` pixels before the image) instead of only
            the right or bottom.

    Returns:
        (size, size, 3) uint8, and the scale from pixels of ``image`` to pixels of the result.
    """
    height, width = image.shape[:2]
    scale = size / max(height, width)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
    canvas = np.zeros((size, size, 3), np.uint8)
    top, left = ((size - new_height) // 2, (size - new_width) // 2) if centered else (0, 0)
    canvas[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return canvas, scale


def enlarge_box(box: Box, factor: float, image_size: tuple[int, int]) -> Box:
    """Scale a box about its centre and clip it to the image.

    Args:
        box: (x0, y0, x1, y1) in pixels.
        factor: scale of width and height.
        image_size: (H, W) in pixels.
    """
    x0, y0, x1, y1 = box
    dx, dy = (factor - 1) / 2 * (x1 - x0), (factor - 1) / 2 * (y1 - y0)
    height, width = image_size
    return max(x0 - dx, 0.0), max(y0 - dy, 0.0), min(x1 + dx, float(width)), min(y1 + dy, float(height))


def crop_box(image: Uint8, box: Box, size: int) -> Uint8:
    """Cut a box from an image and letterbox it, centred.

    Args:
        image: (H, W, 3) uint8.
        box: (x0, y0, x1, y1) in pixels, rounded to whole pixels as Pillow does (halves to even); at least
            one pixel of the image is cut.
        size: side of the result in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    height, width = image.shape[:2]
    x0, y0 = min(max(round(box[0]), 0), width - 1), min(max(round(box[1]), 0), height - 1)
    x1, y1 = max(min(round(box[2]), width), x0 + 1), max(min(round(box[3]), height), y0 + 1)
    return letterbox(np.ascontiguousarray(image[y0:y1, x0:x1]), size, centered=True)[0]
