"""Pixel normalisation of a CLIP."""

import pytest
import torch
from torchvision.transforms.v2.functional import normalize

from clipdense.clip import load_clip
from clipdense.clip.pixels import normalize_pixels

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5)])
def test_normalisation_equals_torchvision(shape):
    images = torch.randint(256, shape, dtype=torch.uint8)
    expected = normalize(images.float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(normalize_pixels(images, MEAN, STD), expected)
    torch.testing.assert_close(normalize_pixels(images.float(), MEAN, STD), expected)


def test_floating_point_images_keep_their_type():
    images = 255 * torch.rand(3, 4, 5, dtype=torch.float64)
    assert normalize_pixels(images, MEAN, STD).dtype == torch.float64
    assert normalize_pixels(images.byte(), MEAN, STD).dtype == torch.float32


def test_model_normalises_with_its_own_statistics():
    clip = load_clip("shapes-vit", "random")
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = normalize_pixels(images, clip.pixel_mean, clip.pixel_std)
    assert torch.equal(clip.normalize(images), expected)
