"""Attention of the block view, the table of last-block modes, and their guidance."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor

from clipdense.clip import TowerRequest, load_clip
from clipdense.clip.attention import MODES, Block, TokenStream, dense_mode, get_mode, plain
from clipdense.clip.position import rope_table, rotate
from clipdense.clip.towers.base import to_map
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
    torch.testing.assert_close(plain(block, stream).x, block.source(stream.x), atol=1e-5, rtol=1e-5)


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
            torch.testing.assert_close(get_mode(mode)(block, stream).x, x + source.mlp(source.ln_2(x)))
    torch.testing.assert_close(
        block.key(u), F.linear(u, *(p[32:64] for p in (source.attn.in_proj_weight, source.attn.in_proj_bias)))
    )


@pytest.fixture
def mode_table():
    """Modes that a test registers are removed after it."""
    before = dict(MODES)
    yield
    MODES.clear()
    MODES.update(before)


@pytest.fixture
def tower():
    return load_clip("shapes-vit", "random", text=False).visual


def test_new_mode(mode_table, tower):
    @dense_mode("_")
    def identity(block: Block, stream: TokenStream) -> TokenStream:
        return stream

    images = torch.randn(1, 3, 64, 64)
    assert {"plain", "value", "clipself", "maskclip", "catseg", "_"} <= set(tower.dense_modes)
    dense = tower(images, TowerRequest(dense="_")).dense
    before = tower(images, TowerRequest(taps=(2,))).taps[0][0]
    projected = tower.project(tower.norm_tokens(before.flatten(2).transpose(1, 2)))
    torch.testing.assert_close(dense.flatten(2).transpose(1, 2), projected)


def test_unknown_mode():
    with pytest.raises(ValueError, match="unknown last-block mode 'nope'; known: plain, value"):
        get_mode("nope")


# ---- guidance


@pytest.fixture
def proxy(mode_table):
    """A mode with external attention weights (B, rows, columns, rows, columns) on a grid of their own."""

    @dense_mode("proxy", guidance="attention weights (B, h, w, h, w)")
    def proxy(block: Block, stream: TokenStream, guidance: Tensor) -> TokenStream:
        batch, *grid = guidance.shape[:3]
        v = block.value(block.normed(stream.patches))
        v = F.interpolate(to_map(v, stream.grid), grid, mode="bilinear").flatten(2).transpose(1, 2)
        y = guidance.flatten(3).flatten(1, 2) @ v
        return replace(stream, x=block.out(y), grid=tuple(grid))

    return proxy


@torch.no_grad()
def test_guidance_steers_a_mode(proxy, tower):
    images = torch.randn(2, 3, 64, 64)
    identity = torch.eye(64).reshape(1, 8, 8, 8, 8).expand(2, -1, -1, -1, -1)
    mean = torch.full((2, 8, 8, 8, 8), 1 / 64)
    sharp = tower(images, TowerRequest(dense="proxy", guidance=identity)).dense
    flat = tower(images, TowerRequest(dense="proxy", guidance=mean)).dense
    assert flat.flatten(2).std(2).max() < 1e-5
    assert sharp.flatten(2).std(2).max() > 1e-2


@torch.no_grad()
def test_guided_output_has_the_grid_of_the_guidance(proxy, tower):
    guidance = torch.rand(2, 3, 5, 3, 5)
    request = TowerRequest(pre=True, pooled=True, dense="proxy", guidance=guidance)
    out = tower(torch.randn(2, 3, 64, 64), request)
    assert out.dense.shape == (2, tower.embed_dim, 3, 5)
    assert out.pre.shape[-2:] == (3, 5)
    assert out.pooled.shape == (2, tower.embed_dim)


@torch.no_grad()
def test_unguided_outputs_of_the_same_forward_are_unchanged(proxy, tower):
    images, guidance = torch.randn(1, 3, 64, 64), torch.rand(1, 8, 8, 8, 8)
    last = len(tower.blocks) - 1
    together = tower(images, TowerRequest((last,), pooled=True, dense="proxy", guidance=guidance))
    apart = tower(images, TowerRequest((last,), pooled=True))
    torch.testing.assert_close(together.pooled, apart.pooled)
    torch.testing.assert_close(together.taps[0][0], apart.taps[0][0])


def test_guidance_with_gradient_checkpointing(proxy, tower):
    images, guidance = torch.randn(1, 3, 64, 64), torch.rand(1, 8, 8, 8, 8, requires_grad=True)
    gradients = []
    for enable in (False, True):
        tower.train().set_grad_checkpointing(enable)
        dense = tower(images, TowerRequest(dense="proxy", guidance=guidance)).dense
        gradients.append(torch.autograd.grad(dense.square().sum(), guidance)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dense", ["plain", "value", "catseg"])
def test_mode_without_guidance_refuses_it(tower, dense):
    request = TowerRequest(dense=dense, guidance=torch.rand(1, 8, 8))
    with pytest.raises(ValueError, match=f"mode '{dense}' takes no guidance"):
        tower(torch.randn(1, 3, 64, 64), request)


def test_guided_mode_names_the_missing_guidance(proxy, tower):
    with pytest.raises(ValueError, match=r"mode 'proxy' needs guidance: pass attention weights \(B, h, w"):
        tower(torch.randn(1, 3, 64, 64), TowerRequest(dense="proxy"))


def test_guidance_without_a_dense_output_is_an_error(tower):
    with pytest.raises(ValueError, match="no dense map or last-block tap is requested"):
        tower(torch.randn(1, 3, 64, 64), TowerRequest(pooled=True, guidance=torch.rand(1, 8, 8)))


def test_convolutional_tower_refuses_guidance():
    tower = load_clip("shapes-rn", "random", text=False).visual
    with pytest.raises(ValueError, match="ResNetTower cannot give an output with guidance"):
        tower(torch.randn(1, 3, 64, 64), TowerRequest(dense="plain", guidance=torch.rand(1, 2, 2)))
