"""What a user names as input: files, folders, globs, URLs, videos and cameras."""

from __future__ import annotations

import glob
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

__all__ = ["VIDEO_SUFFIXES", "Inputs", "camera_number", "download", "find_inputs", "is_url"]

VIDEO_SUFFIXES = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"))
_MAX_DOWNLOAD = 2**28
_TIMEOUT = 30  # seconds


@dataclass
class Inputs:
    """Files to predict on.

    Attributes:
        images: image files, each once, in the order in which they were named.
        videos: video files.
        cameras: numbers of cameras.
        skipped: number of files in folders that are neither images nor videos.
        failed: input -> why it has no image.
    """

    images: list[Path] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    cameras: list[int] = field(default_factory=list)
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images) + len(self.videos) + len(self.cameras)


def find_inputs(
    names: Iterable[str],
    *,
    recursive: bool = True,
    allow_urls: bool = False,
    downloads: str | os.PathLike[str] = "",
) -> Inputs:
    """Find the images and videos of files, folders, globs, URLs and cameras.

    Args:
        names: files; folders; globs (``**`` for any subfolders); ``http://`` and ``https://`` URLs;
            ``camera:0``.
        recursive: whether to look into the subfolders of folders. Hidden files are never read.
        allow_urls: whether to download URLs; otherwise one is listed as failed.
        downloads: folder for downloaded files.

    Returns:
        What was found. A named file is always taken, whatever its ending.
    """
    found, images, videos = Inputs(), dict[Path, None](), dict[Path, None]()
    readable = _image_suffixes()
    for name in names:
        if (camera := camera_number(name)) is not None:
            found.cameras.append(camera)
            continue
        if is_url(name):
            try:
                matches = [download(name, downloads)] if allow_urls else []
                why = "URLs are not downloaded unless allowed (--allow-urls)"
            except OSError as error:
                matches, why = [], str(error)
        else:
            matches, why = _files(Path(name).expanduser(), recursive, readable, found)
        if not matches:
            found.failed[name] = why
        videos.update(dict.fromkeys(match for match in matches if match.suffix.lower() in VIDEO_SUFFIXES))
        images.update(dict.fromkeys(match for match in matches if match.suffix.lower() not in VIDEO_SUFFIXES))
    found.images, found.videos = list(images), list(videos)
    return found


def camera_number(name: str) -> int | None:
    """Return 0 for "camera:0" or "webcam:0", None for any other input."""
    match = re.fullmatch(r"(?:camera|webcam):(\d+)", name)
    return int(match[1]) if match else None


def is_url(name: str) -> bool:
    """Return whether an input is a URL of the web."""
    return name.startswith(("http://", "https://"))


def download(url: str, folder: str | os.PathLike[str]) -> Path:
    """Download a picture or video of at most 256 MiB.

    Args:
        url: http or https.
        folder: where to write it.

    Raises:
        OSError: If it cannot be downloaded, or is too large; the message names the URL.
    """
    stem = re.sub(r"[^\w.-]+", "_", os.path.basename(urllib.parse.urlparse(url).path)) or "download"
    path = Path(folder, stem)
    number = 1
    while path.exists():
        number += 1
        path = Path(folder, f"{number}_{stem}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "clipdense"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            if int(answer.headers.get("Content-Length") or 0) > _MAX_DOWNLOAD:
                raise OSError(f"{url} is larger than {_MAX_DOWNLOAD >> 20} MiB")
            content = answer.read(_MAX_DOWNLOAD + 1)
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise OSError(f"{url} cannot be downloaded: {getattr(error, 'reason', error)}") from error
    if len(content) > _MAX_DOWNLOAD:
        raise OSError(f"{url} is larger than {_MAX_DOWNLOAD >> 20} MiB")
    path.write_bytes(content)
    return path


def _files(path: Path, recursive: bool, readable: set[str], found: Inputs) -> tuple[list[Path], str]:
    """Return the files of one input, and why there are none; count what is skipped."""
    if path.is_dir():
        files = sorted(path.rglob("*") if recursive else path.iterdir())
        files = [f for f in files if f.is_file() and not _is_hidden(f.relative_to(path))]
        kept = [f for f in files if f.suffix.lower() in readable | VIDEO_SUFFIXES]
        found.skipped += len(files) - len(kept)
        return kept, "a folder without images"
    if path.is_file():
        return [path], ""
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    return [match for match in matches if match.is_file()], "there is no such file"


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _image_suffixes() -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
