"""Mask tokens against one masked forward per mask, and what they must leave alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clipdense.clip import TowerRequest, load_clip
from clipdense.clip.attention import TokenStream
from clipdense.clip.mask_tokens import MaskTokens, embed_mask_tokens
from clipdense.clip.towers import TransformerTower


def _tower(name: str) -> TransformerTower:
    torch.manual_seed(0)
    return load_clip(name, "random", text=False).visual


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 48, 80, generator=generator)
    masks = (torch.rand(2, 3, 6, 10, generator=generator) > 0.6).float()
    masks[0, 1] = 0
    return images, masks


def _second_class_token(tower: TransformerTower, image: Tensor, mask: Tensor) -> Tensor:
    """The embedding of a class token beside the first that sees that one and the patches inside."""
    embeddings = []

    def hook(index: int, stream: TokenStream) -> TokenStream:
        if index == 0:
            x = torch.cat([stream.x[:, :1], stream.x], dim=1)
            bias = torch.zeros(x.shape[1], x.shape[1])
            bias[:, 1] = -torch.inf
            bias[1, 2:].masked_fill_(mask.flatten() <= 0, -torch.inf)
            return replace(stream, x=x, bias=bias)
        if index == len(tower.blocks):
            embeddings.append(tower.pool(stream.x[:, 1:]))
        return stream

    tower(image[None], TowerRequest(pooled=True), hook=hook)
    return embeddings[0][0]


@pytest.mark.parametrize("name", ["shapes-vit", "shapes-eva"])
@torch.no_grad()
def test_a_copy_is_a_class_token_that_sees_its_mask(name):
    tower, (images, masks) = _tower(name), _inputs()
    embeddings = embed_mask_tokens(tower, images, masks)
    assert embeddings.shape == (2, 3, tower.embed_dim)
    for b in range(2):
        for q in range(3):
            expected = _second_class_token(tower, images[b], masks[b, q])
            torch.testing.assert_close(embeddings[b, q], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(embeddings[0, 1], embeddings[0, 0], atol=1e-3)


@pytest.mark.parametrize("name", ["shapes-vit", "shapes-eva"])
@torch.no_grad()
def test_nothing_else_changes_and_a_full_mask_is_nearly_the_image(name):
    tower, (images, masks) = _tower(name), _inputs()
    want = TowerRequest(taps=(1,), dense="clipself", pooled=True)
    alone, hook = tower(images, want), MaskTokens(tower, masks.bool())
    beside = tower(images, want, hook=hook)
    for a, b in (
        (alone.pooled, beside.pooled),
        (alone.dense, beside.dense),
        (alone.taps[0][0], beside.taps[0][0]),
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(hook.embeddings, embed_mask_tokens(tower, images, masks))
    whole = embed_mask_tokens(tower, images, torch.ones_like(masks))
    torch.testing.assert_close(whole, alone.pooled[:, None].expand_as(whole), atol=1e-5, rtol=1e-4)
    assert embed_mask_tokens(tower, images, masks[:, :0]).shape == (2, 0, tower.embed_dim)


def test_gradients_reach_the_class_token():
    tower, (images, masks) = _tower("shapes-eva"), _inputs()
    embed_mask_tokens(tower.train(), images, masks).square().sum().backward()
    assert tower.trunk.cls_token.grad.any() and tower.trunk.blocks[0].attn.v_proj.weight.grad.any()


def test_errors():
    tower, (images, masks) = _tower("shapes-vit"), _inputs()
    with pytest.raises(ValueError, match=r"masks \(2, 3, 6, 9\) do not fit 2 images of 6 x 10 patches"):
        embed_mask_tokens(tower, images, masks[..., 1:])
    tower.pools_class_token = False
    with pytest.raises(ValueError, match="ViTTower cannot give mask tokens: its image embedding is not"):
        embed_mask_tokens(tower, images, masks)
