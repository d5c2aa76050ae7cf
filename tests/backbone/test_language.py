"""The language backbone: shapes, scores, gradients, and text that is encoded once and never stale."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone import SCORE, CLIPTrunk, ContextDecoder, LanguageTrunk, TimmTrunk
from clipdense.backbone.class_text import ClassTable, ClassText
from clipdense.backbone.clip_trunk import clip_from_config
from clipdense.checkpoint import CheckpointError
from clipdense.clip import ClipModel, TowerRequest, load_clip
from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone

CLASSES = ["red star", "blue ring", "green hourglass"]
FRAME = {"shapes-rn": "res5", "shapes-vit": "res3", "shapes-eva": "res3"}


def clip(name: str = "shapes-rn") -> ClipModel:
    torch.manual_seed(0)
    return load_clip(name, "random")


def language(name: str = "shapes-rn", *, decoder: bool = True, **kwargs: object) -> LanguageTrunk:
    model = clip(name)
    text = ClassText(model, CLASSES, n_ctx=4)
    return LanguageTrunk(
        CLIPTrunk(model.visual, joint=True),
        text,
        context_decoder=ContextDecoder(model.embed_dim, width=32, heads=2, layers=1) if decoder else None,
        **kwargs,
    )


def config(**keys: object) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.merge_from_list(
        ["MODEL.CLIP.PRETRAINED", "random", "MODEL.LANGUAGE.CLASSES", CLASSES]
        + ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.TRUNK.NAME", "LanguageTrunk"]
        + ["MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3, "INPUT.FORMAT", "RGB"]
        + [part for key, value in keys.items() for part in (key.replace("__", "."), value)]
    )
    return cfg


@pytest.mark.parametrize("name", list(FRAME))
def test_scores_are_cosines_over_tau(name: str) -> None:
    model = language(name).eval()
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        maps = model(images)
        plain, g, z = model.trunk.forward_joint(images)
        t = model.text().expand(2, -1, -1)
        memory = torch.cat([g[:, None], z.flatten(2).transpose(1, 2)], 1)
        t = t + model.gamma * model.context_decoder(t, memory)
    assert list(maps) == [*plain, SCORE]
    for b in range(2):
        for k in range(3):
            expected = F.cosine_similarity(z[b], t[b, k][:, None, None], dim=0) / 0.07
            torch.testing.assert_close(maps[SCORE][b, k], expected)
    last = FRAME[name]
    torch.testing.assert_close(maps[last], torch.cat([plain[last], maps[SCORE]], 1))
    for key, shape in model.output_shape().items():
        assert maps[key].shape == (2, shape.channels, 96 // shape.stride, 64 // shape.stride)


def test_the_cosine_or_the_dense_map_can_be_concatenated() -> None:
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        scaled, cosine = language().eval()(images), language(concatenate="cosine").eval()(images)
        dense = language(last_map="dense").eval()
        replaced = dense(images)["res5"]
        z = dense.trunk.forward_joint(images)[2]
    torch.testing.assert_close(cosine["res5"][:, -3:], 0.07 * scaled["res5"][:, -3:])
    torch.testing.assert_close(cosine[SCORE], scaled[SCORE])
    torch.testing.assert_close(replaced[:, :-3], z)
    assert dense.output_shape()["res5"].channels == z.shape[1] + 3
    for wrong in ({"concatenate": "raw"}, {"last_map": "z"}):
        with pytest.raises(ValueError, match="must be"):
            language(**wrong)


def test_without_decoder_text_does_not_see_the_image() -> None:
    model = language(decoder=False).eval()
    assert model.gamma is None
    z = torch.randn(1, model.text.embed_dim, 2, 2)
    with torch.no_grad():
        a, b = (model.score(torch.randn(1, model.text.embed_dim), z) for _ in range(2))
        assert torch.equal(a, b)
        seeing = language().eval()
        seeing.gamma += 1.0
        a, b = (seeing.score(torch.randn(1, model.text.embed_dim), z) for _ in range(2))
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("name", list(FRAME))
def test_everything_but_the_text_tower_learns(name: str) -> None:
    model = language(name).train()
    sum(x.square().mean() for x in model(torch.randn(2, 3, 64, 64)).values()).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == {n for n, _ in model.named_parameters() if n.startswith("text.tower.")}
    assert not any(p.requires_grad for p in model.text.tower.parameters())
    assert all(p.requires_grad for p in ClassText(clip(), CLASSES, trainable=True).parameters())


def test_a_trunk_of_another_kind_gets_a_pool() -> None:
    keys = {"MODEL__LANGUAGE__TRUNK": "TimmTrunk", "MODEL__TIMM__PRETRAINED": "random"}
    for name, sizes in (("resnet18", [16, 8, 4, 2]), ("vit_tiny_patch16_224", [4])):
        cfg = config(**keys, MODEL__TIMM__NAME=name)
        cfg.MODEL.BACKBONE.NAME = "LanguageTrunk"
        model = build_backbone(cfg).eval()
        assert isinstance(model, LanguageTrunk) and isinstance(model.trunk, TimmTrunk)
        with torch.no_grad():
            maps = model(torch.randn(1, 3, 64, 64))
        assert [m.shape[-1] for m in maps.values()] == [*sizes, sizes[-1]]
        assert maps[SCORE].shape[1] == 3 and maps[SCORE].abs().max() <= 1 / 0.07


def test_detectron2s_own_backbone_is_scored() -> None:
    cfg = config(MODEL__LANGUAGE__TRUNK="build_resnet_backbone", MODEL__RESNETS__DEPTH=18)
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    cfg.MODEL.BACKBONE.NAME = "build_trunk_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res4", "res5"]
    model = build_backbone(cfg).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 96))
    assert list(maps) == ["p4", "p5", "p6", SCORE]
    assert list(model.output_shape()) == list(maps)
    assert maps[SCORE].shape == (1, 3, 2, 3)


@pytest.mark.parametrize(
    ("name", "pyramid"),
    [("shapes-rn", "build_trunk_fpn_backbone"), ("shapes-vit", "build_trunk_simple_pyramid_backbone")],
)
def test_pyramids_pass_the_score_on(name: str, pyramid: str) -> None:
    cfg = config(MODEL__CLIP__NAME=name, MODEL__BACKBONE__NAME=pyramid)
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model = build_backbone(cfg).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 64))
    shapes = model.output_shape()
    assert list(maps) == list(shapes) and SCORE in maps
    assert all(maps[k].shape[1] == shapes[k].channels for k in maps)


class Coarse(Backbone):
    """A trunk whose only map is elsewhere than the score's stride."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res2": ShapeSpec(channels=8, stride=4)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"res2": x}


