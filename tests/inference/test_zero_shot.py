"""Class scores from cosines, thresholds, refinement and propagation of maps, windows one by one."""

import pytest
import torch
import torch.nn.functional as F

from clipdense.inference import (
    PixelGraph,
    Prompts,
    RefineSettings,
    centred_padding,
    class_probabilities,
    confident_labels,
    denoise_prompts,
    map_windows,
    merge_windows,
    pad_windows,
    pamr,
    patch_graph,
    patch_modes,
    patch_positions,
    propagate_patches,
    propagate_pixels,
    refine_by_prompts,
    slide_windows,
    smooth_by_keys,
    suppress_small_classes,
)
from clipdense.inference.propagation import conjugate_gradient


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_synonyms_share_one_softmax():
    logits = maps(4, 3, 5)
    scores = class_probabilities(logits, torch.tensor([0, 0, 1, 2]), 3, 2.0)
    p = (2 * logits).softmax(0)
    torch.testing.assert_close(scores, torch.stack([p[:2].amax(0), p[2], p[3]]))
    torch.testing.assert_close(class_probabilities(logits, torch.arange(4), 4, 2.0), p)
    assert class_probabilities(logits, torch.tensor([0, 0, 1, 1]), 3, 2.0)[2].eq(0).all()


def test_small_classes_lose_their_pixels():
    scores = torch.zeros(3, 2, 10)
    scores[0, 0], scores[1, 1], scores[2, 1, 0] = 1.0, 0.5, 0.9
    kept = suppress_small_classes(scores, 0.1)  # class 2 is best in one of ten foreground pixels
    assert kept[2].eq(0).all() and torch.equal(kept[:2], scores[:2])
    assert torch.equal(suppress_small_classes(scores, 0.09), scores)


def test_labels_of_unsure_pixels():
    scores = torch.tensor([[[0.2, 0.6]], [[0.3, 0.1]]])
    assert confident_labels(scores, 0.0).tolist() == [[1, 0]]
    assert confident_labels(scores, 0.5, -1).tolist() == [[-1, 0]]


def test_maskclip_refinements():
    logits = torch.tensor([[0.30, 0.10], [0.20, 0.25], [0.0, 0.0]])[None, :, None]  # (1, 3, 1, 2)
    denoised = denoise_prompts(logits, 0.5)
    assert denoised[0, 2].eq(-100).all() and torch.equal(denoised[0, :2], logits[0, :2])
    keys = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).T[None, :, None]  # (1, 2, 1, 2): two tokens
    p = (100 * logits).softmax(1).flatten(2)[0]
    cosine = 0.5**0.5
    expected = torch.stack([p[:, 0] + cosine * p[:, 1], p[:, 1] + cosine * p[:, 0]], 1)
    torch.testing.assert_close(smooth_by_keys(logits, keys, 1.0)[0, :, 0], expected)
    partly = smooth_by_keys(logits, keys, float(p.amax(0).max()))[0, :, 0]
    sure = p.amax(0).argmax()
    torch.testing.assert_close(partly[:, sure], p[:, sure])
    torch.testing.assert_close(partly[:, 1 - sure], expected[:, 1 - sure])


def test_patch_modes_take_the_smallest_of_equals():
    labels = torch.tensor([[2, 2, 0], [1, 1, 0], [9, 9, 9]])
    assert patch_modes(labels, 2).tolist() == [[1]]


def test_windows_one_by_one_equal_the_slide():
    image = maps(1, 3, 40, 52)

    def function(crops):
        return F.avg_pool2d(crops, 4)

    for multiple in (0, 7):
        lowres = map_windows(function, image, 20, 12, multiple=multiple, batch_size=3)
        whole = slide_windows(lambda c, m=multiple: pad_windows(function, c, m), image, 20, 12)
        torch.testing.assert_close(merge_windows(lowres, (40, 52), 20, 12, multiple=multiple), whole[0])
        part = merge_windows(lowres[:, 1:2], (40, 52), 20, 12, multiple=multiple)
        torch.testing.assert_close(part, whole[0, 1:2])
    one = map_windows(function, image, 0, 0)
    assert one.shape == (1, 3, 10, 13)
    torch.testing.assert_close(
        merge_windows(one, (40, 52), 0, 0), F.interpolate(one, (40, 52), mode="bilinear")[0]
    )


