"""Tight boxes of masks, against torchvision's."""

import torch
from torchvision.ops import masks_to_boxes

from clipdense.regions import mask_extent, tight_boxes


def some_masks() -> torch.Tensor:
    masks = torch.zeros(4, 10, 12)
    masks[0, 2:5, 3:11] = 1
    masks[2, 9, 11] = 0.5
    masks[3, 0, 0] = 1
    return masks


def test_ends_are_exclusive_and_empty_masks_have_zeros() -> None:
    boxes = tight_boxes(some_masks() > 0)
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == [[3, 2, 11, 5], [0, 0, 0, 0], [11, 9, 12, 10], [0, 0, 1, 1]]
    assert tight_boxes(torch.zeros(0, 10, 12, dtype=torch.bool)).shape == (0, 4)


def test_boxes_equal_torchvisions_but_for_the_ends() -> None:
    masks = torch.rand(20, 15, 17, generator=torch.Generator().manual_seed(0)) > 0.98
    masks = masks[masks.flatten(1).any(1)]
    expected = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    assert torch.equal(tight_boxes(masks), expected)


def test_a_threshold_is_outside_the_mask() -> None:
    extent = mask_extent(some_masks(), 0.4)
    assert extent.valid.tolist() == [True, False, True, True]
    assert extent.columns[2].nonzero().tolist() == [[11]] and extent.rows[2].nonzero().tolist() == [[9]]
    assert not mask_extent(some_masks(), 0.5).valid[2]
