"""Conversion of many files in threads, and atomic writing of images."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from clipdense.files import atomic_path

__all__ = ["map_in_threads", "save_image"]

_FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".tif": {"format": "TIFF", "compression": "tiff_lzw"},
}


def map_in_threads(run: Callable[[Path], None], paths: Sequence[Path], title: str) -> int:
    """Call a function on every path in threads, with a progress bar; return the number of paths.

    The first error stops all threads.
    """
    with ThreadPoolExecutor() as pool:
        try:
            list(tqdm(pool.map(run, paths), desc=title, total=len(paths), unit="file"))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(paths)


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image atomically, in the format of the suffix (.png, .jpg or .tif)."""
    with atomic_path(path) as partial:
        image.save(partial, **_FORMATS[path.suffix])
