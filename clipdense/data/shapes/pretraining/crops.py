"""Captioned crops of annotated scenes."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from clipdense.data.shapes.captions import phrase
from clipdense.data.shapes.draw import Rng
from clipdense.data.shapes.world import CLASSES, GROUNDS

CONTENT_SIZE = len(CLASSES) + 2 * len(GROUNDS)
"""Length of a content vector: count of each named class | named grounds (0/1) | visible grounds (0/1)."""

_MIN_VISIBLE = 0.4
_MAX_NAMED = 4


@dataclass(frozen=True)
class CaptionedCrop:
    """A crop with its captions and their content.

    Attributes:
        image: (S, S, 3) uint8 RGB.
        caption: caption of the crop.
        paraphrase: second caption of the same content, with its own choice of words and order of things.
        content: (`CONTENT_SIZE`,) uint8 content vector.
    """

    image: npt.NDArray[np.uint8]
    caption: str
    paraphrase: str
    content: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class AnnotatedThing:
    """A thing of a scene.

    Attributes:
        category: class id, 0..79.
        box: tight box (x0, y0, x1, y1) in pixels.
        visible: visible share of the whole object, 0..1.
    """

    category: int
    box: tuple[float, float, float, float]
    visible: float


class CropSampler:
    """Sampler of captioned crops from annotated scenes.

    Args:
        size: side of a crop in pixels.
        object_share: share of crops around one thing, with context or letterboxed in black.
        window_share: share of windows with several things. A window is one to two times as wide as a crop,
            and at most as wide as the scene. All other crops contain only ground, if there is room.
    """

    def __init__(self, size: int, object_share: float, window_share: float) -> None:
        self.size, self.object_share, self.window_share = size, object_share, window_share

    def __call__(
        self,
        image: npt.NDArray[np.uint8],
        ground: npt.NDArray[np.uint8],
        things: list[AnnotatedThing],
        rng: Rng,
    ) -> CaptionedCrop:
        """Draw one crop of a scene.

        Args:
            image: (H, W, 3) uint8 RGB.
            ground: (H, W) uint8 ground ids; 255 at pixels of things.
            things: things of the scene.
            rng: random numbers.

        Returns:
            The crop, flipped horizontally with probability 0.5.
        """
        kind = rng.uniform(0, 1)
        clear = [t for t in things if t.visible >= _MIN_VISIBLE]
        if kind < self.object_share and clear:
            return self._object(image, ground, clear[rng.integer(0, len(clear) - 1)], rng)
        if kind < self.object_share + self.window_share:
            return self._window(image, ground, clear, rng)
        return self._ground(image, ground, things, rng)

    def _object(
        self, image: npt.NDArray[np.uint8], ground: npt.NDArray[np.uint8], thing: AnnotatedThing, rng: Rng
    ) -> CaptionedCrop:
        x0, y0, x1, y1 = thing.box
        width, height = x1 - x0, y1 - y0
        zoom = rng.uniform(1.0, 1.8)
        letterbox = rng.uniform(0, 1) < 0.4
        w, h = (width * zoom, height * zoom) if letterbox else (max(width, height) * zoom,) * 2
        slack = 0.5 * (zoom - 1.0) + 0.06
        cx = (x0 + x1) / 2 + rng.uniform(-slack, slack) * width
        cy = (y0 + y1) / 2 + rng.uniform(-slack, slack) * height
        window = _clip_window(cx, cy, w, h, image.shape, shrink=letterbox)
        return self._finish(image, ground, window, [thing.category], rng)

    def _window(
        self,
        image: npt.NDArray[np.uint8],
        ground: npt.NDArray[np.uint8],
        things: list[AnnotatedThing],
        rng: Rng,
    ) -> CaptionedCrop:
        whole = min(image.shape[:2])
        side = rng.uniform(min(self.size, whole), min(2 * self.size, whole))
        # Centre the window near a thing, because most of the scene is ground.
        anchor = things[rng.integer(0, len(things) - 1)].box if things else (0.0, 0.0, *image.shape[1::-1])
        cx = (anchor[0] + anchor[2]) / 2 + rng.uniform(-0.4, 0.4) * side
        cy = (anchor[1] + anchor[3]) / 2 + rng.uniform(-0.4, 0.4) * side
        window = _clip_window(cx, cy, side, side, image.shape, shrink=False)
        inside = []
        for thing in things:
            x0, y0, x1, y1 = thing.box
            shown = max(0.0, min(x1, window[2]) - max(x0, window[0])) * max(
                0.0, min(y1, window[3]) - max(y0, window[1])
            )
            if shown >= 0.6 * (x1 - x0) * (y1 - y0):
                inside.append(thing)
        inside.sort(key=lambda t: -(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]))
        named = [t.category for t in inside[:_MAX_NAMED]]
        return self._finish(image, ground, window, [named[i] for i in rng.permutation(len(named))], rng)

    def _ground(
        self,
        image: npt.NDArray[np.uint8],
        ground: npt.NDArray[np.uint8],
        things: list[AnnotatedThing],
        rng: Rng,
    ) -> CaptionedCrop:
        for _ in range(10):
            side = rng.uniform(0.12, 0.5) * min(image.shape[:2])
            cx, cy = rng.uniform(0, 1) * image.shape[1], rng.uniform(0, 1) * image.shape[0]
            x0, y0, x1, y1 = window = _clip_window(cx, cy, side, side, image.shape, shrink=False)
            if not any(t.box[0] < x1 and x0 < t.box[2] and t.box[1] < y1 and y0 < t.box[3] for t in things):
                return self._finish(image, ground, window, [], rng)
        return self._window(image, ground, [t for t in things if t.visible >= _MIN_VISIBLE], rng)

    def _finish(
        self,
        image: npt.NDArray[np.uint8],
        ground: npt.NDArray[np.uint8],
        window: tuple[int, int, int, int],
        named: list[int],
        rng: Rng,
    ) -> CaptionedCrop:
        x0, y0, x1, y1 = window
        counts = np.bincount(ground[y0:y1, x0:x1].ravel(), minlength=256)[: len(GROUNDS)]
        seen = [int(g) for g in np.argsort(-counts, kind="stable") if counts[g] > 0.1 * max(1, counts.sum())]
        grounds = [g for g in seen if not named or rng.uniform(0, 1) < 0.35]
        if not named and not grounds:  # one hardly visible thing fills the window
            grounds = [int(counts.argmax())]
        content = np.zeros(CONTENT_SIZE, np.uint8)
        np.add.at(content, named, 1)
        content[[len(CLASSES) + g for g in grounds]] = 1
        content[[len(CLASSES) + len(GROUNDS) + g for g in {*seen, *grounds}]] = 1
        crop = _resize_letterboxed(image[y0:y1, x0:x1], self.size)
        if rng.uniform(0, 1) < 0.5:
            crop = np.ascontiguousarray(crop[:, ::-1])
        caption, order = phrase(rng, named, grounds), rng.permutation(len(named))
        return CaptionedCrop(crop, caption, phrase(rng, [named[i] for i in order], grounds), content)


def _clip_window(
    cx: float, cy: float, width: float, height: float, shape: tuple[int, ...], shrink: bool
) -> tuple[int, int, int, int]:
    """Return a whole-pixel window, shifted into the image, or cut at its border if ``shrink``."""
    image_height, image_width = shape[:2]
    w, h = max(4, min(int(width + 0.5), image_width)), max(4, min(int(height + 0.5), image_height))
    x0, y0 = int(cx - w / 2 + 0.5), int(cy - h / 2 + 0.5)
    if not shrink:
        x0, y0 = min(max(x0, 0), image_width - w), min(max(y0, 0), image_height - h)
        return x0, y0, x0 + w, y0 + h
    x0, y0 = min(max(x0, 0), image_width - 4), min(max(y0, 0), image_height - 4)
    return x0, y0, max(x0 + 4, min(x0 + w, image_width)), max(y0 + 4, min(y0 + h, image_height))


def _resize_letterboxed(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Resize the longest side to ``size`` and centre the image on a black square."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    mode = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = cv2.resize(image, (new_width, new_height), interpolation=mode)
    if (new_height, new_width) == (size, size):
        return resized.astype(np.uint8, copy=False)
    canvas = np.zeros((size, size, 3), np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = resized
    return canvas