def test_wrong_combinations_are_refused() -> None:
    model = clip()
    text = ClassText(model, CLASSES, n_ctx=0)
    with pytest.raises(ValueError, match="OUT_FEATURES"):
        LanguageTrunk(CLIPTrunk(model.visual, out_features=["res2"], joint=True), text)
    text.embed_dim += 1
    with pytest.raises(ValueError, match="dimensions"):
        LanguageTrunk(CLIPTrunk(model.visual, joint=True), text)
    with pytest.raises(ValueError, match="class names is empty"):
        ClassText(model, [])
    with pytest.raises(ValueError, match="a very long name"):
        ClassText(model, ["cat", "a very long name " * 20])
    with pytest.raises(ValueError, match="very very"):  # fits without contexts, not with them
        ClassText(model, ["very " * 70], n_ctx=8)
    with pytest.raises(ValueError, match="no text tower"):
        ClassText(load_clip("shapes-rn", "random", text=False), CLASSES)


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_text_is_encoded_once_at_evaluation() -> None:
    model = language().eval()
    calls = count_calls(model.text.tower.transformer.resblocks[0])
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
        model(torch.randn(2, 3, 64, 96))
    assert len(calls) <= 1
    model.train()
    model(torch.randn(2, 3, 64, 64))
    model(torch.randn(2, 3, 64, 64))
    assert len(calls) <= 3


