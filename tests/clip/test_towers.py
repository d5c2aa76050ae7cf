"""Every tower family against open_clip's own forward, and the contract that they share."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from timm.models.eva import Eva
from torch import nn

from clipdense.clip.attention import TokenStream
from clipdense.clip.towers import ResNetTower, TowerRequest, TransformerTower, build_tower
from tests.helpers.towers import (
    DIM,
    EVA,
    FAMILIES,
    random_images,
    randomise,
    timm_model,
    tower_pair,
    vit_model,
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_native_size_equals_open_clip(family):
    visual, tower = tower_pair(family)
    images = random_images(tower)
    expected = visual(images)
    assert expected.std() > 1e-2
    pooled = tower(images).pooled
    torch.testing.assert_close(pooled, expected, atol=2e-5, rtol=1e-4)
    assert pooled.shape[1] == tower.embed_dim


@torch.no_grad()
def test_taps_equal_open_clip(family):
    visual, tower = tower_pair(family)
    images = random_images(tower)
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
    _, tower = tower_pair(family)
    dense = tower.dense_modes[:2][-1] if tower.dense_modes else None
    want = TowerRequest(tuple(tower.tap_channels), pre=True, dense=dense, keys=tower.has_keys, pooled=True)
    for size in ((64, 64), (101, 67), (33, 150), (160, 96)):
        out = tower(random_images(tower, size), want)
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
    _, tower = tower_pair(family)
    images = random_images(tower, (80, 112))
    dense = tower.dense_modes[:2][-1] if tower.dense_modes else None
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
    _, tower = tower_pair(family)
    ran: list[str] = []
    if isinstance(tower, TransformerTower):
        parts = [block.mlp for block in tower.blocks]
    elif isinstance(tower, ResNetTower):
        parts = [getattr(tower, f"layer{i}") for i in range(1, 5)]
    else:
        parts = list(tower.trunk.stages)
    for index, part in enumerate(parts):
        part.register_forward_hook(lambda *_, index=index: ran.append(str(index)))
    tower(random_images(tower), TowerRequest(taps=(min(tower.tap_channels),)))
    assert ran == ["0"]
    ran.clear()
    tower(random_images(tower), TowerRequest(taps=tuple(tower.tap_channels), pre=True, pooled=True))
    assert ran == [str(i) for i in range(len(parts))]


def test_gradients_reach_the_weights(family):
    _, tower = tower_pair(family)
    images = random_images(tower, (96, 70))
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
    _, tower = tower_pair(family)
    images = random_images(tower)
    twin, expected = deepcopy(tower), tower(images).pooled
    for parameter in tower.parameters():
        parameter.zero_()
    assert torch.equal(twin(images).pooled, expected)


@torch.no_grad()
def test_half_precision_and_channels_last(family):
    _, tower = tower_pair(family)
    images = random_images(tower, (96, 80))
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
    visual, tower = tower_pair("vit")
    images = random_images(tower)
    tokens = visual.ln_post(visual.transformer(visual._embeds(images)))[:, 1:] @ visual.proj
    dense = tower(images, TowerRequest(dense="plain")).dense
    torch.testing.assert_close(dense.flatten(2).transpose(1, 2), tokens, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_mean_of_dense_is_the_embedding_where_the_head_is_linear():
    _, tower = tower_pair("timm_gap")
    tower.trunk.fc_norm = nn.Identity()
    out = tower(random_images(tower), TowerRequest(dense="plain", pooled=True))
    torch.testing.assert_close(out.dense.mean((2, 3)), out.pooled, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "eva02", "eva01", "eva_post_norm"])
@torch.no_grad()
def test_value_mode_equals_attention_to_oneself(name):
    """The value path is the plain block under an identity attention mask."""
    _, tower = tower_pair(name)
    images = random_images(tower, (80, 48))
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
    _, tower = tower_pair(name)
    images, last = random_images(tower, (80, 48)), len(tower.blocks) - 1

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
    visual, tower = tower_pair("resnet")
    out = tower(random_images(tower), TowerRequest(pre=True, dense="value", keys=True))
    c5, pool = out.pre.permute(0, 2, 3, 1), visual.attnpool
    torch.testing.assert_close(
        out.dense.permute(0, 2, 3, 1), pool.c_proj(pool.v_proj(c5)), atol=2e-5, rtol=1e-4
    )
    assert torch.equal(tower(random_images(tower), TowerRequest(dense="maskclip")).dense, out.dense)
    torch.testing.assert_close(out.keys.permute(0, 2, 3, 1), pool.k_proj(c5), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_eva_equals_timm_on_a_rectangular_model():
    """timm builds RoPE and positions for one size; ours must agree where that size is not square."""
    settings = {**EVA, "img_size": (48, 112)}
    visual = randomise(timm_model(Eva(**settings, num_classes=DIM, global_pool="token", qkv_fused=False)))
    tower = build_tower(visual).eval()
    images = random_images(tower)
    assert tower.grid == (3, 7)
    torch.testing.assert_close(tower(images).pooled, visual(images), atol=2e-5, rtol=1e-4)
    out = tower(images, TowerRequest(taps=(2,))).taps[0][0]
    theirs = visual.forward_intermediates(images, intermediates_only=True)["image_intermediates"][2]
    torch.testing.assert_close(out, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "convnext" not in name])
@torch.no_grad()
def test_position_rule_is_what_resizes(family):
    _, tower = tower_pair(family)
    larger = tuple(2 * side for side in tower.image_size)
    bicubic = tower(random_images(tower, larger)).pooled
    tower.position_rule = "bilinear"
    assert not torch.allclose(tower(random_images(tower, larger)).pooled, bicubic, atol=1e-5)
    tower.position_rule = "crop"
    with pytest.raises(ValueError, match="larger than the"):
        tower(random_images(tower, larger))
    assert tower(random_images(tower, (48, 64))).pooled.isfinite().all()


@torch.no_grad()
def test_regions_of_the_resnet():
    """A box around a native-size image pools as the image; a mask of everything attends to every position."""
    _, tower = tower_pair("resnet")
    images = random_images(tower)
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
    _, tower = tower_pair("convnext_mlp")
    out = tower(random_images(tower, (64, 64)), TowerRequest(pre=True, pooled=True, dense="plain"))
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
    visual, tower = tower_pair(name)
    images = random_images(tower)
    out = tower(images, TowerRequest(pre=True))
    whole = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    boxes = tower.embed_regions(out.pre, boxes=[whole, whole])
    everything = tower.embed_regions(out.pre, masks=torch.ones(2, 2, 4, 4))
    torch.testing.assert_close(everything, boxes[:, None].expand(2, 2, -1), atol=2e-5, rtol=1e-4)
    if name == "siglip":  # no class token: pooling every patch is the image embedding
        torch.testing.assert_close(boxes, visual(images), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["siglip", "pe"])
@torch.no_grad()
def test_attention_pooling_heads_on_every_patch(name):
    """A patch that is pooled alone is its value; a query that is a patch's own is an attention over all."""
    _, tower = tower_pair(name)
    images = random_images(tower)
    assert tower.dense_modes == ("plain", "value", "clipself", "maskclip")
    out = tower(images, TowerRequest(pre=True, dense="value"))
    one = torch.zeros(2, 1, 4, 4)
    one[:, 0, 1, 2] = 1
    alone = tower.embed_regions(out.pre, masks=one)[:, 0]
    torch.testing.assert_close(out.dense[:, :, 1, 2], alone, atol=2e-5, rtol=1e-4)
    plain = tower(images, TowerRequest(dense="plain")).dense
    pool, u = tower.trunk.attn_pool, out.pre.flatten(2).transpose(1, 2)
    latent = pool.latent.data.clone()
    for i in (0, 7):
        for b in range(len(u)):
            pool.latent.data.copy_(u[b : b + 1, i : i + 1])
            expected = tower.project(pool(u[b : b + 1]))[0]
            torch.testing.assert_close(plain.flatten(2)[b, :, i], expected, atol=2e-5, rtol=1e-4)
    pool.latent.data.copy_(latent)
    assert not torch.allclose(plain, out.dense, atol=1e-2)
    with pytest.raises(ValueError, match="cannot give dense 'sclip': its modes are plain, value"):
        tower(images, TowerRequest(dense="sclip"))


