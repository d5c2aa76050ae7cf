"""FPN against Detectron2's, and the simple feature pyramid."""

import pytest
import torch
from torch import nn

from clipdense.backbone import FPN, CLIPTrunk, SimpleFeaturePyramid, TimmTrunk
from clipdense.backbone.fpn import build_top_block
from clipdense.clip import load_clip
from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.fpn import FPN as DetectronFPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool


def trunk(name: str = "shapes-rn") -> CLIPTrunk:
    return CLIPTrunk(load_clip(name, "random", text=False).visual, freeze_at=5)


def config(**keys: object) -> CfgNode:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.merge_from_list(
        ["MODEL.CLIP.PRETRAINED", "random", "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
        + ["MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3]
        + [part for key, value in keys.items() for part in (key.replace("__", "."), value)]
    )
    return cfg


@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
def test_fpn_equals_detectron2s_where_sizes_halve(fuse_type: str) -> None:
    shared = trunk().eval()
    arguments = (shared, ["res2", "res3", "res4", "res5"], 32, "GN")
    torch.manual_seed(0)
    ours = FPN(*arguments, LastLevelMaxPool(), fuse_type)
    theirs = DetectronFPN(*arguments, LastLevelMaxPool(), fuse_type)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, got = theirs(images), ours(images)
    assert list(got) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
    for key in expected:
        assert torch.equal(got[key], expected[key])


def test_fpn_takes_odd_maps() -> None:
    shared = trunk().eval()
    fpn = FPN(shared, ["res2", "res3", "res4", "res5"], 16, top_block=LastLevelMaxPool())
    images = torch.randn(1, 3, 76, 109)
    with torch.no_grad():
        maps = fpn(images)
        sizes = {k: tuple(m.shape[-2:]) for k, m in shared(images).items()}
    assert {k.replace("p", "res"): tuple(maps[k].shape[-2:]) for k in ("p2", "p3", "p4", "p5")} == sizes
    assert sizes["res3"][0] != 2 * sizes["res4"][0]
    with pytest.raises(RuntimeError), torch.no_grad():
        DetectronFPN(shared, ["res2", "res3", "res4", "res5"], 16)(images)


def test_frozen_trunk_gives_the_fpn_constants_to_train_on() -> None:
    fpn = FPN(trunk(), ["res2", "res3", "res4", "res5"], 16).train()
    sum(m.square().mean() for m in fpn(torch.randn(1, 3, 64, 64)).values()).backward()
    trained = {n for n, p in fpn.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in fpn.named_parameters() if not n.startswith("bottom_up")}


def test_pyramid_levels_are_resampled_maps_of_the_trunk() -> None:
    """Scale 1 as it is, 1/2 by a max pool, 2 and 4 by deconvolutions that halve the channels."""
    net = trunk("shapes-vit")
    pyramid = SimpleFeaturePyramid(net, "res3", out_channels=24, scale_factors=(4.0, 2.0, 1.0, 0.5))
    kinds = [[type(layer) for layer in level] for level in pyramid.levels]
    norm = type(pyramid.levels[0][1])
    assert kinds[0][:4] == [nn.ConvTranspose2d, norm, nn.GELU, nn.ConvTranspose2d]
    assert [len(k) for k in kinds] == [6, 3, 2, 3] and kinds[3][0] is nn.MaxPool2d
    assert [level[-2].in_channels for level in pyramid.levels] == [32, 64, 128, 128]
    layer_norm = pyramid.levels[0][1]
    torch.nn.init.normal_(layer_norm.weight)
    with torch.no_grad():
        x = net(torch.randn(1, 3, 32, 48))["res3"]
        y = layer_norm(pyramid.levels[0][0](x))
        channels_last = pyramid.levels[0][0](x).permute(0, 2, 3, 1)
        expected = torch.layer_norm(channels_last, (64,), layer_norm.weight, layer_norm.bias, 1e-6)
    torch.testing.assert_close(y, expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("scales", "strides"),
    [
        ((4.0, 2.0, 1.0, 0.5), {"p1": 2, "p2": 4, "p3": 8, "p4": 16, "p5": 32}),
        ((2.0, 1.0, 0.5, 0.25), {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}),
        ((1.0,), {"p3": 8, "p4": 16}),
    ],
)
def test_pyramid_has_the_announced_strides(scales: tuple[float, ...], strides: dict[str, int]) -> None:
    pyramid = SimpleFeaturePyramid(trunk("shapes-vit"), "res3", out_channels=24, scale_factors=scales)
    assert {k: s.stride for k, s in pyramid.output_shape().items()} == strides
    height, width = 2 * pyramid.size_divisibility, 3 * pyramid.size_divisibility
    maps = pyramid(torch.randn(1, 3, height, width))
    for key, stride in strides.items():
        assert maps[key].shape == (1, 24, -(-height // stride), -(-width // stride))


def test_pyramid_over_a_patch_of_14_has_strides_that_are_no_integers() -> None:
    net = TimmTrunk("eva02_tiny_patch14_224", pretrained="random", kwargs={"depth": 1})
    shapes = SimpleFeaturePyramid(net, "res4", out_channels=8).output_shape()
    assert {k: s.stride for k, s in shapes.items()} == {"p1": 3.5, "p2": 7, "p3": 14, "p4": 28, "p5": 56}


@pytest.mark.parametrize("scales", [(3.0, 1.0), (0.5, 1.0)])
def test_pyramid_refuses_other_scales(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="SCALE_FACTORS"):
        SimpleFeaturePyramid(trunk("shapes-vit"), "res3", out_channels=8, scale_factors=scales)


def test_configs_compose_any_trunk_with_any_pyramid() -> None:
    fpn = build_backbone(
        config(MODEL__BACKBONE__NAME="build_trunk_fpn_backbone", MODEL__CLIP__NAME="shapes-rn")
    )
    assert list(fpn.output_shape()) == ["p2", "p3", "p4", "p5", "p6"] and fpn.size_divisibility == 32
    retina = build_backbone(
        config(
            MODEL__BACKBONE__NAME="build_trunk_fpn_backbone",
            MODEL__TRUNK__NAME="TimmTrunk",
            MODEL__TIMM__NAME="test_resnet",
            MODEL__TIMM__PRETRAINED="random",
            MODEL__FPN__IN_FEATURES=["res3", "res4", "res5"],
            MODEL__FPN__TOP_BLOCK="LastLevelP6P7",
        )
    )
    assert list(retina.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    assert list(retina(torch.randn(1, 3, 64, 64))) == ["p3", "p4", "p5", "p6", "p7"]
    pyramid = build_backbone(
        config(MODEL__BACKBONE__NAME="build_trunk_simple_pyramid_backbone", MODEL__CLIP__NAME="shapes-eva")
    )
    assert list(pyramid.output_shape()) == ["p1", "p2", "p3", "p4", "p5"]
    alone = build_backbone(config(MODEL__BACKBONE__NAME="CLIPTrunk", MODEL__TRUNK__OUT_FEATURES=["res4"]))
    assert list(alone.output_shape()) == ["res4"]


def test_fpn_over_a_vit_names_the_simple_pyramid() -> None:
    with pytest.raises(ValueError, match="build_trunk_simple_pyramid_backbone"):
        build_backbone(
            config(MODEL__BACKBONE__NAME="build_trunk_fpn_backbone", MODEL__CLIP__NAME="shapes-vit")
        )


def test_fpn_without_maps_names_the_key() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.FPN\.IN_FEATURES is empty.*res5"):
        build_backbone(
            config(
                MODEL__BACKBONE__NAME="build_trunk_fpn_backbone",
                MODEL__CLIP__NAME="shapes-rn",
                MODEL__FPN__IN_FEATURES=[],
            )
        )


def test_unknown_top_block_is_refused() -> None:
    assert build_top_block("", "p5", 8, 8) is None
    with pytest.raises(ValueError, match="TOP_BLOCK"):
        build_top_block("P6", "p5", 8, 8)
