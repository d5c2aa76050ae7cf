"""Score fusion and suppression, on numbers that can be checked by hand."""

import pytest
import torch
from torchvision.ops import nms

from clipdense.regions import (
    FUSIONS,
    FusionSettings,
    calibrated_stacking,
    class_nms,
    fuse_valid,
    get_fusion,
)

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


def test_two_stage_systems_keep_the_proposals_background_and_normalise_nothing() -> None:
    for name in ("ovseg", "zsseg", "zegformer"):  # the mean over one base class is its score
        fused = get_fusion(name)(DETECTOR, CLIP, BASE, HALF)
        torch.testing.assert_close(fused, torch.tensor([[0.4, 0.04, 0.5]]))


def test_zegformer_takes_the_mean_over_base_classes() -> None:
    both = torch.tensor([True, True])
    fused = get_fusion("zegformer")(DETECTOR, CLIP, both, FusionSettings(1.0, 0.0))
    torch.testing.assert_close(fused, torch.tensor([[0.34, 0.34, 0.5]]))
    novel = get_fusion("zegformer")(DETECTOR, CLIP, ~both, HALF)
    torch.testing.assert_close(novel, get_fusion("zsseg")(DETECTOR, CLIP, None, HALF))


def test_masks_that_clip_has_not_seen() -> None:
    detector, valid = DETECTOR.repeat(3, 1), torch.tensor([False, True, False])
    fusion = get_fusion("ovseg")
    neutral = fuse_valid(fusion, detector, CLIP, valid, BASE, HALF)
    torch.testing.assert_close(neutral[1:2], fusion(DETECTOR, CLIP, BASE, HALF))
    torch.testing.assert_close(neutral[[0, 2]], detector[:2])
    boost = fuse_valid(fusion, detector, CLIP, valid, BASE, HALF, "boost")
    torch.testing.assert_close(boost[1], neutral[1])
    torch.testing.assert_close(boost[0], torch.tensor([0.5, 1.0, 0.5]))
    none = fuse_valid(fusion, detector, CLIP[:0], torch.zeros(3, dtype=torch.bool), BASE, HALF)
    torch.testing.assert_close(none, detector)
    with pytest.raises(ValueError, match="not 'drop'"):
        fuse_valid(fusion, detector, CLIP, valid, BASE, HALF, "drop")


def test_calibrated_stacking_lowers_base_classes() -> None:
    maps = torch.rand(2, 4, 5)
    lowered = calibrated_stacking(maps, BASE, 0.1)
    torch.testing.assert_close(maps - lowered, torch.tensor([0.1, 0.0])[:, None, None].expand(2, 4, 5))
    assert calibrated_stacking(maps, BASE, -1.0) is maps and calibrated_stacking(maps, None, 0.1) is maps


def test_without_a_base_mask_every_class_is_novel() -> None:
    for name in ("fvlm", "fvit", "zsseg", "zegformer"):
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