@torch.no_grad()
def test_kept_text_is_never_stale() -> None:
    text = ClassText(clip(), CLASSES, n_ctx=4).eval()
    before = text()
    assert text() is before
    other = copy.deepcopy(text.state_dict())
    other["prompts.contexts"] = other["prompts.contexts"] + 1
    text.load_state_dict(other)
    after = text()
    assert not torch.allclose(before, after)
    text.prompts.contexts.add_(1.0)
    assert not torch.allclose(after, text())
    text.prompts.contexts = nn.Parameter(torch.zeros_like(text.prompts.contexts))
    zero = text()
    text.tower.text_projection.mul_(2.0)
    torch.testing.assert_close(text(), 2 * zero)


def test_text_kept_at_evaluation_serves_in_training_too() -> None:
    text = ClassText(clip(), CLASSES, n_ctx=0)
    with torch.inference_mode():
        kept = text()
    scale = torch.ones((), requires_grad=True)
    (text() * scale).sum().backward()
    assert scale.grad is not None and not kept.is_inference()


def test_a_table_takes_the_towers_place() -> None:
    model = language().eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)[SCORE]
        table = ClassTable(CLASSES, model.text.embed_dim)
        table.load_state_dict(model.text.table().state_dict())
        model.text = table
        torch.testing.assert_close(model(images)[SCORE], expected)
    assert not list(table.parameters())
    with pytest.raises(CheckpointError, match="other classes"):
        ClassTable(CLASSES[::-1], table.embed_dim).load_state_dict(table.state_dict())


def test_position_grid_is_resized_once_when_built() -> None:
    cfg = config(MODEL__CLIP__POSITION_GRID=5, MODEL__CLIP__POSITION_RULE="crop")
    tower = clip_from_config(cfg, text=False).visual
    assert tower.grid == (5, 5) and tower.attnpool.positional_embedding.shape[0] == 26
    assert tower.position_rule == "crop"
    cfg.MODEL.CLIP.NAME = "shapes-vit"
    assert clip_from_config(cfg, text=False).visual.positional_embedding.shape[0] == 26
    cfg.MODEL.CLIP.NAME = "shapes-eva"
    with pytest.raises(ValueError, match="position"):
        clip_from_config(cfg, text=False)


def test_an_architecture_without_a_name() -> None:
    description = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 64,
            "layers": [1, 1, 1, 1],
            "width": 8,
            "patch_size": None,
            "head_width": 8,
        },
        "text_cfg": {"context_length": 13, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1},
    }
    cfg = config()
    cfg.MODEL.CLIP.CONFIG = CfgNode(description)
    model = clip_from_config(cfg)
    assert model.embed_dim == 16 and model.text.context_length == 13
    cfg.MODEL.CLIP.PRETRAINED = "openai"
    with pytest.raises(ValueError, match="MODEL.WEIGHTS"):
        clip_from_config(cfg)


# ---- options beyond the paper


