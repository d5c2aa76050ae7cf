"""Images on a black square. Pixels against the reference: tests/parity/test_clipself_training.py."""

import numpy as np
import pytest

from clipdense.data.letterbox import crop_box, enlarge_box, letterbox

WHITE = np.full((30, 50, 3), 255, np.uint8)


def extent(image: np.ndarray) -> tuple[int, int, int, int]:
    """Rows and columns that are not black: first and one past the last."""
    rows, columns = image.any((1, 2)).nonzero()[0], image.any((0, 2)).nonzero()[0]
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


@pytest.mark.parametrize(("centered", "rows"), [(False, (0, 60)), (True, (20, 80))])
def test_longest_side_fills_the_square(centered: bool, rows: tuple[int, int]) -> None:
    canvas, scale = letterbox(WHITE, 100, centered)
    assert canvas.shape == (100, 100, 3) and canvas.dtype == np.uint8
    assert scale == 2.0 and extent(canvas) == (*rows, 0, 100)


def test_sides_are_rounded_and_at_least_a_pixel() -> None:
    assert extent(letterbox(np.full((3, 7, 3), 255, np.uint8), 16)[0]) == (0, 7, 0, 16)  # 6.86
    assert extent(letterbox(np.full((1, 999, 3), 255, np.uint8), 16)[0])[:2] == (0, 1)


def test_boxes_grow_around_their_centre_and_stay_inside() -> None:
    assert enlarge_box((20, 10, 28, 14), 1.5, (30, 50)) == (18, 9, 30, 15)
    assert enlarge_box((0, 0, 50, 29), 1.5, (30, 50)) == (0, 0, 50, 30)
    assert enlarge_box((1, 2, 3, 4), 1.0, (30, 50)) == (1, 2, 3, 4)


def test_crops_round_halves_to_even() -> None:
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(crop_box(image, (0.5, 2.4, 2.5, 3.6), 2), image[2:4, 0:2])


@pytest.mark.parametrize("box", [(3.2, 3.2, 3.4, 3.4), (7.9, 7.9, 8.0, 8.0), (-5, 0, 0, 8)])
def test_no_crop_is_empty(box: tuple[float, float, float, float]) -> None:
    assert crop_box(np.full((8, 8, 3), 9, np.uint8), box, 4).any()
