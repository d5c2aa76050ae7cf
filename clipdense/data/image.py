"""Readers of image files and label maps of any kind.

Files are opened by an allow-list of formats: Pillow hands PostScript files to an interpreter, which executes
them. The number of pixels is bounded before anything is decoded.
"""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from detectron2.utils.file_io import PathManager

__all__ = [
    "MAX_PIXELS",
    "BadImageError",
    "BadSampleError",
    "ImageFormat",
    "ImageSource",
    "Orientation",
    "array_to_image",
    "file_format",
    "header_size",
    "image_to_array",
    "load_image",
    "read_image",
    "read_labels",
]

ImageFormat = Literal["RGB", "BGR", "L"]
ImageSource = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]
Uint8 = npt.NDArray[np.uint8]
Orientation = Literal["auto", "apply", "ignore"]
"""What is done with the EXIF orientation of a photograph; "auto" follows the stated size of the image."""

MAX_PIXELS = 2**28
"""Default limit on the pixels of an image, 16384 x 16384: at most 1 GiB, at four bytes a pixel."""

_FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF"),
    *("DIB", "ICO", "PCX", "SGI", "TGA"),
)
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""

_pillow_limit = threading.Lock()


class BadImageError(OSError):
    """Error of an existing file that is not a readable image (damaged, truncated or of an unknown format)."""


class BadSampleError(BadImageError, ValueError):
    """Error of a sample whose caption or mask is damaged, or does not fit its image."""


def read_image(
    path: str | os.PathLike[str],
    format: ImageFormat = "RGB",
    *,
    size: tuple[int, int] | None = None,
    orientation: Orientation = "auto",
    max_pixels: int = MAX_PIXELS,
) -> Uint8:
    """Read an image of any mode as 8-bit colour, upright.

    Grey, palette and CMYK images are converted to colour. Transparent images get a white background, as in
    image viewers. 16-bit samples are scaled to 8 bits (v / 257). An animation gives its first frame.

    Args:
        path: of the file; JPEG, PNG, WebP, BMP, GIF, TIFF, PPM and some others, never PostScript.
        format: order of the channels.
        size: stated height and width in pixels, for ``orientation`` "auto".
        orientation: "apply" the EXIF orientation, as viewers and most annotation tools do; "ignore" it; or
            "auto": ignore it if only the pixels as stored have the stated size, else apply it.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        (H, W, 3) uint8 in the given channel order, or (H, W, 1) for ``"L"``.

    Raises:
        FileNotFoundError: If the file does not exist.
        BadImageError: If the file cannot be decoded as an image, is larger than ``max_pixels``, or holds
            samples that are NaN or infinite.
    """
    _check_format(format)
    image = _open(path, max_pixels)
    if orientation == "apply" or (orientation == "auto" and not _stored_as_stated(image, size)):
        image = _upright(image)
    try:
        return image_to_array(image, format)
    except ValueError as error:
        raise BadImageError(f"{path}: {error}") from error


def header_size(
    path: str | os.PathLike[str], orientation: Literal["apply", "ignore"] = "apply"
) -> tuple[int, int] | None:
    """Return (height, width) of an image from the file's header; None if it cannot be read.

    Args:
        path: of the file.
        orientation: whether the EXIF orientation is applied.
    """
    with (
        suppress(OSError, ValueError, SyntaxError, TypeError, IndexError, EOFError),
        PathManager.open(os.fspath(path), "rb") as file,
        _open_header(file) as image,
    ):
        return _size(image, orientation == "apply")
    return None


def file_format(path: str | os.PathLike[str]) -> str:
    """Return Pillow's name of an image file's format ("PNG", "JPEG" ...), from the file's header.

    Raises:
        FileNotFoundError: If the file does not exist.
        BadImageError: If it is not an image of an accepted format.
    """
    with _decoding(path), PathManager.open(os.fspath(path), "rb") as file, _open_header(file) as image:
        return str(image.format)


def load_image(source: ImageSource, format: ImageFormat = "RGB", *, max_pixels: int = MAX_PIXELS) -> Uint8:
    """Load an image from a file, a PIL image or an array, as `read_image` returns it.

    Args:
        source: a file, a PIL image of any mode (its EXIF orientation is applied), or an array (see
            `array_to_image`).
        format: order of the channels.
        max_pixels: larger files are refused before they are decoded.

    Raises:
        FileNotFoundError: If the file does not exist.
        BadImageError: If the source cannot be decoded as an image, or a file is larger than ``max_pixels``.
        ValueError: If an array is not an image, see `array_to_image`.
    """
    if isinstance(source, np.ndarray):
        return image_to_array(array_to_image(source), format)
    if isinstance(source, Image.Image):
        with _decoding(getattr(source, "filename", "") or "the PIL image"):
            source.load()
        return image_to_array(_upright(source), format)
    return read_image(source, format, max_pixels=max_pixels)


