"""Reading images and label maps of any kind from disk."""

import os
import warnings
from contextlib import suppress
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from detectron2.utils.file_io import PathManager

__all__ = ["BadImageError", "ImageFormat", "image_to_array", "read_image", "read_labels"]

ImageFormat = Literal["RGB", "BGR", "L"]
Uint8 = npt.NDArray[np.uint8]


class BadImageError(OSError):
    """A file is there but is no readable image (corrupt, truncated, of an unknown kind). Names the file."""


def read_image(path: str | os.PathLike[str], format: ImageFormat = "RGB") -> Uint8:
    """Read an image of any mode as 8-bit colour, upright.

    The EXIF orientation is applied. Grey and palette images become colour; CMYK is converted; transparent
    images are laid on white, as viewers show them; 16-bit samples are scaled to 8 bits (v / 257); of an
    animation the first frame is taken.

    Returns:
        (H, W, 3) uint8 in the given channel order, or (H, W, 1) for ``"L"``.

    Raises:
        FileNotFoundError: no such file.
        BadImageError: the file cannot be decoded as an image.
    """
    image = _open(path)
    # a damaged EXIF block says nothing about the pixels: they are taken as stored
    with suppress(ValueError, TypeError, SyntaxError, KeyError, ZeroDivisionError):
        image = ImageOps.exif_transpose(image)
    return image_to_array(image, format)


def image_to_array(image: Image.Image, format: ImageFormat = "RGB") -> Uint8:
    """A PIL image of any mode as `read_image` returns it (the EXIF orientation is not looked at)."""
    if format not in ("RGB", "BGR", "L"):
        raise ValueError(f"image format {format!r}: expected RGB, BGR or L (INPUT.FORMAT)")
    image = _to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if format == "L":
        return np.array(image.convert("L"))[:, :, None]
    pixels = np.array(image.convert("RGB"))
    return pixels if format == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1])


def read_labels(path: str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """Read a label map (H, W): grey values of 8, 16 or 32 bits, palette *indices*, or panoptic ids R + 256 G
    + 65536 B.

    Raises:
        FileNotFoundError: no such file.
        BadImageError: the file cannot be decoded as an image.
    """
    image = _open(path)
    if image.mode == "1":
        image = image.convert("L")
    labels = np.array(image).astype(np.int64)
    if labels.ndim == 3:
        labels = labels[..., 0] + 256 * labels[..., 1] + 65536 * labels[..., 2]
    return labels


def _open(path: str | os.PathLike[str]) -> Image.Image:
    """A fully decoded PIL image."""
    try:
        with PathManager.open(os.fspath(path), "rb") as file, warnings.catch_warnings():
            # a large photograph is no attack; beyond twice PIL's limit it raises and we name the file
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
            image.load()
            return image
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"{path}: not an image, or of a kind that Pillow does not know") from error
    # Pillow's decoders raise all of these on damaged files
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        TypeError,
        Image.DecompressionBombError,
    ) as error:
        raise BadImageError(
            f"{path}: cannot be decoded, the file is damaged or cut short ({error})"
        ) from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey images of 16 or 32 bits, or of floats, as 8-bit grey."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.array(image).astype(np.float64)
    if image.mode == "F" and values.size and values.max() <= 1:
        scale = 255.0  # floats in 0..1
    elif image.mode == "F" or values.max(initial=0) > 65535:
        scale = 255.0 / max(float(values.max(initial=0)), 255.0)
    else:
        scale = 1 / 257
    return Image.fromarray(np.rint(values * scale).clip(0, 255).astype(np.uint8))
