"""Overlapping patches: a smaller stride of the patch convolution, for every ViT."""

import pytest
import torch

from clipdense.clip import load_clip
from clipdense.clip.position import resize_table, rope_table
from clipdense.clip.towers import TimmViTTower, TowerRequest, TransformerTower, ViTTower, build_tower
from tests.helpers.towers import FAMILIES, random_images, tower_pair

VITS = [name for name in FAMILIES if name not in ("resnet", "convnext", "convnext_mlp")]


@pytest.fixture(params=VITS)
def tower(request: pytest.FixtureRequest) -> TransformerTower:
    built = tower_pair(request.param)[1]
    assert isinstance(built, TransformerTower)
    return built


@torch.no_grad()
def test_the_patch_size_is_the_plain_tower(tower: TransformerTower) -> None:
    images = random_images(tower, (80, 112))
    dense = tower.dense_modes[0] if tower.dense_modes else None
    request = TowerRequest((0,), pre=True, dense=dense, keys=True, pooled=True)
    plain = tower(images, request)
    tower.set_patch_stride(4)
    assert not torch.equal(tower(images, request).pooled, plain.pooled)
    tower.set_patch_stride(tower.patch_size)
    again = tower(images, request)
    assert torch.equal(again.pooled, plain.pooled) and torch.equal(again.pre, plain.pre)
    assert torch.equal(again.keys, plain.keys) and torch.equal(again.taps[0][0], plain.taps[0][0])


@torch.no_grad()
@pytest.mark.parametrize("stride", [8, 5])
def test_a_smaller_stride_gives_a_larger_map(tower: TransformerTower, stride: int) -> None:
    tower.set_patch_stride(stride)
    dense = tower.dense_modes[:2][-1] if tower.dense_modes else None
    out = tower(random_images(tower, (80, 101)), TowerRequest((0,), pre=True, dense=dense, pooled=True))
    grid = (80 // stride, 101 // stride)
    assert out.pre.shape[-2:] == grid and out.taps[0][0].shape[-2:] == grid and out.taps[0][1] == stride
    assert out.pooled.shape == (2, tower.embed_dim) and out.pre.isfinite().all()
    if dense:
        assert out.dense.shape == (2, tower.embed_dim, *grid)


@torch.no_grad()
def test_every_patch_is_the_middle_of_its_cell() -> None:
    """A bright pixel changes the patch embeddings of the patches that cover it, and no others."""
    visual, tower = tower_pair("vit")
    assert isinstance(tower, ViTTower)
    tower.set_patch_stride(8)
    images = torch.zeros(1, 3, 64, 64)
    flat = tower.convolve_patches(images, tower.conv1)
    images[..., 24:32, 32:40] = 1  # cell (3, 4)
    changed = (tower.convolve_patches(images, tower.conv1) - flat).abs().sum(1)[0] > 1e-6
    assert changed.nonzero().amin(0).tolist() == [2, 3] and changed.nonzero().amax(0).tolist() == [4, 5]
    # at the places where patches do not cross the border, it is the same convolution
    tower.set_patch_stride(16)
    whole = tower.convolve_patches(images[..., 4:-12, 4:-12], tower.conv1)
    tower.set_patch_stride(8)
    torch.testing.assert_close(tower.convolve_patches(images, tower.conv1)[..., 1:6:2, 1:6:2], whole)
    assert visual.conv1.stride == (16, 16)  # the module of the caller is as it was


@torch.no_grad()
def test_positions_are_those_of_the_centres() -> None:
    tower = tower_pair("vit")[1]
    assert isinstance(tower, ViTTower)
    tower.set_patch_stride(8)
    seen = []
    tower.conv1.weight.zero_()
    tower.ln_pre = torch.nn.Identity()
    tower(random_images(tower), hook=lambda i, stream: seen.append(stream.x.clone()) or stream)
    expected = resize_table(tower.positional_embedding, (4, 4), (8, 8), tower.position_rule)[1:]
    torch.testing.assert_close(seen[1][0, 1:], expected)


def test_rope_counts_whole_patches() -> None:
    """Between two cells that are one patch apart, phases differ as in the plain tower."""
    coarse, _ = rope_table((4, 4), 16, None)
    assert torch.equal(rope_table((4, 4), 16, None, spacing=1.0)[0], coarse)
    for reference in (None, (4, 4)):
        sin, cos = (t.reshape(8, 8, 16) for t in rope_table((8, 8), 16, reference, spacing=0.5))
        plain_sin, plain_cos = (t.reshape(4, 4, 16) for t in rope_table((4, 4), 16, reference))
        fine = sin[2] * cos[0] - cos[2] * sin[0]  # sine of the difference of the phases
        plain = plain_sin[1] * plain_cos[0] - plain_cos[1] * plain_sin[0]
        torch.testing.assert_close(fine[0], plain[0])
        torch.testing.assert_close(sin[0].mean(0)[:8], sin[0, 0, :8])  # columns do not turn the row half


def test_what_does_not_fit_is_named() -> None:
    vit, resnet = tower_pair("vit")[1], tower_pair("resnet")[1]
    for stride in (0, 17):
        with pytest.raises(ValueError, match=f"patch stride of {stride} pixels: its patches allow 1 to 16"):
            vit.set_patch_stride(stride)
    with pytest.raises(ValueError, match="only ViTs have patches"):
        resnet.set_patch_stride(4)
    vit.set_patch_stride(4)
    with pytest.raises(ValueError, match="at least 16 px a side"):
        vit(torch.zeros(1, 3, 12, 32))


@torch.no_grad()
def test_a_finer_map_of_a_trained_clip_keeps_its_content() -> None:
    """The nano EVA's map at half the stride, averaged over 2 x 2 cells, resembles its plain map."""
    tower = load_clip("shapes-eva", text=False).visual
    assert isinstance(tower, TimmViTTower)
    images = torch.nn.functional.interpolate(torch.randn(2, 3, 6, 6), (96, 96), mode="bicubic")
    plain = tower(images, TowerRequest(dense="value")).dense
    tower.set_patch_stride(4)
    fine = torch.nn.functional.avg_pool2d(tower(images, TowerRequest(dense="value")).dense, 2)
    assert torch.cosine_similarity(fine, plain, dim=1).mean() > 0.9
    assert torch.cosine_similarity(fine, plain.flip(3), dim=1).mean() < 0.8


def test_towers_of_one_module_have_strides_of_their_own() -> None:
    visual = FAMILIES["vit"]()
    first, second = build_tower(visual), build_tower(visual)
    first.set_patch_stride(8)
    assert (first.stride, second.stride) == (8, 16)
