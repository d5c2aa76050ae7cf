"""NumPy operations of the runner against those of the library."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipdense.inference import panoptic_inference, slide_windows
from clipdense.inference.windows import centred_padding
from clipdense.regions import class_nms
from clipdense.run.export import arrays

from detectron2.data.transforms import ResizeShortestEdge


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(7, 9), (14, 5), (3, 31), (7, 18)])
def test_maps_are_resized_as_in_torch(size: tuple[int, int]) -> None:
    maps = random(2, 3, 7, 9)
    expected = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(arrays.resize_maps(maps.numpy(), size), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (300, 2000), (333, 333)])
def test_images_have_the_size_of_detectron2(height: int, width: int) -> None:
    for shortest, longest in ((224, 800), (800, 1333)):
        expected = ResizeShortestEdge.get_output_shape(height, width, shortest, longest)
        assert arrays.test_size(height, width, shortest, longest) == expected
    assert arrays.test_size(height, width, 0, 0) == (height, width)


def test_padding_is_that_of_the_models() -> None:
    image = random(1, 3, 13, 21).numpy()
    below, place = arrays.pad_to_multiple(image, 8)
    assert below.shape == (1, 3, 16, 24) and place == (slice(0, 13), slice(0, 21))
    around, place = arrays.pad_to_multiple(image, 8, centred=True)
    left, right, top, bottom = centred_padding((13, 21), 8)
    expected = F.pad(torch.from_numpy(image), (left, right, top, bottom))
    np.testing.assert_array_equal(around, expected.numpy())
    np.testing.assert_array_equal(around[(..., *place)], image)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (64, 32)])
def test_windows_are_those_of_the_models(window: int, stride: int) -> None:
    image = random(1, 3, 37, 29)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x * x.mean((2, 3), keepdim=True)

    own = arrays.windowed(lambda x: function(torch.from_numpy(x)).numpy(), image.numpy(), window, stride)
    np.testing.assert_allclose(own, slide_windows(function, image, window, stride).numpy(), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_segments_are_merged_as_by_the_models(seed: int) -> None:
    scores = (3 * random(12, 5, seed=seed)).softmax(1)
    masks = F.interpolate(4 * random(1, 12, 5, 6, seed=seed + 10), (20, 24), mode="bilinear")[0]
    settings = {"object_threshold": 0.3, "overlap_threshold": 0.4, "pixel_threshold": 0.5}
    ids, segments = arrays.merge_panoptic(scores.numpy(), masks.sigmoid().numpy(), (0, 2), **settings)
    expected, expected_segments = panoptic_inference(
        scores,
        masks,
        (0, 2),
        object_mask_threshold=0.3,
        overlap_threshold=0.4,
        pixel_threshold=0.5,
    )
    assert segments == expected_segments
    np.testing.assert_array_equal(ids, expected.numpy())


def test_suppression_selects_the_detections_of_the_library() -> None:
    corners = random(40, 2).abs() * 30
    boxes = torch.cat([corners, corners + 5 + 20 * random(40, 2, seed=1).abs()], 1)
    scores = random(40, 3, seed=2).sigmoid()
    rows, columns = arrays.non_maximum_suppression(
        boxes.numpy(), scores.numpy(), threshold=0.2, overlap=0.4, limit=20
    )
    expected = class_nms(boxes, scores, threshold=0.2, iou=0.4, limit=20)
    assert rows.tolist() == expected[0].tolist() and columns.tolist() == expected[1].tolist()
    assert 5 < len(rows) <= 20
