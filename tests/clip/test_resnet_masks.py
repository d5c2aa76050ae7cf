"""Masks of the ResNets' attention pool: one query for all masks, against attention with keys and values."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipdense.clip.towers.resnet import masked_attention_pool

CHANNELS, HEADS, SIZE = 64, 4, (5, 7)


def with_keys(pool: AttentionPool2d, x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    """Attend from the mean token to the positions inside each mask, by torch's attention."""
    tokens = x.flatten(2).transpose(1, 2)
    query = pool.q_proj(tokens.mean(1, keepdim=True) + positions[:1])
    tokens = tokens + positions[1:]
    q, k, v = (
        y.unflatten(2, (HEADS, -1)).transpose(1, 2)
        for y in (query.expand(-1, masks.shape[1], -1), pool.k_proj(tokens), pool.v_proj(tokens))
    )
    inside = (masks.flatten(2) > 0)[:, None]
    return pool.c_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=inside).transpose(1, 2).flatten(2))


@pytest.fixture
def case() -> tuple[AttentionPool2d, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    pool = AttentionPool2d(4, CHANNELS, HEADS, 32)
    masks = torch.randn(2, 9, *SIZE)
    masks[1, 2] = 1  # the whole map
    x = torch.randn(2, CHANNELS, *SIZE, requires_grad=True)
    return pool, x, torch.randn(1 + SIZE[0] * SIZE[1], CHANNELS), masks


def test_equals_attention_with_keys(case: tuple[AttentionPool2d, Tensor, Tensor, Tensor]) -> None:
    """Values and gradients; every parameter takes part, as distributed training needs it."""
    pool, x, _, _ = case
    ours, other = masked_attention_pool(*case), with_keys(*case)
    torch.testing.assert_close(ours, other)
    wrong = with_keys(*case[:3], -case[3])
    assert not torch.allclose(ours, wrong, atol=1e-2)
    learned = [x, *(layer.weight for layer in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj))]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), learned) for y in (ours, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    masked_attention_pool(*case).sum().backward()
    assert pool.k_proj.bias.grad is not None


def test_empty_masks(case: tuple[AttentionPool2d, Tensor, Tensor, Tensor]) -> None:
    pool, x, positions, masks = case
    masks[0, 3] = -1
    found = masked_attention_pool(pool, x, positions, masks)
    torch.testing.assert_close(found[0, 3], pool.c_proj.bias)
    assert found.isfinite().all()


def test_positions_have_no_keys(case: tuple[AttentionPool2d, Tensor, Tensor, Tensor]) -> None:
    """The values of the positions, and the output of each mask, are what remains."""
    counts = []
    for run in (masked_attention_pool, with_keys):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(*case)
        counts.append(counter.get_total_flops())
    keys = 2 * 2 * SIZE[0] * SIZE[1] * CHANNELS**2
    assert counts[0] < counts[1] - 0.5 * keys
