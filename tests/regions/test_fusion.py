"""Score fusions and suppression, in numbers that can be checked by hand."""

import pytest
import torch
from torchvision.ops import nms

from clipdense.regions import FUSIONS, FusionSettings, class_nms, get_fusion

# two classes, the first base, and the background
DETECTOR = torch.tensor([[0.25, 0.25, 0.5]])
CLIP = torch.tensor([[0.64, 0.04, 0.32]])
BASE = torch.tensor([True, False])
HALF = FusionSettings(alpha=0.5, beta=1.0)


def test_fvit_is_a_geometric_mean_with_the_background_as_a_base_class() -> None:
    fused = get_fusion("fvit")(DETECTOR, CLIP, BASE, HALF)
    torch.testing.assert_close(fused, torch.tensor([[0.4, 0.04, 0.4]]))


def test_fvlm_keeps_the_detectors_background_and_sums_to_one() -> None:
    fused = get_fusion("fvlm")(DETECTOR, CLIP, BASE, HALF)
    torch.testing.assert_close(fused, torch.tensor([[0.4, 0.04, 0.5]]) / 0.94)


def test_transfer_has_one_exponent() -> None:
    fused = get_fusion("fvit_transfer")(DETECTOR, CLIP, BASE, HALF)
    torch.testing.assert_close(fused, torch.tensor([[0.4, 0.1, 0.4]]))


def test_without_a_base_mask_every_class_is_novel() -> None:
    for name in ("fvlm", "fvit"):
        fusion = get_fusion(name)
        alone = fusion(DETECTOR, CLIP, None, HALF)
        torch.testing.assert_close(alone, fusion(DETECTOR, CLIP, torch.tensor([False, False]), HALF))


@pytest.mark.parametrize("name", FUSIONS)
def test_clip_without_weight_changes_nothing(name: str) -> None:
    scores = torch.rand(3, 5, 9).softmax(-1)
    base = torch.rand(3, 1, 8) > 0.5  # one mask an image
    fused = get_fusion(name)(scores, torch.rand(3, 5, 9), base, FusionSettings(0.0, 0.0))
    torch.testing.assert_close(fused, scores)


def test_unknown_fusions_and_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="known: fvlm"):
        get_fusion("mean")
    with pytest.raises(ValueError, match="beta must lie in 0 .. 1, not 1.5"):
        FusionSettings(0.1, 1.5)


def every_pair(boxes, scores, threshold, iou, limit):
    """Class by class, all pairs first."""
    kept = []
    for k in range(scores.shape[1]):
        rows = (scores[:, k] > threshold).nonzero().squeeze(1)
        rows = rows[nms(boxes[rows], scores[rows, k], iou)]
        kept += [(scores[i, k].item(), i, k) for i in rows.tolist()]
    kept = sorted(kept, reverse=True)
    return [(i, k) for _, i, k in (kept if limit < 0 else kept[:limit])]


@pytest.mark.parametrize("limit", [-1, 0, 3, 40, 10000])
def test_suppression_within_classes(limit: int) -> None:
    torch.manual_seed(0)
    corner = torch.rand(60, 2) * 40
    boxes = torch.cat([corner, corner + 5 + torch.rand(60, 2) * 30], 1)
    scores = torch.rand(60, 30) ** 3
    rows, classes = class_nms(boxes, scores, threshold=0.05, iou=0.5, limit=limit)
    assert list(zip(rows.tolist(), classes.tolist(), strict=True)) == every_pair(
        boxes, scores, 0.05, 0.5, limit
    )


def test_suppression_is_exact_for_many_classes_and_of_nothing() -> None:
    """Class 1202 of boxes in a large image: float32 would move them by a sixteenth of a pixel."""
    boxes = torch.tensor([[1000.0, 1000, 1010.0, 1010], [1000, 1000, 1010.0, 1005.01]])
    scores = torch.zeros(2, 1203)
    scores[:, 1202] = torch.tensor([0.9, 0.8])
    assert len(class_nms(boxes, scores, threshold=0.1, iou=0.5, limit=10)[0]) == 1
    assert len(class_nms(boxes, scores, threshold=0.1, iou=0.502, limit=10)[0]) == 2
    assert len(class_nms(boxes, scores, threshold=0.95, iou=0.5, limit=10)[0]) == 0
    assert len(class_nms(boxes[:0], scores[:0], threshold=0.0, iou=0.5, limit=10)[0]) == 0
