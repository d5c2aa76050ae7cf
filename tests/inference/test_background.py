"""Rules for pixels and classes that a vocabulary does not cover."""

import torch

from clipdense.inference import max_over_synonyms, reject_pixels, suppress_absent_classes


def test_a_class_has_the_best_score_of_its_names() -> None:
    scores = torch.tensor([[0.1, 0.7], [0.4, 0.2], [0.3, 0.3]])
    reduced = max_over_synonyms(scores, torch.tensor([2, 0, 2]), 3)
    torch.testing.assert_close(reduced[0], scores[1])
    torch.testing.assert_close(reduced[2], torch.tensor([0.3, 0.7]))
    assert reduced[1].isneginf().all()


def test_absent_classes_lose_every_pixel() -> None:
    scores = torch.tensor([[[0.2, 0.3]], [[0.1, 0.6]]])
    kept = suppress_absent_classes(scores, 0.5)
    assert kept[0].isneginf().all()
    torch.testing.assert_close(kept[1], scores[1])
    torch.testing.assert_close(suppress_absent_classes(scores, 0.9), scores)


def test_pixels_of_low_confidence_become_background() -> None:
    labels, scores = torch.tensor([[3, 4], [3, 5]]), torch.tensor([[0.5, 0.2], [0.3, 0.9]])
    assert reject_pixels(labels, scores, 0.4, 0).tolist() == [[3, 0], [0, 5]]
    assert torch.equal(reject_pixels(labels, scores, 0.0, 0), labels)
