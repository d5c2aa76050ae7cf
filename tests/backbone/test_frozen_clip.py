"""The frozen CLIP below F-VLM, the interpolated pyramid, and pyramids of any strides."""

import pytest
import torch
import torch.nn.functional as F

from clipdense.backbone import (
    FPN,
    JOINT,
    AnyStridePooler,
    FrozenCLIPTrunk,
    InterpolatedTrunk,
    SimpleFeaturePyramid,
)
from clipdense.clip import load_clip
from clipdense.clip.model import build_clip
from clipdense.clip.towers import TowerRequest
from clipdense.regions import pool_boxes

from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

BOXES = [torch.tensor([[4.0, 8, 40, 60], [0, 0, 64, 64]]), torch.tensor([[10.0, 10, 30, 20]])]


def frozen(name: str, **options: object) -> FrozenCLIPTrunk:
    return FrozenCLIPTrunk(load_clip(name, "random", text=False), **options)


@pytest.mark.parametrize("name, joint", [("shapes-rn", "pooling"), ("shapes-vit", "clipself")])
def test_the_tower_is_frozen_and_evaluation_adds_the_joint_map(name: str, joint: str) -> None:
    trunk = frozen(name, joint=joint)
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    maps = trunk.train()(images)
    assert not any(m.training for m in trunk.modules()) and JOINT not in maps
    assert not any(m.requires_grad for m in maps.values())
    evaluated = trunk.eval()(images)
    assert list(evaluated) == [*maps, JOINT] == list(trunk.output_shape())
    for key, shape in trunk.output_shape().items():
        assert evaluated[key].shape[1:] == (shape.channels, 64 // shape.stride, 64 // shape.stride)
    for key, value in maps.items():
        assert torch.equal(evaluated[key], value)


def test_regions_by_the_towers_own_pooling_or_by_the_dense_map() -> None:
    images = torch.randn(2, 3, 64, 64)
    resnet, vit = frozen("shapes-rn").eval(), frozen("shapes-vit", joint="clipself").eval()
    with torch.no_grad():
        pooled = resnet.embed_regions(resnet(images)[JOINT], boxes=BOXES)
        pre = resnet.tower(images, TowerRequest(pre=True)).pre
        torch.testing.assert_close(pooled, resnet.tower.embed_regions(pre, boxes=BOXES))
        dense = vit.tower(images, TowerRequest(dense="value")).dense
        expected = pool_boxes(dense, BOXES, scale=1 / 8, pooling="clipself")
        torch.testing.assert_close(vit.embed_regions(vit(images)[JOINT], boxes=BOXES), expected)
    assert pooled.shape == expected.shape == (3, 128)


@torch.no_grad()
def test_masks_are_embedded_like_boxes() -> None:
    """The mask of the whole image is pooled as the mean of the map, or by the tower's own pooling."""
    images = torch.randn(2, 3, 64, 64)
    resnet, vit = frozen("shapes-rn").eval(), frozen("shapes-vit", joint="clipself").eval()
    joint = vit(images)[JOINT]
    masks = (torch.rand(2, 3, *joint.shape[-2:]) > 0.5).float()
    embeddings = vit.embed_regions(joint, masks=masks)
    weights = masks / masks.sum((2, 3), keepdim=True)
    mean = torch.einsum("bdhw,bqhw->bqd", F.normalize(joint, dim=1), weights)
    torch.testing.assert_close(embeddings, F.normalize(mean, dim=2))
    pre = resnet(images)[JOINT]
    masks = torch.ones(2, 1, *pre.shape[-2:])
    embeddings = resnet.embed_regions(pre, masks=masks)
    torch.testing.assert_close(embeddings, resnet.tower.embed_regions(pre, masks=masks))
    assert embeddings.shape == (2, 1, 128)


@pytest.mark.parametrize("name, joint", [("shapes-rn", "pooling"), ("shapes-vit", "clipself")])
def test_regions_are_either_boxes_or_masks(name: str, joint: str) -> None:
    trunk = frozen(name, joint=joint).eval()
    maps = trunk(torch.randn(2, 3, 64, 64))[JOINT]
    with pytest.raises(ValueError, match="either boxes or masks"):
        trunk.embed_regions(maps)
    with pytest.raises(ValueError, match="either boxes or masks"):
        trunk.embed_regions(maps, boxes=BOXES, masks=torch.ones(2, 1, *maps.shape[-2:]))


@torch.no_grad()
def test_a_convnext_embeds_regions_by_its_head() -> None:
    vision = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {}}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3}
    trunk = FrozenCLIPTrunk(build_clip("tiny", {"model_cfg": config, "preprocess_cfg": pixels}, text=False))
    images = torch.randn(2, 3, 64, 64)
    maps = trunk.eval()(images)
    for key, stride in {"res2": 4, "res3": 8, "res4": 16, "res5": 32, JOINT: 32}.items():
        shape = ShapeSpec(channels=maps[key].shape[1], stride=stride)
        assert trunk.output_shape()[key] == shape and maps[key].shape[-1] == 64 // stride
    whole = trunk.embed_regions(maps[JOINT], boxes=[torch.tensor([[0.0, 0, 64, 64]])] * 2)
    torch.testing.assert_close(whole, trunk.tower(images, TowerRequest(pooled=True)).pooled)


