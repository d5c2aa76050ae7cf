"""Sliding windows: pointwise functions, edges, batches, cells and the memory limit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.inference import cut_windows, fold_windows, slide_windows, window_starts


def images(batch: int = 2, height: int = 37, width: int = 52) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def pointwise(x: Tensor) -> Tensor:
    return torch.stack([x.sum(1), x[:, 0] * x[:, 1], x[:, 2] ** 2], dim=1)


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [(10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 7]), (4, 4, 2, [0]), (3, 8, 4, [0])],
)
def test_the_last_window_ends_at_the_edge(length: int, window: int, stride: int, expected: list[int]) -> None:
    assert window_starts(length, window, stride) == expected


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), ((20, 52), (9, 52)), (64, 32), (1, 1)])
def test_windows_of_a_pointwise_function_equal_the_whole_image(window, stride) -> None:
    folded = slide_windows(pointwise, images(), window, stride, batch_size=5)
    torch.testing.assert_close(folded, pointwise(images()))


def test_overlapping_windows_are_averaged() -> None:
    """Each window returns its own mean: pixels of two windows have the mean of two means."""
    row = torch.arange(6.0).view(1, 1, 1, 6)
    folded = slide_windows(lambda x: x.mean((2, 3), keepdim=True).expand_as(x), row, (1, 4), (1, 2))
    assert folded.flatten().tolist() == [1.5, 1.5, 2.5, 2.5, 3.5, 3.5]


def test_small_maps_are_resized_to_their_windows() -> None:
    folded = slide_windows(lambda x: F.avg_pool2d(x, 4), images(1, 32, 32), 32, 32)
    expected = F.interpolate(F.avg_pool2d(images(1, 32, 32), 4), (32, 32), mode="bilinear")
    torch.testing.assert_close(folded, expected)


def test_features_are_folded_in_cells() -> None:
    pixels = images(2, 40, 56)
    folded = slide_windows(lambda x: F.avg_pool2d(x, 8), pixels, (24, 32), (16, 24), cell=8)
    torch.testing.assert_close(folded, F.avg_pool2d(pixels, 8))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_hold_windows_of_any_images(batch_size: int) -> None:
    sizes: list[int] = []

    def count(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return pointwise(x)

    folded = slide_windows(count, images(), 20, 20, batch_size=batch_size)
    torch.testing.assert_close(folded, pointwise(images()))
    assert max(sizes) <= batch_size and sum(sizes) == 2 * 2 * 3


def test_the_memory_limit_moves_the_result_to_the_cpu() -> None:
    if torch.cuda.is_available():
        folded = slide_windows(pointwise, images().cuda(), 16, 16, memory_limit=1)
        assert folded.device.type == "cpu"
    folded = slide_windows(pointwise, images(), 16, 16, memory_limit=1)
    torch.testing.assert_close(folded, pointwise(images()))


def test_half_precision_is_accumulated_in_float32() -> None:
    assert slide_windows(lambda x: x.bfloat16(), images(), 16, 8).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 8, "stride": 9}, "at most the window"),
        ({"window": 8, "stride": 0}, "at least 1"),
        ({"window": 16, "stride": 8, "cell": 8}, "multiples of the cell of 8 pixels"),
    ],
)
def test_windows_that_do_not_fit_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slide_windows(pointwise, images(), **arguments)


def test_maps_of_another_size_than_the_cells_are_refused() -> None:
    with pytest.raises(ValueError, match=r"maps of \(4, 4\); cells of 8 pixels need \(2, 2\)"):
        slide_windows(lambda x: F.avg_pool2d(x, 4), images(1, 32, 32), 16, 16, cell=8)


def test_cut_windows_fold_to_the_image() -> None:
    images = torch.rand(2, 3, 20, 28)
    windows = cut_windows(images, 12, 8)
    assert windows.shape == (2, 6, 3, 12, 12)
    torch.testing.assert_close(fold_windows(windows[1], (20, 28), 12, 8), images[1])
    marked = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 12, 12)
    folded = fold_windows(marked, (20, 28), 12, 8)
    assert folded[0, 0, 0] == 0 and folded[0, 0, 10] == 0.5 and folded[0, 19, 27] == 5
