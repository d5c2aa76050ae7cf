"""Mask prompts in ViT and EVA towers: which tokens they replace, what learns, what is refused."""

import pytest
import torch
from torch import Tensor

from clipdense.clip import TowerRequest, load_clip
from clipdense.clip.attention import TokenStream
from clipdense.clip.mask_prompts import MaskPrompts, patch_keep
from clipdense.clip.towers import TransformerTower


def tower_of(name: str) -> TransformerTower:
    torch.manual_seed(0)
    return load_clip(name, "random", text=False).visual


def inputs(tower: TransformerTower) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, *tower.image_size, generator=generator)
    masks = torch.zeros(3, 1, *tower.image_size)
    masks[0, :, : tower.stride] = 1  # one row of patches
    masks[1, :, 3 * tower.stride, 2 * tower.stride] = 1  # one pixel
    masks[2] = 1
    return images, masks


def prompts_for(tower: TransformerTower, depth: int) -> MaskPrompts:
    torch.manual_seed(2)
    return MaskPrompts(depth, tower.grid[0] * tower.grid[1], tower.tap_channels[0], std=1.0)


def test_a_patch_stays_with_any_pixel_of_its_mask() -> None:
    masks = torch.zeros(2, 1, 24, 40)
    masks[0, 0, 7, 8] = 1e-3
    keep = patch_keep(masks, 8)
    assert keep.shape == (2, 15) and keep[0].nonzero().tolist() == [[1]] and not keep[1].any()


@pytest.mark.parametrize("name", ["shapes-vit", "shapes-eva"])
@pytest.mark.parametrize("depth", [0, 1, 3])
@torch.no_grad()
def test_what_enters_the_blocks(name: str, depth: int) -> None:
    tower = tower_of(name)
    images, masks = inputs(tower)
    prompts = prompts_for(tower, depth)
    keep = patch_keep(masks, tower.stride)
    replacement = prompts.hook(keep)
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}

    def hook(index: int, stream: TokenStream) -> TokenStream:
        before[index] = stream.x
        stream = replacement(index, stream)
        after[index] = stream.x
        return stream

    pooled = tower(images, TowerRequest(pooled=True), hook=hook).pooled
    torch.testing.assert_close(prompts(tower, images, masks), pooled)
    for index in before:
        places = {-1: 0, **{d: d for d in range(1, depth)}}
        expected = before[index].clone()
        if index in places and places[index] < depth:
            count = keep.shape[1]
            table = prompts.prompts[places[index]].expand(3, -1, -1)
            expected[:, -count:] = torch.where(keep[:, :, None], expected[:, -count:], table)
        torch.testing.assert_close(after[index], expected, atol=0, rtol=0)
    if depth == 0:
        torch.testing.assert_close(pooled, tower(images, TowerRequest(pooled=True)).pooled)


@torch.no_grad()
def test_one_image_is_the_first_of_a_batch_and_a_full_mask_changes_nothing() -> None:
    tower = tower_of("shapes-vit")
    images, masks = inputs(tower)
    prompts = prompts_for(tower, 2)
    together = prompts(tower, images, masks)
    torch.testing.assert_close(prompts(tower, images[:1], masks[:1]), together[:1], atol=1e-5, rtol=0)
    plain = tower(images, TowerRequest(pooled=True)).pooled
    torch.testing.assert_close(together[2], plain[2], atol=1e-5, rtol=0)
    assert (together[:2] - plain[:2]).abs().max() > 1e-2


def test_prompts_learn_where_patches_are_replaced() -> None:
    tower = tower_of("shapes-vit").requires_grad_(False)
    images, masks = inputs(tower)
    prompts = prompts_for(tower, 2)
    prompts(tower, images[:2], masks[:2]).square().sum().backward()
    stays = patch_keep(masks[:2], tower.stride).all(0)
    gradient = prompts.prompts.grad.abs().sum(-1)
    assert (gradient[:, ~stays] > 0).all() and (gradient[:, stays] == 0).all()


@torch.no_grad()
def test_prompts_shared_by_all_places_fit_any_grid() -> None:
    tower = tower_of("shapes-vit")
    shared = MaskPrompts(2, 1, tower.tap_channels[0])
    size = (5 * tower.stride, 9 * tower.stride)
    masks = torch.zeros(1, 1, *size)
    assert shared(tower, torch.randn(1, 3, *size), masks).shape == (1, tower.embed_dim)
    with pytest.raises(ValueError, match="do not fit 5 x 9"):
        prompts_for(tower, 1)(tower, torch.randn(1, 3, *size), masks)


def test_surplus_prompts_have_no_effect_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tower = tower_of("shapes-vit")
    images, masks = inputs(tower)
    depth = len(tower.blocks)
    surplus = prompts_for(tower, depth + 2)
    fitting = MaskPrompts(depth, *surplus.prompts.shape[1:])
    fitting.load_state_dict({"prompts": surplus.prompts[:depth]})
    assert torch.equal(surplus(tower, images, masks), fitting(tower, images, masks))
    fitting.check(tower)
    assert not caplog.records
    surplus.check(tower)
    assert f"Ignoring mask prompts {depth + 1} to {depth + 2}: the tower has {depth} blocks" in caplog.text


def test_new_prompts_deeper_than_the_tower_are_refused() -> None:
    tower = tower_of("shapes-vit")
    assert len(MaskPrompts.of(tower, len(tower.blocks)).prompts) == len(tower.blocks)
    with pytest.raises(ValueError, match="cannot give mask prompts of depth 5: it has 4 blocks"):
        MaskPrompts.of(tower, len(tower.blocks) + 1)
    with pytest.raises(ValueError, match="only ViTs have tokens"):
        MaskPrompts.of(load_clip("shapes-rn", "random", text=False).visual, 1)
