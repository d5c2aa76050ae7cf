"""Every tower family against open_clip's own forward, and the contract that they share."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from clipdense.clip.attention import TokenStream
from clipdense.clip.towers import ResNetTower, TextTower, Tower, TowerRequest, TransformerTower, build_tower

DIM = 24
EVA = {
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "use_rot_pos_emb": True,
    "ref_feat_shape": (3, 3),
}


def _timm(trunk: nn.Module, head: nn.Module | None = None) -> TimmModel:
    visual = TimmModel.__new__(TimmModel)  # its constructor takes registered, full-size trunks only
    nn.Module.__init__(visual)
    visual.trunk, visual.head, visual.image_size = trunk, head or nn.Sequential(), (64, 64)
    return visual


def _vit(**kwargs: object) -> VisionTransformer:
    sizes = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 2.0}
    return VisionTransformer(**{**sizes, "output_dim": DIM, **kwargs})


def _convnext(head: nn.Module) -> TimmModel:
    return _timm(ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=0), head)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ModifiedResNet([1, 2, 1, 1], DIM, 4, image_size=96, width=8),
    "vit": _vit,
    "vit_clipa": lambda: _vit(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True, ls_init_value=0.1),
    "vit_rectangular": lambda: _vit(image_size=(48, 80)),
    "eva02": lambda: _timm(
        Eva(
            **EVA,
            num_classes=DIM,
            global_pool="token",
            qkv_fused=False,
            swiglu_mlp=True,
            scale_mlp=True,
            scale_attn_inner=True,
        )
    ),
    "eva01": lambda: _timm(
        Eva(**{**EVA, "use_rot_pos_emb": False}, num_classes=DIM, global_pool="token", init_values=0.1)
    ),
    "eva_post_norm": lambda: _timm(Eva(**EVA, num_classes=DIM, global_pool="token", use_post_norm=True)),
    "pe": lambda: _timm(
        Eva(
            **EVA,
            num_classes=DIM,
            global_pool="map",
            attn_type="rope",
            use_pre_transformer_norm=True,
            rope_grid_offset=1.0,
            rope_grid_indexing="xy",
        )
    ),
    "siglip": lambda: _timm(
        TimmVisionTransformer(
            img_size=64,
            patch_size=16,
            embed_dim=DIM,
            depth=3,
            num_heads=2,
            class_token=False,
            global_pool="map",
            num_classes=0,
        )
    ),
    "timm_gap": lambda: _timm(
        TimmVisionTransformer(
            img_size=64, patch_size=16, embed_dim=32, depth=3, num_heads=2, global_pool="avg", num_classes=0
        ),
        nn.Sequential(nn.Linear(32, DIM, bias=False)),
    ),
    "timm_no_class": lambda: _timm(
        TimmVisionTransformer(
            img_size=64,
            patch_size=16,
            embed_dim=32,
            depth=3,
            num_heads=2,
            class_token=False,
            global_pool="avg",
            num_classes=0,
        ),
        nn.Sequential(nn.Linear(32, DIM, bias=False)),
    ),
    "convnext": lambda: _convnext(nn.Sequential(nn.Linear(32, DIM, bias=False))),
    "convnext_mlp": lambda: _convnext(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, DIM))),
}


def randomise(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value that shows when it is skipped."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                positive = name.endswith("running_var") or tensor.dim() == 1
                tensor.copy_(
                    0.2 * noise.abs() + 0.6 if positive else noise * 0.6 / max(tensor[0].numel(), 9) ** 0.5
                )
    return module.eval()


def _pair(family: str, position_rule: str = "bicubic") -> tuple[nn.Module, Tower]:
    visual = randomise(FAMILIES[family]())
    return visual, build_tower(visual, position_rule).eval()


def _images(tower: Tower, size: tuple[int, int] | None = None, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *(size or tower.image_size), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_native_size_equals_open_clip(family):
    visual, tower = _pair(family)
    images = _images(tower)
    expected = visual(images)
    assert expected.std() > 1e-2
    pooled = tower(images).pooled
    torch.testing.assert_close(pooled, expected, atol=2e-5, rtol=1e-4)
    assert pooled.shape[1] == tower.embed_dim


@torch.no_grad()
def test_taps_equal_open_clip(family):
    visual, tower = _pair(family)
    images = _images(tower)
    taps = tuple(tower.tap_channels)
    ours = tower(images, TowerRequest(taps=taps)).taps
    theirs = visual.forward_intermediates(images, intermediates_only=True)["image_intermediates"]
    theirs = theirs[-len(taps) :]  # open_clip counts the ResNet's stem as well
    for tap, (ours_map, stride), theirs_map in zip(taps, ours, theirs, strict=True):
        torch.testing.assert_close(ours_map, theirs_map, atol=2e-5, rtol=1e-4)
        assert (ours_map.shape[1], stride) == (tower.tap_channels[tap], tower.tap_strides[tap])
        assert ours_map.shape[2] == images.shape[2] // stride


@torch.no_grad()
def test_any_size(family):
    _, tower = _pair(family)
    dense = tower.dense_modes[-1] if tower.dense_modes else None
    want = TowerRequest(tuple(tower.tap_channels), pre=True, dense=dense, keys=tower.has_keys, pooled=True)
    for size in ((64, 64), (101, 67), (33, 150), (160, 96)):
        out = tower(_images(tower, size), want)
        h, w = size[0] // tower.stride, size[1] // tower.stride
        assert out.pre.shape[-2:] == (h, w)
        assert out.pooled.shape == (2, tower.embed_dim)
        if dense:
            assert out.dense.shape == (2, tower.embed_dim, h, w)
        if tower.has_keys:
            assert out.keys.shape[-2:] == (h, w)
        for value in (out.pre, out.pooled, *(m for m, _ in out.taps)):
            assert value.isfinite().all()


@torch.no_grad()
def test_one_forward_equals_separate_ones(family):
    _, tower = _pair(family)
    images = _images(tower, (80, 112))
    dense = tower.dense_modes[-1] if tower.dense_modes else None
    together = tower(images, TowerRequest((max(tower.tap_channels),), True, dense, tower.has_keys, True))
    torch.testing.assert_close(together.pooled, tower(images).pooled)
    torch.testing.assert_close(together.pre, tower(images, TowerRequest(pre=True, dense=dense)).pre)
    last = tower(images, TowerRequest((max(tower.tap_channels),))).taps[0][0]
    torch.testing.assert_close(together.taps[0][0], last)
    if dense:
        torch.testing.assert_close(together.dense, tower(images, TowerRequest(dense=dense)).dense)
    if tower.has_keys:
        torch.testing.assert_close(together.keys, tower(images, TowerRequest(keys=True)).keys)


@torch.no_grad()
def test_only_what_is_needed_runs(family):
    _, tower = _pair(family)
    ran: list[str] = []
    if isinstance(tower, TransformerTower):
        parts = [block.mlp for block in tower.blocks]
    elif isinstance(tower, ResNetTower):
        parts = [getattr(tower, f"layer{i}") for i in range(1, 5)]
    else:
        parts = list(tower.trunk.stages)
    for index, part in enumerate(parts):
        part.register_forward_hook(lambda *_, index=index: ran.append(str(index)))
    tower(_images(tower), TowerRequest(taps=(min(tower.tap_channels),)))
    assert ran == ["0"]
    ran.clear()
    tower(_images(tower), TowerRequest(taps=tuple(tower.tap_channels), pre=True, pooled=True))
    assert ran == [str(i) for i in range(len(parts))]


def test_gradients_reach_the_weights(family):
    _, tower = _pair(family)
    images = _images(tower, (96, 70))
    dense = tower.dense_modes[0] if tower.dense_modes else None
    out = tower(images, TowerRequest(pre=True, dense=dense, pooled=True))
    (out.pooled.sum() + (out.dense if dense else out.pre).square().sum()).backward()
    missing = [
        n for n, p in tower.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    # A key bias shifts every logit of a query alike.
    assert [n for n in missing if not n.endswith("k_proj.bias")] == []


@torch.no_grad()
def test_a_copy_is_independent(family):
    _, tower = _pair(family)
    images = _images(tower)
    twin, expected = deepcopy(tower), tower(images).pooled
    for parameter in tower.parameters():
        parameter.zero_()
    assert torch.equal(twin(images).pooled, expected)


@torch.no_grad()
def test_half_precision_and_channels_last(family):
    _, tower = _pair(family)
    images = _images(tower, (96, 80))
    expected = tower(images).pooled
    half = tower(images.to(memory_format=torch.channels_last)).pooled
    torch.testing.assert_close(half, expected, atol=1e-4, rtol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        half = tower(images).pooled
    assert torch.nn.functional.cosine_similarity(half.float(), expected).min() > 0.99
    half = tower.bfloat16()(images.to(memory_format=torch.channels_last)).pooled
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.float(), expected).min() > 0.99


@torch.no_grad()
def test_plain_dense_is_the_class_tokens_path_for_each_patch():
    visual, tower = _pair("vit")
    images = _images(tower)
    tokens = visual.ln_post(visual.transformer(visual._embeds(images)))[:, 1:] @ visual.proj
    dense = tower(images, TowerRequest(dense="plain")).dense
    torch.testing.assert_close(dense.flatten(2).transpose(1, 2), tokens, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_mean_of_dense_is_the_embedding_where_the_head_is_linear():
    _, tower = _pair("timm_gap")
    tower.trunk.fc_norm = nn.Identity()
    out = tower(_images(tower), TowerRequest(dense="plain", pooled=True))
    torch.testing.assert_close(out.dense.mean((2, 3)), out.pooled, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "eva02", "eva01", "eva_post_norm"])
@torch.no_grad()
def test_value_mode_equals_attention_to_oneself(name):
    """The value path is the plain block under an identity attention mask."""
    _, tower = _pair(name)
    images = _images(tower, (80, 48))
    last = len(tower.blocks) - 1

    def alone(index: int, stream: TokenStream) -> TokenStream:
        length = stream.x.shape[1]
        stream.bias = (
            torch.zeros(length, length).fill_(-torch.inf).fill_diagonal_(0) if index == last else None
        )
        return stream

    masked = tower(images, TowerRequest(dense="plain"), hook=alone).dense
    torch.testing.assert_close(tower(images, TowerRequest(dense="value")).dense, masked, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(tower(images, TowerRequest(dense="plain")).dense, masked, atol=1e-2)


@pytest.mark.parametrize("name", ["vit", "eva02", "eva01", "eva_post_norm"])
@torch.no_grad()
def test_catseg_mode_replaces_the_residual_by_the_class_token(name):
    """Where all tokens that enter the last block are equal, it is the value mode; elsewhere it is not."""
    _, tower = _pair(name)
    images, last = _images(tower, (80, 48)), len(tower.blocks) - 1

    def equal(index: int, stream: TokenStream) -> TokenStream:
        x = stream.x[:, :1].expand_as(stream.x) if index == last else stream.x
        return replace(stream, x=x)

    value, catseg = (
        tower(images, TowerRequest(dense=mode), hook=equal).dense for mode in ("value", "catseg")
    )
    torch.testing.assert_close(catseg, value)
    value, catseg = (tower(images, TowerRequest(dense=mode)).dense for mode in ("value", "catseg"))
    assert not torch.allclose(catseg, value, atol=1e-2)


@torch.no_grad()
def test_resnet_value_mode_is_two_linear_maps_of_c5():
    visual, tower = _pair("resnet")
    out = tower(_images(tower), TowerRequest(pre=True, dense="value", keys=True))
    c5, pool = out.pre.permute(0, 2, 3, 1), visual.attnpool
    torch.testing.assert_close(
        out.dense.permute(0, 2, 3, 1), pool.c_proj(pool.v_proj(c5)), atol=2e-5, rtol=1e-4
    )
    assert torch.equal(tower(_images(tower), TowerRequest(dense="maskclip")).dense, out.dense)
    torch.testing.assert_close(out.keys.permute(0, 2, 3, 1), pool.k_proj(c5), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_eva_equals_timm_on_a_rectangular_model():
    """timm builds RoPE and positions for one size; ours must agree where that size is not square."""
    settings = {**EVA, "img_size": (48, 112)}
    visual = randomise(_timm(Eva(**settings, num_classes=DIM, global_pool="token", qkv_fused=False)))
    tower = build_tower(visual).eval()
    images = _images(tower)
    assert tower.grid == (3, 7)
    torch.testing.assert_close(tower(images).pooled, visual(images), atol=2e-5, rtol=1e-4)
    out = tower(images, TowerRequest(taps=(2,))).taps[0][0]
    theirs = visual.forward_intermediates(images, intermediates_only=True)["image_intermediates"][2]
    torch.testing.assert_close(out, theirs, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_position_rule_is_what_resizes(family):
    _, tower = _pair(family)
    if "convnext" in family:
        pytest.skip("has no positions")
    larger = tuple(2 * side for side in tower.image_size)
    bicubic = tower(_images(tower, larger)).pooled
    tower.position_rule = "bilinear"
    assert not torch.allclose(tower(_images(tower, larger)).pooled, bicubic, atol=1e-5)
    tower.position_rule = "crop"
    with pytest.raises(ValueError, match="larger than the"):
        tower(_images(tower, larger))
    assert tower(_images(tower, (48, 64))).pooled.isfinite().all()


@torch.no_grad()
def test_regions_of_the_resnet():
    """A box around a native-size image pools as the image; a mask of everything attends to every position."""
    _, tower = _pair("resnet")
    images = _images(tower)
    out = tower(images, TowerRequest(pre=True, pooled=True))
    whole = torch.tensor([[0.0, 0.0, 96.0, 96.0]])
    boxes = tower.embed_regions(out.pre, boxes=[whole, whole.expand(2, 4)])
    assert boxes.shape == (3, DIM)
    torch.testing.assert_close(boxes, out.pooled[[0, 1, 1]], atol=2e-5, rtol=1e-4)

    half = tower.embed_regions(out.pre.bfloat16().float(), boxes=[whole, whole])
    low = deepcopy(tower).bfloat16().embed_regions(out.pre.bfloat16(), boxes=[whole, whole])
    assert low.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(low.float(), half).min() > 0.99

    masks = torch.zeros(2, 3, 3, 3)
    masks[:, 0], masks[:, 1, 1, 2] = 1, 1
    regions = tower.embed_regions(out.pre, masks=masks)
    pool, positions = tower.attnpool, tower.attnpool.positional_embedding
    cell = out.pre[:, :, 1, 2] + positions[1 + 1 * 3 + 2]
    torch.testing.assert_close(regions[:, 1], pool.c_proj(pool.v_proj(cell)), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(regions[:, 2], pool.c_proj.bias.expand(2, -1))
    assert not torch.allclose(regions[:, 0], regions[:, 1], atol=1e-2)


@torch.no_grad()
def test_regions_of_the_convnext():
    _, tower = _pair("convnext_mlp")
    out = tower(_images(tower, (64, 64)), TowerRequest(pre=True, pooled=True, dense="plain"))
    everything = tower.embed_regions(out.pre, masks=torch.ones(2, 1, 2, 2))
    torch.testing.assert_close(everything[:, 0], out.pooled, atol=2e-5, rtol=1e-4)
    one = torch.zeros(2, 1, 2, 2)
    one[:, 0, 1, 0] = 3.0
    torch.testing.assert_close(tower.embed_regions(out.pre, masks=one)[:, 0], out.dense[:, :, 1, 0])
    boxes = [torch.tensor([[0.0, 0.0, 64.0, 64.0]])] * 2
    assert tower.embed_regions(out.pre, boxes=boxes).shape == (2, DIM)


@pytest.mark.parametrize("name", ["siglip", "pe"])
@torch.no_grad()
def test_regions_of_attention_pooling_heads(name):
    visual, tower = _pair(name)
    images = _images(tower)
    out = tower(images, TowerRequest(pre=True))
    whole = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    boxes = tower.embed_regions(out.pre, boxes=[whole, whole])
    everything = tower.embed_regions(out.pre, masks=torch.ones(2, 2, 4, 4))
    torch.testing.assert_close(everything, boxes[:, None].expand(2, 2, -1), atol=2e-5, rtol=1e-4)
    if name == "siglip":  # no class token: pooling every patch is the image embedding
        torch.testing.assert_close(boxes, visual(images), atol=2e-5, rtol=1e-4)
    with pytest.raises(
        ValueError, match="TimmViTTower cannot give dense 'plain': its attention-pooling head"
    ):
        tower(images, TowerRequest(dense="plain"))


def test_what_a_tower_cannot_give_is_an_error():
    _, vit = _pair("vit")
    _, convnext = _pair("convnext")
    images = _images(vit)
    with pytest.raises(ValueError, match="ViTTower cannot give tap 7"):
        vit(images, TowerRequest(taps=(7,)))
    with pytest.raises(ValueError, match="ConvNeXtTower cannot give dense 'value': its modes are plain"):
        convnext(images, TowerRequest(dense="value"))
    _, resnet = _pair("resnet")
    with pytest.raises(
        ValueError, match="ResNetTower cannot give dense 'catseg': its modes are plain, value"
    ):
        resnet(_images(resnet), TowerRequest(dense="catseg"))
    _, no_class = _pair("timm_no_class")
    with pytest.raises(
        ValueError, match="TimmViTTower cannot give dense 'catseg': its modes are plain, value"
    ):
        no_class(images, TowerRequest(dense="catseg"))
    with pytest.raises(ValueError, match="ConvNeXtTower cannot give keys"):
        convnext(images, TowerRequest(keys=True))
    with pytest.raises(ValueError, match="ViTTower cannot give region embeddings of boxes"):
        vit.embed_regions(images, boxes=[])
    with pytest.raises(ValueError, match="either boxes or masks"):
        vit.embed_regions(images)
    with pytest.raises(ValueError, match="at least 16 px"):
        vit(images[..., :10])
    with pytest.raises(AttributeError, match="'dense' was not asked for"):
        _ = vit(images).dense
    with pytest.raises(ValueError, match="unknown position rule 'nearest'"):
        build_tower(FAMILIES["vit"](), "nearest")


def test_towers_that_are_not_supported():
    with pytest.raises(ValueError, match="attentional pooler"):
        build_tower(_vit(attentional_pool=True, attn_pooler_heads=2))
    with pytest.raises(ValueError, match="patch dropout"):
        build_tower(_vit(patch_dropout=0.5))
    with pytest.raises(ValueError, match="no tower for Linear"):
        build_tower(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="CustomResidualAttentionBlock"):
        build_tower(_vit(qk_norm=True))(torch.zeros(1, 3, 64, 64))


def test_trunk_without_attention_pool():
    visual = FAMILIES["resnet"]()
    visual.attnpool = None
    tower = build_tower(visual).eval()
    images = _images(tower)
    assert [m.shape[1] for m, _ in tower(images, TowerRequest(taps=(2, 3, 4, 5))).taps] == [32, 64, 128, 256]
    for want, what in (
        (TowerRequest(pooled=True), "pooled"),
        (TowerRequest(dense="plain"), "dense"),
        (TowerRequest(keys=True), "keys"),
    ):
        with pytest.raises(ValueError, match=f"ResNetTower cannot give {what}"):
            tower(images, want)


@pytest.mark.parametrize("name", ["vit", "eva02"])
@torch.no_grad()
def test_hook_sees_every_stage_and_may_add_tokens(name):
    _, tower = _pair(name)
    images = _images(tower, (64, 80))
    seen: list[int] = []

    def watch(index: int, stream: TokenStream) -> TokenStream:
        seen.append(index)
        assert stream.x.shape[1] == 20 + (index >= 0)
        return stream

    plain = tower(images, TowerRequest(pooled=True, dense="plain"))
    watched = tower(images, TowerRequest(pooled=True, dense="plain"), hook=watch)
    assert seen == [-1, 0, 1, 2, 3]
    torch.testing.assert_close(watched.pooled, plain.pooled)

    def prompts(index: int, stream: TokenStream) -> TokenStream:
        if index == 0:
            extra = torch.ones(len(stream.x), 3, stream.x.shape[2])
            stream.x = torch.cat([stream.x[:, :1], extra, stream.x[:, 1:]], dim=1)
        return stream

    prompted = tower(images, TowerRequest((2,), pooled=True, dense="plain"), hook=prompts)
    assert prompted.dense.shape == plain.dense.shape and prompted.taps[0][0].shape[-2:] == (4, 5)
    assert not torch.allclose(prompted.pooled, plain.pooled, atol=1e-3)

    def unseen_prompts(index: int, stream: TokenStream) -> TokenStream:
        if index == 0:
            stream = prompts(index, stream)
            stream.bias = torch.zeros(stream.x.shape[1]).index_fill(0, torch.tensor([1, 2, 3]), -torch.inf)
            stream.bias = stream.bias.expand(stream.x.shape[1], -1)
        return stream

    unseen = tower(images, TowerRequest(pooled=True, dense="plain"), hook=unseen_prompts)
    torch.testing.assert_close(unseen.pooled, plain.pooled, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(unseen.dense, plain.dense, atol=2e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing():
    _, tower = _pair("eva02")
    images = _images(tower)
    grads = []
    for enable in (False, True):
        tower.train().set_grad_checkpointing(enable)
        tower.zero_grad()
        tower(images, TowerRequest(dense="value", pooled=True)).pooled.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1])


TEXTS: dict[str, dict[str, object]] = {
    "clip": {},
    "eos": {"pool_type": "eos", "eos_id": 49},
    "siglip": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "no_projection": {"proj_type": "none"},
}


def _text(name: str) -> TextTransformer:
    sizes = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2, "output_dim": DIM}
    return randomise(TextTransformer(**{**sizes, **TEXTS[name]}))


def _tokens() -> Tensor:
    tokens = torch.zeros(3, 12, dtype=torch.long)
    for row, length in zip(tokens, (3, 7, 5), strict=True):
        row[:length] = torch.randint(1, 48, (length,), generator=torch.Generator().manual_seed(length))
        row[length] = 49
    return tokens


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_text_equals_open_clip(name):
    text = _text(name)
    tower = TextTower(text)
    torch.testing.assert_close(tower(_tokens()), text(_tokens()), atol=2e-5, rtol=1e-4)
    assert tower.embed_dim == tower(_tokens()).shape[1]


@pytest.mark.parametrize("name", ["clip", "eos"])
@torch.no_grad()
def test_text_of_any_length(name):
    text = _text(name)
    tower = TextTower(text)
    torch.testing.assert_close(tower(_tokens()[:, :9]), text(_tokens()), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="13 tokens exceed the text tower's 12"):
        tower.encode(torch.zeros(1, 13, 32), torch.tensor([0]))


def test_bidirectional_text_takes_its_whole_context():
    with pytest.raises(ValueError, match="all its 12 tokens, not 9"):
        TextTower(_text("siglip"))(_tokens()[:, :9])


@torch.no_grad()
def test_padding_is_not_computed():
    tower = TextTower(_text("clip"))
    lengths = []
    tower.ln_final.register_forward_pre_hook(lambda *_: None)
    states = tower.states
    tower.states = lambda x: (lengths.append(x.shape[1]), states(x))[1]
    tower(_tokens())
    assert lengths == [8]
