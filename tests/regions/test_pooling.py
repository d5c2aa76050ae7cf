import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from clipdense.regions import POOLINGS, Pooling, get_pooling, pool_boxes, pool_masks, resize_masks


@pytest.fixture
def features():
    return torch.randn(2, 5, 6, 9, generator=torch.Generator().manual_seed(0))


BOXES = [torch.tensor([[0.0, 0, 9, 6], [1.2, 2.5, 3.1, 5.9]]), torch.tensor([[4.0, 1, 4.5, 1.2]])]
INDEX = torch.tensor([0, 0, 1])


def test_boxes_as_list_stack_or_flat(features):
    expected = roi_align(features, BOXES, 1, 1.0, -1, True).flatten(1)
    torch.testing.assert_close(pool_boxes(features, BOXES), expected, atol=0, rtol=0)
    flat = torch.cat(BOXES)
    torch.testing.assert_close(pool_boxes(features, flat, INDEX), expected)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(pool_boxes(features, flat[order], INDEX[order]), expected[order])
    stacked = torch.stack([BOXES[0], BOXES[1].expand(2, 4)])
    torch.testing.assert_close(pool_boxes(features, stacked)[[0, 1, 3]], expected)


def test_the_whole_map_is_its_mean(features):
    whole = torch.tensor([[0.0, 0, 9, 6]])
    torch.testing.assert_close(pool_boxes(features, [whole, whole]), features.mean((2, 3)))


def test_scale_takes_pixels_and_fractions(features):
    expected = pool_boxes(features, BOXES)
    torch.testing.assert_close(pool_boxes(features, [16 * b for b in BOXES], scale=1 / 16), expected)
    fractions = [b / torch.tensor([9, 6, 9, 6]) for b in BOXES]
    torch.testing.assert_close(pool_boxes(features, fractions, scale=(9, 6)), expected)
    pixels = [(16 * b).round().long() for b in BOXES]
    torch.testing.assert_close(
        pool_boxes(features, pixels, scale=1 / 16),
        pool_boxes(features, [p.float() for p in pixels], scale=1 / 16),
    )


def test_output_size_and_sampling(features):
    grid = pool_boxes(features, BOXES, output_size=(3, 2), pooling="clipself", sampling_ratio=2)
    assert grid.shape == (3, 5, 3, 2)
    expected = roi_align(F.normalize(features, dim=1), BOXES, (3, 2), 1.0, 2, True)
    torch.testing.assert_close(grid, F.normalize(expected, dim=1))
    torch.testing.assert_close(grid.norm(dim=1), torch.ones(3, 3, 2))


def test_poolings_normalise_what_they_say(features):
    unit = F.normalize(features, dim=1)
    for name, policy in POOLINGS.items():
        source = unit if policy.normalize_map else features
        expected = roi_align(source, BOXES, 1, 1.0, -1, True).flatten(1)
        expected = F.normalize(expected, dim=1) if policy.normalize else expected
        torch.testing.assert_close(pool_boxes(features, BOXES, pooling=name), expected)
    assert get_pooling(Pooling(normalize=True)).normalize
    with pytest.raises(ValueError, match="unknown pooling 'mean'; known: plain, clipself"):
        pool_boxes(features, BOXES, pooling="mean")
    with pytest.raises(ValueError, match="empty must be"):
        Pooling(empty="nan")


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 6, 9, generator=generator), torch.rand(1, 6, 9, generator=generator)]


def test_masks_are_weighted_means(features, masks):
    expected = torch.stack(
        [(features[i] * mask).sum((1, 2)) / mask.sum() for i, image in enumerate(masks) for mask in image]
    )
    torch.testing.assert_close(pool_masks(features, masks), expected)
    flat, index = torch.cat(masks), torch.tensor([0, 0, 0, 1])
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(pool_masks(features, flat[order], index[order]), expected[order])
    stacked = torch.stack([masks[0], masks[1].expand(3, 6, 9)])
    torch.testing.assert_close(pool_masks(features, stacked), expected[[0, 1, 2, 3, 3, 3]])
    binary = [image > 0.5 for image in masks]
    torch.testing.assert_close(
        pool_masks(features, masks, pooling=Pooling(threshold=0.5)), pool_masks(features, binary)
    )
    assert not torch.allclose(pool_masks(features, binary), expected, atol=1e-3)


def test_empty_masks_follow_the_pooling(features, masks):
    masks[0][1] = 0
    rows = pool_masks(features, masks)
    assert (rows[1] == 0).all() and (rows[[0, 2, 3]] != 0).all()
    assert (pool_masks(features, masks, pooling="clipself")[1] == 0).all()
    globally = pool_masks(features, masks, pooling=Pooling(empty="global"))
    torch.testing.assert_close(globally[1], features[0].mean((1, 2)))
    torch.testing.assert_close(globally[[0, 2, 3]], rows[[0, 2, 3]])
    logits = [torch.full((1, 6, 9), -4.0), torch.ones(1, 6, 9)]
    rows = pool_masks(features, logits, pooling="fcclip")
    assert (rows[0] == 0).all()
    torch.testing.assert_close(rows[1], features[1].mean((1, 2)))