def test_taps_of_several_blocks() -> None:
    trunk = frozen("shapes-vit", blocks=[1, 3], last_block="value", joint="clipself")
    images = torch.randn(1, 3, 64, 64)
    maps = trunk.eval()(images)
    plain = trunk.tower(images, TowerRequest(taps=(1, 3))).taps
    assert torch.equal(maps["block1"], plain[0][0]) and not torch.equal(maps["block3"], plain[1][0])
    tokens = maps["block3"].flatten(2).transpose(1, 2)  # the last tap is what the dense map is projected from
    dense = trunk.tower.project(trunk.tower.norm_tokens(tokens)).transpose(1, 2)
    torch.testing.assert_close(dense.reshape(maps[JOINT].shape), maps[JOINT])


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("shapes-vit", {"joint": "pooling"}, "JOINT to a dense mode"),
        ("shapes-vit", {"joint": "clipself", "blocks": [2, 4]}, r"BLOCKS \[4\]: blocks are 0..3"),
        ("shapes-vit", {"joint": "nothing"}, "JOINT 'nothing'"),
        ("shapes-rn", {"blocks": [1]}, "for ViTs, not for a ResNetTower"),
        ("shapes-rn", {"last_block": "value"}, "for ViTs, not for a ResNetTower"),
    ],
)
def test_what_a_tower_has_not_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frozen(name, **options)


def test_interpolated_pyramid() -> None:
    trunk = frozen("shapes-vit", blocks=[0, 1, 2, 3], joint="clipself")
    pyramid = InterpolatedTrunk(trunk).train()
    strides = {"res1": 2, "res2": 4, "res3": 8, "res4": 16, "joint": 8}
    assert {name: shape.stride for name, shape in pyramid.output_shape().items()} == strides
    images = torch.randn(2, 3, 64, 72)
    maps = pyramid(images)
    taps = trunk(images)
    assert [m.shape[-2:] for m in maps.values()] == [(32, 36), (16, 18), (8, 9), (4, 4)]
    assert torch.equal(maps["res3"], taps["block2"])
    assert torch.equal(maps["res4"], F.max_pool2d(taps["block3"], 2))
    sum(m.square().mean() for m in maps.values()).backward()
    trained = {n for n, p in pyramid.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in pyramid.named_parameters() if n.startswith("levels.")}
    with pytest.raises(ValueError, match="SCALE_FACTORS"):
        InterpolatedTrunk(trunk, scale_factors=(2.0, 1.0))
    with pytest.raises(ValueError, match="SCALE_FACTORS"):
        InterpolatedTrunk(trunk, scale_factors=(1.0, 2.0, 4.0, 0.5))


