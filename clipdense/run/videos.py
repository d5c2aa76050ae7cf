"""Videos and cameras, read and written one frame at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from clipdense.data.image import BadImageError
from clipdense.visualization.canvas import Picture

__all__ = ["Video", "VideoWriter"]

_USUAL_RATE = 25.0


class Video:
    """Frames of a video file or a camera.

    Args:
        source: file, or the number of a camera.

    Attributes:
        name: the file, or "camera:0".
        rate: frames per second.
        num_frames: number of frames, as the file says; 0 if it is not known.

    Raises:
        FileNotFoundError: If there is no such file.
        BadImageError: If the file or the camera cannot be opened.
    """

    def __init__(self, source: str | os.PathLike[str] | int) -> None:
        self.name = f"camera:{source}" if isinstance(source, int) else os.fspath(source)
        if not isinstance(source, int) and not os.path.isfile(source):
            raise FileNotFoundError(f"there is no video {self.name}")
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else self.name)
        if not self._capture.isOpened():
            kind = (
                "the camera cannot be opened" if isinstance(source, int) else "not a video that OpenCV reads"
            )
            raise BadImageError(f"{self.name}: {kind}")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if np.isfinite(rate) and 0 < rate <= 1000 else _USUAL_RATE
        self.num_frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the frames, (H, W, 3) uint8 RGB; the video is closed at the end."""
        try:
            while True:
                read, frame = self._capture.read()
                if not read:
                    return
                yield np.ascontiguousarray(frame[:, :, ::-1])
        finally:
            self._capture.release()


class VideoWriter:
    """Video file (MPEG-4) that takes frames of one size.

    Args:
        path: file to write.
        rate: frames per second.
    """

    def __init__(self, path: str | os.PathLike[str], rate: float) -> None:
        self.path, self._rate = os.fspath(path), rate
        self._writer: Any = None
        self._size: tuple[int, int] = (0, 0)

    def add(self, picture: Picture) -> None:
        """Write a frame (H, W, 3) uint8 RGB; later frames are cut or padded to the size of the first.

        Raises:
            OSError: If the file cannot be written.
        """
        if self._writer is None:
            # codecs of this kind need even sides
            self._size = (picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2)
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(self.path, code, self._rate, self._size[::-1])
            if not self._writer.isOpened():
                raise OSError(f"cannot write the video {self.path}")
        frame = np.full((*self._size, 3), 255, np.uint8)
        part = picture[: self._size[0], : self._size[1]]
        frame[: part.shape[0], : part.shape[1]] = part
        self._writer.write(np.ascontiguousarray(frame[:, :, ::-1]))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.release()
