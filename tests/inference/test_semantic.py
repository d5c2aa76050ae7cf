"""Semantic maps from masks and their scores, and labels that need no map of all classes."""

import pytest
import torch
from benchmarks import peak_memory

from clipdense.inference import best_masks, merge_class_maps, semantic_labels, semantic_map


@pytest.fixture
def queries():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(7, 300, generator=generator).softmax(-1)
    return scores, torch.rand(7, 40, 52, generator=generator)


def test_a_map_is_the_sum_of_masks_by_their_scores(queries) -> None:
    scores, masks = queries
    maps = semantic_map(scores, masks, (40, 52))
    torch.testing.assert_close(maps[3, 5, 7], (scores[:, 3] * masks[:, 5, 7]).sum())
    resized = semantic_map(scores, masks, (61, 77))
    expected = torch.nn.functional.interpolate(maps[None], (61, 77), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(resized, expected)


@pytest.mark.parametrize("budget", [1, 61 * 77 * 4 * 7, 2**25])
def test_labels_are_those_of_the_whole_map(queries, budget: int, monkeypatch) -> None:
    monkeypatch.setattr("clipdense.inference.semantic._BUDGET", budget)
    scores, masks = queries
    base = torch.arange(300) % 3 == 0
    settings = {"base": base, "calibration": 1e-4}
    maps = semantic_map(scores, masks, (61, 77), **settings)
    labels, top = semantic_labels(scores, masks, (61, 77), **settings)
    torch.testing.assert_close(top, maps.amax(0), atol=1e-6, rtol=0)
    best = maps.gather(0, labels[None])[0]
    torch.testing.assert_close(best, top, atol=1e-6, rtol=0)
    plain = semantic_labels(scores, masks, (61, 77))[0]
    assert (plain != labels).any()


def test_labels_of_847_classes_take_little_memory() -> None:
    """847 maps at 640 x 853 are 1.7 GiB; here the same at a fifth of the side, and budget in proportion."""
    scores, masks = torch.rand(10, 847).softmax(-1), torch.rand(10, 128, 170)
    peak = peak_memory(lambda: semantic_labels(scores, masks, (128, 170)))
    whole = 847 * 128 * 170 * 4
    assert peak_memory(lambda: semantic_map(scores, masks, (128, 170))) >= whole
    assert peak < 2 * 2**25 + 8 * 128 * 170 * 8 < 1.2 * whole


def test_best_masks() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.8, 0.4], [0.8, 0.7, 0.2], [0.0, 0.0, 0.0]])
    assert best_masks(scores).tolist() == [True, True, False, False]
    assert best_masks(scores, background=0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_class_maps_are_merged_a_few_at_a_time(chunk: int) -> None:
    maps = torch.rand(9, 5, 6, generator=torch.Generator().manual_seed(0))
    maps[8] = maps[2]  # the first of equal classes wins
    asked = []

    def compute(classes: slice) -> torch.Tensor:
        asked.append(classes.stop - classes.start)
        return maps[classes]

    dense = merge_class_maps(compute, 9, (5, 6), chunk=chunk)
    assert torch.equal(dense["sem_seg"], maps) and max(asked) <= chunk
    for limit in ({"max_dense_classes": 8}, {"max_dense_bytes": 4 * 9 * 30 - 1}):
        labels = merge_class_maps(compute, 9, (5, 6), chunk=chunk, **limit)
        assert torch.equal(labels["sem_seg_labels"], maps.argmax(0))