@pytest.fixture
def patches_of_14() -> FrozenCLIPTrunk:
    vision = {"timm_model_name": "eva02_clip", "layers": 4, "width": 32, "head_width": 16, "patch_size": 14}
    config = {"embed_dim": 16, "vision_cfg": {**vision, "mlp_ratio": 2.0, "image_size": 56}, "text_cfg": {}}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3}
    clip = build_clip("tiny", {"model_cfg": config, "preprocess_cfg": pixels}, text=False)
    return FrozenCLIPTrunk(clip, blocks=[0, 1, 2, 3], last_block="value", joint="clipself")


def test_strides_of_a_patch_of_14(patches_of_14: FrozenCLIPTrunk) -> None:
    """Anchors and regions of a pyramid of strides 3.5, 7, 14, 28, 56."""
    trunk = InterpolatedTrunk(patches_of_14)
    fpn = FPN(trunk, ["res1", "res2", "res3", "res4"], 8, "BN", LastLevelMaxPool()).eval()
    fpn.top_block.in_feature = "p4"
    shapes = {k: v for k, v in fpn.output_shape().items() if k != JOINT}
    strides = [shape.stride for shape in shapes.values()]
    assert list(shapes) == ["p1", "p2", "p3", "p4", "p5"] and strides == [3.5, 7, 14, 28, 56]
    assert fpn.size_divisibility == 28
    maps = fpn(torch.randn(1, 3, 112, 84))
    levels = [maps[name] for name in shapes]
    assert [tuple(m.shape[-2:]) for m in levels] == [(32, 24), (16, 12), (8, 6), (4, 3), (2, 2)]
    anchors = DefaultAnchorGenerator(
        sizes=[[8 * s] for s in strides], aspect_ratios=[[0.5, 1.0, 2.0]], strides=strides, offset=0.0
    )(levels)
    assert [len(a) for a in anchors] == [3 * m.shape[-2] * m.shape[-1] for m in levels]
    centers = anchors[0].get_centers().reshape(32, 24, 3, 2)
    torch.testing.assert_close(centers[5, 7, 1], torch.tensor([7 * 3.5, 5 * 3.5]))
    torch.testing.assert_close(anchors[0].tensor[1, 2:], torch.tensor([14.0, 14.0]))  # not rounded
    pooled = AnyStridePooler(7, strides[:4])(levels[:4], [Boxes(torch.tensor([[3.0, 3, 80, 100]]))])
    assert pooled.shape == (1, 8, 7, 7)


def test_pooler_is_detectron2s_at_powers_of_two() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 256 // s, 256 // s) for s in (4, 8, 16, 32)]
    corner = torch.rand(40, 2) * 150
    boxes = torch.cat([corner, corner + 4 + 2 ** (torch.rand(40, 1) * 8) * torch.ones(2)], 1)
    lists = [Boxes(boxes[:25]), Boxes(boxes[25:])]
    theirs = ROIPooler(7, (1 / 4, 1 / 8, 1 / 16, 1 / 32), 0, "ROIAlignV2")
    torch.testing.assert_close(AnyStridePooler(7, (4, 8, 16, 32))(maps, lists), theirs(maps, lists))
    single = ROIPooler(5, (1 / 8,), 0, "ROIAlignV2")([maps[1]], lists)
    torch.testing.assert_close(AnyStridePooler(5, (8,))([maps[1]], lists), single)
    finer = AnyStridePooler(7, (4, 8, 16, 32), finest=14.0)(maps, lists)
    assert not torch.allclose(finer, theirs(maps, lists))
    assert AnyStridePooler(7, (4, 8))(maps[:2], [Boxes(torch.zeros(0, 4))] * 2).shape == (0, 3, 7, 7)
    with pytest.raises(ValueError, match="must increase"):
        AnyStridePooler(7, (8, 4))


def test_frozen_trunk_below_a_simple_pyramid() -> None:
    trunk = frozen("shapes-vit", joint="clipself")
    pyramid = SimpleFeaturePyramid(trunk, "res3", out_channels=16, scale_factors=(1.0, 0.5)).eval()
    maps = pyramid(torch.randn(1, 3, 64, 64))
    assert list(maps) == ["p3", "p4", "p5", JOINT]
    assert pyramid.output_shape()[JOINT] == ShapeSpec(channels=128, stride=8)