def test_no_regions_give_no_rows(features):
    none, some = torch.zeros(0, 4), BOXES[0]
    assert pool_boxes(features, [none, none]).shape == (0, 5)
    assert pool_boxes(features, none, torch.zeros(0, dtype=torch.long)).shape == (0, 5)
    assert pool_boxes(features, [none, none], output_size=2).shape == (0, 5, 2, 2)
    torch.testing.assert_close(pool_boxes(features, [none, some]), pool_boxes(features[1:], [some]))
    no_mask, mask = torch.zeros(0, 6, 9), torch.ones(2, 6, 9)
    assert pool_masks(features, [no_mask, no_mask]).shape == (0, 5)
    assert pool_masks(features, no_mask, torch.zeros(0, dtype=torch.long)).shape == (0, 5)
    torch.testing.assert_close(pool_masks(features, [no_mask, mask]), pool_masks(features[1:], [mask]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype(features, masks, dtype):
    boxes = [b * 100 for b in BOXES]  # half precision would round such boxes
    for got, exact in (
        (pool_boxes(features.to(dtype), boxes, scale=0.01), pool_boxes(features, boxes, scale=0.01)),
        (pool_masks(features.to(dtype), masks), pool_masks(features, masks)),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), exact, atol=1e-2, rtol=0)


def test_autocast_changes_nothing(features, masks):
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            pool_masks(features, masks), pool_masks(features, masks.copy()), atol=0, rtol=0
        )
        inside = pool_masks(features, masks), pool_boxes(features, BOXES)
    torch.testing.assert_close(inside[0], pool_masks(features, masks), atol=0, rtol=0)
    torch.testing.assert_close(inside[1], pool_boxes(features, BOXES), atol=0, rtol=0)


def test_gradients_flow(masks):
    features = torch.randn(2, 5, 6, 9, dtype=torch.float64, requires_grad=True)
    boxes = [b.double() for b in BOXES]
    assert torch.autograd.gradcheck(lambda f: pool_boxes(f, boxes, pooling="clipself"), features)
    assert torch.autograd.gradcheck(lambda f: pool_masks(f, masks, pooling="clipself"), features)


def test_regions_that_do_not_fit(features):
    with pytest.raises(ValueError, match="1 lists of boxes for 2 images"):
        pool_boxes(features, BOXES[:1])
    with pytest.raises(ValueError, match=r"flat boxes \(2, 4\) need `batch_index`"):
        pool_boxes(features, BOXES[0])
    with pytest.raises(ValueError, match="2 boxes, but `batch_index` has 3"):
        pool_boxes(features, BOXES[0], INDEX)
    with pytest.raises(ValueError, match="which is for flat ones"):
        pool_boxes(features, BOXES, INDEX)
    with pytest.raises(ValueError, match=r"boxes \(2, 5\) do not fit \(N, 4\)$"):
        pool_boxes(features, torch.zeros(2, 5), INDEX[:2])
    with pytest.raises(ValueError, match=r"masks \(2, 6, 6\) do not fit \(N, 6, 9\) \(see `resize_masks`\)"):
        pool_masks(features, [torch.zeros(1, 6, 6)] * 2)


def disc(height, width, radius):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((y - 200) ** 2 + (x - 300) ** 2 < radius**2)[None]


@pytest.mark.parametrize(
    ("radius", "cells", "swollen"), [(8, 4, 16), (16, 12, 30), (32, 32, 70), (64, 128, 181), (128, 528, 619)]
)
def test_antialiasing_swells_small_masks(radius, cells, swollen):
    """Areas in cells of discs in 640 x 480 on a grid of 64, as the published evaluation computes them."""
    sharp, smooth = (
        resize_masks(disc(480, 640, radius), 64, antialias=a).sum().item() for a in (False, True)
    )
    assert abs(sharp - cells) <= max(2, 0.05 * cells)
    assert abs(smooth - swollen) <= max(4, 0.05 * swollen)


def test_resized_masks_are_padded_right_and_bottom():
    wide = resize_masks(torch.ones(2, 30, 80), 8)
    assert wide.shape == (2, 8, 8) and wide.dtype == torch.bool
    assert wide[:, :3].all() and not wide[:, 3:].any()
    tall = resize_masks(torch.ones(1, 80, 1, dtype=torch.bool), 8)
    assert tall[:, :, 0].all() and not tall[:, :, 1:].any()
    assert resize_masks(torch.ones(1, 30, 80), (3, 5)).all()
    assert resize_masks(torch.zeros(0, 30, 80), 8).shape == (0, 8, 8)
    assert resize_masks(torch.zeros(0, 30, 80), (3, 5)).shape == (0, 3, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(features, masks, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    cuda = features.cuda().to(dtype)
    boxes = pool_boxes(cuda, [b.cuda() for b in BOXES], pooling="clipself")
    assert boxes.device.type == "cuda" and boxes.dtype == dtype
    expected = pool_boxes(features, BOXES, pooling="clipself")
    torch.testing.assert_close(boxes.cpu().float(), expected, atol=tolerance, rtol=0)
    got = pool_masks(cuda, [m.cuda() for m in masks]).cpu().float()
    torch.testing.assert_close(got, pool_masks(features, masks), atol=tolerance, rtol=0)
    assert torch.equal(
        resize_masks(disc(480, 640, 64).cuda(), 40).cpu(), resize_masks(disc(480, 640, 64), 40)
    )
