"""Masked crops against a loop that takes every step of the published code, and masks without a crop."""

from dataclasses import replace

import pytest
import torch
from benchmarks.ovseg import crop_loop

from clipdense.regions import CROP_RULES, CropRule, crop_masks, get_crop_rule

PIXELS = {"pixel_mean": (0.48, 0.46, 0.41), "pixel_std": (0.27, 0.26, 0.28)}


def image_and_masks(height=61, width=83, seed=0):
    """Discs of many sizes, a pixel, a row, a column, the whole image, and an empty mask."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centre = torch.rand(6, 2, generator=generator) * torch.tensor([height, width])
    radius = torch.linspace(3, 40, 6)
    distance = (y - centre[:, 0, None, None]).hypot(x - centre[:, 1, None, None])
    masks = torch.cat([(radius[:, None, None] - distance).sigmoid(), torch.zeros(5, height, width)])
    masks[6, 7, 9] = masks[7, 20] = masks[8, :, -1] = masks[9] = 0.9
    return image, masks


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("size", [32, 77])
def test_crops_are_those_of_the_loop(batched: bool, size: int) -> None:
    image, masks = image_and_masks()
    valid, regions, region_masks = crop_loop(image, masks, threshold=0.4, size=size, **PIXELS)
    crops = crop_masks(image, masks, "ovseg", size=size, **PIXELS)
    assert torch.equal(crops.valid, valid) and not valid[-1]
    ours = crops.regions(batched=batched)[crops.index]
    torch.testing.assert_close(ours, regions, atol=2e-4, rtol=0)
    assert (ours - regions).abs().mean() < 5e-6
    assert torch.equal(crops.region_masks()[crops.index], region_masks)


@pytest.mark.parametrize("rule", CROP_RULES)
def test_parts_are_slices_of_the_whole(rule: str) -> None:
    image, masks = image_and_masks()
    crops = crop_masks(image, masks, rule, size=32, **PIXELS)
    parts = list(crops.parts(4))
    assert len(parts) > 1
    regions, inside = crops.regions(), crops.region_masks()
    assert len(regions) == len(inside) == len(crops)
    torch.testing.assert_close(torch.cat([crops.regions(part) for part in parts]), regions)
    torch.testing.assert_close(torch.cat([crops.region_masks(part) for part in parts]), inside)


def test_equal_masks_share_a_crop_and_others_do_not() -> None:
    image, masks = image_and_masks()
    other = masks[:3].clone()
    other[2, masks[2].argmax() // 83, masks[2].argmax() % 83] = 0.1  # same box, a hole
    many = torch.cat([masks, masks.flip(0), other, masks * 1.1])
    crops = crop_masks(image, many, "ovseg", size=32, **PIXELS)
    bits = (many > 0.4).flatten(1)
    distinct = {tuple(row.nonzero().flatten().tolist()) for row in bits if row.any()}
    assert len(crops) == len(distinct)
    assert torch.equal(bits[crops.source[crops.index]], bits[crops.valid])
    soft = crop_masks(image, many, replace(CROP_RULES["ovseg"], soft=True), size=32, **PIXELS)
    assert len(soft) > len(crops)
    assert torch.equal(many[soft.source[soft.index]], many[soft.valid])


@pytest.mark.parametrize("rule", ["ovseg", "zegformer_cropmask", "zegformer_mask"])
@pytest.mark.parametrize("count", [0, 1])
def test_no_mask_and_one_mask(rule: str, count: int) -> None:
    image, masks = image_and_masks()
    crops = crop_masks(image, masks[:count], rule, size=32, **PIXELS)
    assert crops.regions().shape == (count, 3, 32, 32)
    assert crops.region_masks().shape == (count, 1, 32, 32)
    assert len(list(crops.parts(8))) == count


def test_only_empty_masks() -> None:
    image, masks = image_and_masks()
    empty = torch.zeros(4, *masks.shape[1:])
    crops = crop_masks(image, empty, "ovseg", size=32, **PIXELS)
    assert not crops.valid.any() and len(crops) == 0 and len(crops.index) == 0
    kept = crop_masks(image, empty, "zegformer_cropmask", size=32, **PIXELS)
    assert kept.valid.all() and len(kept) == 1 and kept.index.tolist() == [0] * 4
    assert (kept.regions() == 0).all()


def test_stretched_images_come_with_whole_masks() -> None:
    masks = torch.zeros(1, 32, 32)
    masks[0, 8:16, 8:24] = 9
    rule = get_crop_rule("zegformer_mask")
    crops = crop_masks(
        torch.rand(3, 32, 32), masks, rule, size=32, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3
    )
    assert crops.boxes.tolist() == [[0, 0, 32, 32]]
    assert torch.equal(crops.region_masks()[0, 0] > 0, masks[0] > 0)


def test_boxes_scale_about_their_centres() -> None:
    """A factor below 1 shrinks; corners are truncated, clipped to the image, and keep at least one pixel."""
    image, masks = torch.zeros(3, 20, 30), torch.zeros(3, 20, 30)
    masks[0, 4:12, 10:20] = masks[1, 19, 29] = masks[2, 0:20, 0:30] = 1

    def boxes(expand: float) -> list[list[int]]:
        rule = replace(CROP_RULES["zsseg"], expand=expand)
        crops = crop_masks(image, masks, rule, size=32, **PIXELS)
        assert crops.regions().shape == (3, 3, 32, 32)
        return crops.boxes.tolist()

    assert boxes(0.5) == [[12, 6, 17, 10], [29, 19, 30, 20], [7, 5, 22, 15]]
    assert boxes(1.5) == [[7, 2, 22, 14], [28, 18, 30, 20], [0, 0, 30, 20]]


def test_masks_of_a_padded_image() -> None:
    """Padding has the mean colour, under any rule."""
    image, masks = image_and_masks()
    padded = torch.nn.functional.pad(masks, (0, 13, 0, 3), value=0.9)
    crops = crop_masks(image, padded[-1:], "ovseg", size=32, **PIXELS)
    assert crops.boxes.tolist() == [[0, 0, 96, 64]]
    assert (crops.image[:, 61:] == 0).all() and (crops.image[:, :, 83:] == 0).all()
    with pytest.raises(ValueError, match="smaller than the image"):
        crop_masks(image, masks[:, :-1], "ovseg", size=32, **PIXELS)


def test_half_precision_and_float_images() -> None:
    image, masks = image_and_masks()
    whole = crop_masks(image, masks, "ovseg", size=32, **PIXELS).regions()
    half = crop_masks(image.bfloat16(), masks.bfloat16(), "ovseg", size=32, **PIXELS)
    assert half.regions().dtype == torch.bfloat16 and half.regions().shape == whole.shape
    floats = crop_masks(image.float(), masks, "ovseg", size=32, **PIXELS)
    torch.testing.assert_close(floats.regions(), whole)


def test_rules_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown crop rule 'square'"):
        get_crop_rule("square")
    for settings in ({"sampling": "area"}, {"fill": "noise"}, {"expand": 0}):
        with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
            CropRule(**settings)
    with pytest.raises(ValueError, match="require sampling 'bicubic'"):
        CropRule(sampling="roi_align", soft=True)