def array_to_image(array: npt.NDArray[Any]) -> Image.Image:
    """Convert an array to an 8-bit PIL image.

    Args:
        array: (H, W), (H, W, 1) grey, (H, W, 3) RGB or (H, W, 4) RGBA; bool (black and white), uint8, uint16
            (scaled by v / 257), or floats in 0 to 1 or, if a value exceeds 1, in 0 to 255.

    Raises:
        ValueError: If the shape or type differs, or there are no pixels, negative or non-finite values.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)) or not array.size:
        raise ValueError(
            f"an image array must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), not {array.shape}"
        )
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16 or np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0:
            raise ValueError("an image array has values that are negative or not finite")
        array = _scaled_to_8_bit(array)
    elif array.dtype != np.uint8:
        raise ValueError(f"an image array must have type uint8, uint16, bool or float, not {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def image_to_array(image: Image.Image, format: ImageFormat = "RGB") -> Uint8:
    """Convert a PIL image of any mode as `read_image` does, without applying the EXIF orientation.

    Raises:
        ValueError: If the format is unknown, or samples are NaN or infinite.
    """
    _check_format(format)
    image = _to_8_bit(image)
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow does not convert to colour
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if format == "L":
        return np.array(image.convert("L"))[:, :, None]
    pixels = np.array(image.convert("RGB"))
    return pixels if format == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1])


def read_labels(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.int64]:
    """Read a label map (H, W): grey values of 1, 8, 16 or 32 bits, palette indices, or panoptic ids.

    Panoptic ids are R + 256 G + 65536 B of colour images. A 1-bit map has the labels 0 and 1.

    Raises:
        FileNotFoundError: If the file does not exist.
        BadImageError: If the file cannot be decoded as an image, is larger than ``max_pixels``, or has
            another mode.
    """
    image = _open(path, max_pixels)
    if image.mode in ("LA", "La", "CMYK", "YCbCr", "LAB", "HSV"):
        raise BadImageError(
            f"{path}: a label map of mode {image.mode}; expected grey values, palette indices or RGB ids"
        )
    samples = np.array(image)  # of a 1-bit image: False and True, which are the classes 0 and 1
    if not np.isfinite(samples).all() or (samples != np.floor(samples)).any():
        raise BadImageError(f"{path}: a label map with values that are not whole numbers")
    labels = samples.astype(np.int64)
    if labels.ndim == 3:
        labels = labels[..., 0] + 256 * labels[..., 1] + 65536 * labels[..., 2]
    return labels


def _check_format(format: str) -> None:
    if format not in ("RGB", "BGR", "L"):
        raise ValueError(f"image format {format!r}: expected RGB, BGR or L (INPUT.FORMAT)")


@cache
def _known_formats() -> tuple[str, ...]:
    """Return the accepted formats that this Pillow can open."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open_header(file: Any) -> Image.Image:
    """Open an image of an accepted format without decoding it, whatever its size."""
    with _pillow_limit:  # Pillow has one limit for the whole program, below ours
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=_known_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _open(path: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    """Open and decode a PIL image."""
    with _decoding(path), PathManager.open(os.fspath(path), "rb") as file:
        image = _open_header(file)
        if image.width * image.height > max_pixels:
            raise BadImageError(
                f"{path}: {image.width} x {image.height} are more than {max_pixels} pixels; resize the "
                "image, or raise INPUT.MAX_PIXELS"
            )
        image.load()
        return image


def _size(image: Image.Image, upright: bool) -> tuple[int, int]:
    """Return (height, width) as stored, or upright."""
    if upright:
        with suppress(OSError, ValueError, SyntaxError, KeyError, TypeError, ZeroDivisionError):
            if image.getexif().get(ExifTags.Base.Orientation) in _TURNED:
                return image.width, image.height
    return image.height, image.width


def _stored_as_stated(image: Image.Image, size: tuple[int, int] | None) -> bool:
    """Return whether the pixels have the stated size as stored, and would have another one upright."""
    return size is not None and _size(image, False) == tuple(size) != _size(image, True)


@contextmanager
def _decoding(name: str | os.PathLike[str]) -> Iterator[None]:
    """Convert Pillow's errors on a damaged image to a `BadImageError` that names the file."""
    try:
        with warnings.catch_warnings():
            # large photographs are legitimate; beyond twice its limit Pillow raises an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except (FileNotFoundError, BadImageError):
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(
            f"{name}: not an image, or of a format that is not accepted; convert it to PNG or JPEG"
        ) from error
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
            f"{name}: cannot be decoded, the file is damaged or truncated ({error})"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    # with a damaged EXIF block, the pixels are used as stored
    with suppress(ValueError, TypeError, SyntaxError, KeyError, ZeroDivisionError):
        image = ImageOps.exif_transpose(image)
    return image


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Convert grey images of 16 or 32 bits, or of floats, to 8-bit grey."""
    if not image.mode.startswith(("I", "F")):
        return image
    samples = np.array(image)
    if not np.isfinite(samples).all():
        raise ValueError("an image with samples that are NaN or infinite")
    return Image.fromarray(_scaled_to_8_bit(samples))


def _scaled_to_8_bit(samples: npt.NDArray[Any]) -> Uint8:
    """Scale samples of 16 or 32 bits, or floats in 0 to 1 or a wider range, to 0 to 255."""
    values, top = samples.astype(np.float64), float(samples.max(initial=0))
    floats = np.issubdtype(samples.dtype, np.floating)
    if floats and top <= 1:
        scale = 255.0
    elif floats or top > 65535:
        scale = 255.0 / max(top, 255.0)
    else:
        scale = 1 / 257
    return np.rint(values * scale).clip(0, 255).astype(np.uint8)
