"""Test-time scales and flips."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.inference import average_views


def image() -> Tensor:
    return torch.rand(1, 3, 12, 20, generator=torch.Generator().manual_seed(0))


def test_a_pointwise_function_ignores_flips() -> None:
    torch.testing.assert_close(average_views(torch.square, image(), flip=True), image().square())


def test_a_flipped_view_is_mirrored_back() -> None:
    """A function that marks the left half marks the right half of the mirrored view."""

    def left(x: Tensor) -> Tensor:
        return (torch.arange(x.shape[-1]) < x.shape[-1] // 2).float().expand(1, 1, *x.shape[-2:])

    assert average_views(left, image())[0, 0, 0].tolist() == [1.0] * 10 + [0.0] * 10
    assert (average_views(left, image(), flip=True) == 0.5).all()


def test_scales_are_averaged_at_the_size_of_the_result() -> None:
    sizes: list[tuple[int, ...]] = []

    def identity(x: Tensor) -> Tensor:
        sizes.append(tuple(x.shape[-2:]))
        return x

    views = average_views(identity, image(), scales=(0.5, 1.0, 1.3), size=(24, 40))
    assert sizes == [(6, 10), (12, 20), (16, 26)]
    expected = [
        F.interpolate(
            F.interpolate(image(), size, mode="bilinear") if size != (12, 20) else image(),
            (24, 40),
            mode="bilinear",
        )
        for size in sizes
    ]
    torch.testing.assert_close(views, torch.stack(expected).mean(0))


@pytest.mark.parametrize("scales", [(), (1.0, 0.0)])
def test_scales_must_be_above_zero(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        average_views(torch.square, image(), scales=scales)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside main memory")
def test_maps_that_a_function_leaves_in_main_memory_join_the_others() -> None:
    def large_maps_in_main_memory(x: Tensor) -> Tensor:
        return x.cpu() if x.shape[-1] > 20 else x

    found = average_views(large_maps_in_main_memory, image().cuda(), scales=(0.5, 2.0, 1.0))
    expected = average_views(lambda x: x, image(), scales=(0.5, 2.0, 1.0))
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected)