@pytest.mark.parametrize("name", list(FRAME))
@pytest.mark.parametrize("decoder", [False, True])
def test_the_dense_map_may_be_any_mode_of_the_tower(name: str, decoder: bool) -> None:
    model = clip(name)
    text = ClassText(model, CLASSES, n_ctx=0)
    refiner = ContextDecoder(model.embed_dim, width=32, heads=2, layers=1) if decoder else None
    trunk = LanguageTrunk(CLIPTrunk(model.visual, joint=True, dense="value"), text, context_decoder=refiner)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        _, g, z = trunk.eval().trunk.forward_joint(images, pooled=decoder)
        expected = model.visual(images, TowerRequest(dense="value")).dense
    torch.testing.assert_close(z, expected)
    assert (g is not None) == decoder
    # Every trained parameter gets a gradient, so that distributed training needs no search for unused ones.
    sum(x.square().mean() for x in trunk.train()(images).values()).backward()
    without = {n for n, p in trunk.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()
    with pytest.raises(ValueError, match="its modes are plain, value"):
        CLIPTrunk(clip(name).visual, joint=True, dense="nothing")


@pytest.mark.parametrize("mode", ["value", "clearclip"])
@pytest.mark.parametrize("last_map", ["trunk", "dense"])
def test_what_no_map_depends_on_is_frozen_and_nothing_else(mode: str, last_map: str) -> None:
    model = clip("shapes-eva")
    trainable = {n for n, p in model.visual.named_parameters() if p.requires_grad}
    tower = CLIPTrunk(model.visual, joint=True, dense=mode)
    trunk = LanguageTrunk(tower, ClassText(model, CLASSES, n_ctx=0), last_map=last_map).train()
    trained = {n for n, p in model.visual.named_parameters() if p.requires_grad}
    model.visual.requires_grad_(True)
    sum(x.square().mean() for x in trunk(torch.randn(1, 3, 64, 64)).values()).backward()
    reached = {n for n, p in model.visual.named_parameters() if p.grad is not None}
    assert trained == reached & trainable
    # The trunk's own map is the last block with its queries and keys; these modes leave keys or both out.
    assert any("blocks.3.attn.k_proj" in n for n in reached) == (last_map == "trunk")


def test_the_dense_mode_comes_from_the_config() -> None:
    cfg = config(MODEL__LANGUAGE__DENSE="value", MODEL__BACKBONE__NAME="LanguageTrunk")
    assert build_backbone(cfg).trunk.dense == "value"
    keys = {"MODEL__LANGUAGE__TRUNK": "TimmTrunk", "MODEL__TIMM__PRETRAINED": "random"}
    cfg = config(**keys, MODEL__TIMM__NAME="resnet18", MODEL__LANGUAGE__DENSE="value")
    cfg.MODEL.BACKBONE.NAME = "LanguageTrunk"
    cfg.MODEL.LANGUAGE.CONTEXT_DECODER.ENABLED = False
    model = build_backbone(cfg).train()
    sum(x.square().mean() for x in model(torch.randn(2, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None for p in model.pool.parameters() if p.requires_grad)
    assert not model.pool.attnpool.q_proj.weight.requires_grad
    features = torch.randn(1, 512, 2, 3)
    z = model.pool(features)[1]
    torch.testing.assert_close(z[..., :1, :1], model.pool(features[..., :1, :1])[1])  # no attention
    cfg.MODEL.LANGUAGE.DENSE = "catseg"
    with pytest.raises(ValueError, match=r"MODEL\.LANGUAGE\.DENSE"):
        build_backbone(cfg)


def test_centred_scores_have_no_mean_over_the_classes() -> None:
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        centred = language(concatenate="centred").eval()(images)
    cosine = 0.07 * centred[SCORE]
    torch.testing.assert_close(centred["res5"][:, -3:], cosine - cosine.mean(1, keepdim=True))


def test_contexts_start_from_a_small_normal_or_from_words() -> None:
    model = clip()
    spread = [float(ClassText(model, CLASSES, context_std=s).prompts.contexts.std()) for s in (1.0, 0.02)]
    assert spread[0] > 0.5 and 0.01 < spread[1] < 0.03
    text = ClassText(model, CLASSES, n_ctx=6, context_std=0.0, context_words="a photo of a")
    ids = model.tokenize(["a photo of a"])[0, 1:5]
    torch.testing.assert_close(text.prompts.contexts[0, 2:], model.text.token_embedding(ids))
    assert not text.prompts.contexts[0, :2].any()
    # With the words as the only contexts, the result is CLIP's embedding of the sentence.
    sentence = ClassText(model, ["star"], n_ctx=4, context_words="a photo of a")
    with torch.no_grad():
        torch.testing.assert_close(sentence(), model.encode_text(model.tokenize(["a photo of a star"])))
    with pytest.raises(ValueError, match=r"have 4 tokens, but there are 3 contexts"):
        ClassText(model, CLASSES, n_ctx=3, context_words="a photo of a")


def test_context_keys_reach_the_text() -> None:
    cfg = config(MODEL__LANGUAGE__CONTEXT_STD=0.0, MODEL__LANGUAGE__CONTEXT_WORDS="a")
    cfg.MODEL.BACKBONE.NAME = "LanguageTrunk"
    contexts = build_backbone(cfg).text.prompts.contexts
    assert contexts[0, -1].any() and not contexts[0, :-1].any()