def test_what_a_tower_cannot_give_is_an_error():
    _, vit = tower_pair("vit")
    _, convnext = tower_pair("convnext")
    images = random_images(vit)
    with pytest.raises(ValueError, match="ViTTower cannot give tap 7"):
        vit(images, TowerRequest(taps=(7,)))
    with pytest.raises(ValueError, match="ConvNeXtTower cannot give dense 'value': its modes are plain"):
        convnext(images, TowerRequest(dense="value"))
    _, resnet = tower_pair("resnet")
    with pytest.raises(
        ValueError, match="ResNetTower cannot give dense 'catseg': its modes are plain, value"
    ):
        resnet(random_images(resnet), TowerRequest(dense="catseg"))
    _, no_class = tower_pair("timm_no_class")
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
    with pytest.raises(AttributeError, match="'dense' was not requested"):
        _ = vit(images).dense
    with pytest.raises(ValueError, match="unknown position rule 'nearest'"):
        build_tower(FAMILIES["vit"](), "nearest")


def test_towers_that_are_not_supported():
    with pytest.raises(ValueError, match="attentional pooler"):
        build_tower(vit_model(attentional_pool=True, attn_pooler_heads=2))
    with pytest.raises(ValueError, match="patch dropout"):
        build_tower(vit_model(patch_dropout=0.5))
    with pytest.raises(ValueError, match="no tower for Linear"):
        build_tower(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="CustomResidualAttentionBlock"):
        build_tower(vit_model(qk_norm=True))(torch.zeros(1, 3, 64, 64))


def test_trunk_without_attention_pool():
    visual = FAMILIES["resnet"]()
    visual.attnpool = None
    tower = build_tower(visual).eval()
    images = random_images(tower)
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
    _, tower = tower_pair(name)
    images = random_images(tower, (64, 80))
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
    _, tower = tower_pair("eva02")
    images = random_images(tower)
    grads = []
    for enable in (False, True):
        tower.train().set_grad_checkpointing(enable)
        tower.zero_grad()
        tower(images, TowerRequest(dense="value", pooled=True)).pooled.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1])
