"""A stand-in for OpenCV's camera, whose frames do not end."""

from typing import Any

import cv2
import numpy as np
import pytest

from tests.helpers.bright_box import scene


class Camera:
    """What ``cv2.VideoCapture(0)`` returns: it knows neither its rate nor its number of frames.

    Attributes:
        interrupt_after: number of frames after which Ctrl-C is pressed; None: never.
        opened: every camera that was opened.
    """

    interrupt_after: int | None = None
    opened: list["Camera"]

    def __init__(self, number: int) -> None:
        self.number, self.frames, self.released = number, 0, False
        self.opened.append(self)

    def isOpened(self) -> bool:
        return self.number == 0

    def get(self, key: int) -> float:
        return {cv2.CAP_PROP_FPS: 0.0, cv2.CAP_PROP_FRAME_COUNT: -1.0}[key]

    def read(self) -> tuple[bool, np.ndarray]:
        if self.frames == self.interrupt_after:
            raise KeyboardInterrupt
        self.frames += 1
        return True, np.ascontiguousarray(scene()[:, :, ::-1])

    def release(self) -> None:
        self.released = True


def use_camera(monkeypatch: pytest.MonkeyPatch) -> type[Camera]:
    """Put `Camera` in place of OpenCV's captures of cameras; videos are read as before."""
    real = cv2.VideoCapture

    def capture(source: Any) -> Any:
        return Camera(source) if isinstance(source, int) else real(source)

    Camera.opened, Camera.interrupt_after = [], None
    monkeypatch.setattr("clipdense.run.videos.cv2.VideoCapture", capture)
    return Camera