def test_the_smaller_half_of_a_padding_is_left_and_top():
    assert centred_padding((13, 16), 8) == (0, 0, 1, 2)
    assert centred_padding((16, 9), 8) == (3, 4, 0, 0)


def test_pamr_follows_the_colours():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :6] = 1  # the right edge of the left half is missing
    refined = pamr(image, mask, steps=10, dilations=(1, 2))
    assert refined[0, 0, 8, 7] > 0.3 > 5 * refined[0, 0, 8, 9]
    torch.testing.assert_close(pamr(image, torch.ones(1, 1, 4, 4), steps=2), torch.ones(1, 1, 16, 16))


def test_conjugate_gradient_solves_and_stops():
    a = maps(6, 6).double()
    a = a @ a.T + torch.eye(6)
    y = maps(6, 2, seed=1).double()
    torch.testing.assert_close(conjugate_gradient(lambda x: a @ x, y, 20), torch.linalg.solve(a, y))
    assert not torch.allclose(conjugate_gradient(lambda x: a @ x, y, 2), torch.linalg.solve(a, y))
    assert conjugate_gradient(lambda x: a @ x, torch.zeros(6, 1)).eq(0).all()


def test_patch_labels_spread_to_similar_patches():
    features = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), dim=1)
    positions = patch_positions([(0, 0)], (2, 2), 8)
    assert positions.tolist() == [[4, 4], [4, 12], [12, 4], [12, 12]]
    laplacian = patch_graph(features, positions, neighbours=2)
    assert laplacian.to_dense().diagonal().eq(1).all()
    spread = propagate_patches(laplacian, torch.tensor([[1.0, 0], [0, 0], [0, 1], [0, 0]]))
    assert spread[1, 0] > 10 * spread[1, 1].abs() and spread[3, 1] > 10 * spread[3, 0].abs()


def test_pixel_graph_equals_its_matrix():
    image = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0))
    graph = PixelGraph(image, size=3, tau=0.5)
    matrix = graph.apply(torch.eye(30, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.ones(30, dtype=torch.float64))
    assert matrix[0, 2] == 0 and matrix[0, 1] < 0 and matrix[0, 7] < 0  # neighbours in a square of three
    assert propagate_pixels(image, torch.rand(2, 5, 6)).shape == (2, 5, 6)


@pytest.mark.parametrize("iou", [0.95, 0.5])
def test_masks_decide_labels_only_if_they_are_good(iou):
    labels = torch.zeros(40, 40, dtype=torch.long)
    labels[:20] = 1
    scores = torch.stack([torch.full((40, 40), 0.4), torch.where(labels == 1, 0.6, 0.3)])
    seen: list[Prompts] = []

    def decode(prompts):
        seen.append(prompts)
        logits = torch.full((len(prompts.boxes), 256, 256), -5.0)
        logits[:, :192] = 5.0
        return logits, torch.full((len(prompts.boxes),), iou if len(seen) == 2 else 0.0)

    settings = RefineSettings(coarse_threshold=0.1, minimal_area=10, frame=256)
    refined, maps = refine_by_prompts(labels, scores, decode, settings)
    assert len(seen) == 2
    assert seen[1].boxes.tolist()[0][:2] == [0, 0]
    if iou < 0.9:
        assert torch.equal(refined, labels) and torch.equal(maps, scores)
    else:
        assert refined[:30].eq(1).all() and refined[30:].eq(0).all()
        assert maps[0, 39, 0] == scores[0, 39, 0]  # the region without a valid mask keeps its scores
