"""The block view's attention, and the table of last-block modes."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor

from clipdense.clip import TowerRequest, load_clip
from clipdense.clip.attention import MODES, Block, TokenStream, dense_mode, get_mode, plain
from clipdense.clip.position import rope_table, rotate
from clipdense.clip.towers.vit import ClipBlock


def _block() -> ClipBlock:
    torch.manual_seed(0)
    return ClipBlock(ResidualAttentionBlock(32, 4).eval())


def _stream(grid: tuple[int, int] = (4, 6), prefix: int = 1, **kwargs: object) -> TokenStream:
    x = torch.randn(2, prefix + grid[0] * grid[1], 32, generator=torch.Generator().manual_seed(1))
    return TokenStream(x, grid, **kwargs)


def _softmax_attention(block: Block, stream: TokenStream, bias: Tensor) -> Tensor:
    q, k, v = (t.reshape(2, -1, 4, 8).transpose(1, 2) for t in block.qkv(block.normed(stream.x)))
    logits = q @ k.transpose(2, 3) / 8**0.5 + bias
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _attend(block: Block, stream: TokenStream) -> Tensor:
    return block.attend(*block.qkv(block.normed(stream.x)), stream)


@torch.no_grad()
def test_block_view_equals_the_block():
    block, stream = _block(), _stream()
    torch.testing.assert_close(plain(block, stream), block.source(stream.x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bias_and_causality():
    block, length = _block(), 25
    causal = torch.full((length, length), -torch.inf).triu(1)
    expected = _softmax_attention(block, _stream(), causal)
    torch.testing.assert_close(_attend(block, _stream(bias=causal)), expected)
    torch.testing.assert_close(_attend(block, _stream(causal=True)), expected)
    assert not torch.allclose(_attend(block, _stream()), expected, atol=1e-3)


@pytest.mark.parametrize(("grid", "side"), [((4, 6), 2), ((5, 7), 3), ((4, 6), 3), ((2, 2), 4)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@torch.no_grad()
def test_windows(grid, side, prefix):
    """Patches see their window and the prefix; the prefix sees all; RoPE is that of the whole grid."""
    block, stream = _block(), _stream(grid, prefix, window=side)
    rows, columns = torch.meshgrid(*(torch.arange(n) // side for n in grid), indexing="ij")
    window = torch.stack([rows.flatten(), columns.flatten()], 1)
    bias = torch.zeros(2 * [stream.x.shape[1]])
    apart = (window[:, None] != window[None]).any(2)
    bias[prefix:, prefix:].masked_fill_(apart, -torch.inf)
    torch.testing.assert_close(_attend(block, stream), _softmax_attention(block, stream, bias))
    stream.rope = rope_table(grid, 8, (4, 4))
    rotated = _attend(block, stream)
    stream.window, stream.bias = 0, bias
    torch.testing.assert_close(rotated, _attend(block, stream))


def test_a_bias_excludes_windows_and_causality():
    bias = torch.zeros(25, 25)
    for other in ({"window": 2}, {"causal": True}):
        with pytest.raises(ValueError, match="cannot be combined"):
            _attend(_block(), _stream(bias=bias, **other))


@torch.no_grad()
def test_rope_turns_patches_only():
    block = _block()
    rope = rope_table((4, 6), 8, (4, 4))
    stream = _stream(rope=rope)
    q, k, v = (t.reshape(2, -1, 4, 8).transpose(1, 2) for t in block.qkv(block.normed(stream.x)))
    q, k = (torch.cat([t[:, :, :1], rotate(t[:, :, 1:], rope)], 2) for t in (q, k))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(_attend(block, stream), expected)


@torch.no_grad()
def test_value_modes():
    block, stream = _block(), _stream()
    source = block.source
    u = source.ln_1(stream.x)
    v = F.linear(u, source.attn.in_proj_weight[64:], source.attn.in_proj_bias[64:])
    for modes, residual in (
        (("value", "clipself", "maskclip"), stream.x),
        (("catseg",), stream.x[:, :1].expand_as(stream.x)),
    ):
        x = residual + source.attn.out_proj(v)
        for mode in modes:
            torch.testing.assert_close(get_mode(mode)(block, stream), x + source.mlp(source.ln_2(x)))
    torch.testing.assert_close(
        block.key(u), F.linear(u, *(p[32:64] for p in (source.attn.in_proj_weight, source.attn.in_proj_bias)))
    )


def test_the_table_of_modes_is_open(monkeypatch):
    monkeypatch.setitem(MODES, "_", plain)

    @dense_mode("_")
    def nothing(block: Block, stream: TokenStream) -> Tensor:
        return stream.x

    stream = _stream()
    assert get_mode("_")(_block(), stream) is stream.x
    tower = load_clip("shapes-vit", "random", text=False).visual
    images = torch.randn(1, 3, 64, 64)
    assert tower.dense_modes == ("plain", "value", "clipself", "maskclip", "catseg", "_")
    dense = tower(images, TowerRequest(dense="_")).dense
    before = tower(images, TowerRequest(taps=(2,))).taps[0][0]
    projected = tower.project(tower.norm_tokens(before.flatten(2).transpose(1, 2)))
    torch.testing.assert_close(dense.flatten(2).transpose(1, 2), projected)
    with pytest.raises(ValueError, match="unknown last-block mode 'nope'; known: plain, value"):
        get_mode("nope")
