"""Merging of classified masks: segments, instances, and the settings of each output."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdense.inference import (
    MergeSettings,
    instance_inference,
    merge_queries,
    panoptic_inference,
    semantic_labels,
    semantic_map,
)
from clipdense.regions import tight_boxes

CORNERS = ((0, 0), (8, 8), (0, 8), (8, 0), (0, 0))
LABELS = (0, 0, 1, 1, 2)


@pytest.fixture
def queries() -> tuple[Tensor, Tensor]:
    """Probabilities and mask logits of the four quarters of an image, and of the first quarter again."""
    masks = torch.full((5, 16, 16), -10.0)
    for mask, (y, x) in zip(masks, CORNERS, strict=True):
        mask[y : y + 8, x : x + 8] = 10
    logits = torch.full((5, 4), -9.0)
    for row, label in zip(logits, LABELS, strict=True):
        row[label] = 9.0
    logits[4, 3] = 7.0  # less certain
    return logits.softmax(1), masks


def test_stuff_of_one_class_merges_and_things_do_not(queries) -> None:
    seg, segments = panoptic_inference(*queries, {1})
    assert [(s["id"], s["category_id"], s["isthing"]) for s in segments] == [
        (1, 0, False),
        (2, 1, True),
        (3, 1, True),
    ]
    assert seg[0, 0] == seg[15, 15] == 1
    assert seg[0, 15] == 2
    assert seg[15, 0] == 3


def test_a_pixel_threshold_makes_pixels_void(queries) -> None:
    scores, masks = queries
    alone, segments = panoptic_inference(scores[3:4], masks[3:4], {1})
    assert (alone > 0).all() and len(segments) == 1  # MaskFormer: a lone query owns every pixel
    alone, _ = panoptic_inference(scores[3:4], masks[3:4], {1}, pixel_threshold=0.5)
    assert torch.equal(alone.bool(), masks[3] > 0)


def test_without_confident_queries_every_pixel_is_void(queries) -> None:
    seg, segments = panoptic_inference(*queries, {1}, object_mask_threshold=1.0)
    assert not seg.any() and not segments


def test_instances_are_pairs_of_query_and_class(queries) -> None:
    found = instance_inference(*queries, topk=4, things={1})
    assert set(found.pred_classes.tolist()) == {1} and len(found) == 2
    assert found.pred_boxes.tensor.tolist() == tight_boxes(found.pred_masks).tolist()
    assert len(instance_inference(*queries, topk=1000)) == 15


def merge(queries, **settings) -> dict:
    scores, masks = queries
    padded = F.pad(masks, (0, 8, 0, 4), value=10.0)
    sizes = {"image_size": (16, 16), "output_size": (32, 24)}
    return merge_queries(scores, padded, MergeSettings(**settings), things={1}, **sizes)


def test_outputs_have_the_size_of_the_output_and_no_padding(queries) -> None:
    output = merge(queries, panoptic_on=True, instance_on=True, proposals_on=True)
    assert output["sem_seg"].shape == (3, 32, 24)
    assert output["panoptic_seg"][0].shape == (32, 24)
    assert output["instances"].image_size == (32, 24)
    torch.testing.assert_close(output["proposal_masks"], queries[1].sigmoid())
    assert merge(queries, semantic_on=False) == {}


def test_semantic_maps_or_masks_are_resized(queries) -> None:
    scores, masks = queries
    maps = semantic_map(scores[:, :-1], masks.sigmoid(), (32, 24))
    torch.testing.assert_close(merge(queries)["sem_seg"], maps)
    large = F.interpolate(masks[None], (32, 24), mode="bilinear", align_corners=False)[0]
    maps = semantic_map(scores[:, :-1], large.sigmoid(), (32, 24))
    torch.testing.assert_close(merge(queries, resize_masks_first=True)["sem_seg"], maps)


def test_large_vocabularies_give_labels(queries) -> None:
    output = merge(queries, max_dense_classes=2)
    assert set(output) == {"sem_seg_labels"}
    assert torch.equal(output["sem_seg_labels"], merge(queries)["sem_seg"].argmax(0))


def test_scores_of_any_sum_are_normalised_for_segments(queries) -> None:
    scores, masks = queries
    first = merge((scores, masks), panoptic_on=True)
    second = merge((scores / 2, masks), panoptic_on=True)
    assert torch.equal(first["panoptic_seg"][0], second["panoptic_seg"][0])
    torch.testing.assert_close(first["sem_seg"], 2 * second["sem_seg"])


def test_best_masks_are_binary(queries) -> None:
    scores, masks = queries
    output = merge((scores[:1], masks[:1]), best_masks=True, resize_masks_first=True)["sem_seg"]
    top = output.flatten(1).amax(1)
    assert torch.equal(output, top[:, None, None] * (output > 0))
    threshold = merge((scores[:1], masks[:1]), best_masks=True, best_mask_threshold=1.0)["sem_seg"]
    assert not threshold.any()


def test_base_classes_are_calibrated(queries) -> None:
    scores, masks = queries
    settings, base = MergeSettings(calibration=0.1), torch.tensor([True, False, False])
    sizes = {"image_size": (16, 16), "output_size": (16, 16)}
    plain = merge_queries(scores, masks, replace(settings, calibration=0.0), base=base, **sizes)["sem_seg"]
    lowered = merge_queries(scores, masks, settings, base=base, **sizes)["sem_seg"]
    torch.testing.assert_close(plain - lowered, torch.tensor([0.1, 0, 0])[:, None, None].expand(3, 16, 16))
    labels, _ = semantic_labels(scores[:, :-1], masks.sigmoid(), (16, 16), base=base, calibration=0.1)
    assert torch.equal(labels, lowered.argmax(0))
