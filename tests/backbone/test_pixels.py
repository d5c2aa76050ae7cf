"""Trunks take images in the order of INPUT.FORMAT, and Detectron2's default pixel statistics."""

import logging

import pytest
import timm
import torch
from torch import Tensor

import clipdense
from clipdense.backbone import PixelConversion

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model

BACKBONES = {
    "CLIPTrunk": {},
    "FrozenCLIPTrunk": {},
    "LanguageTrunk": {"MODEL.LANGUAGE.CLASSES": ["red star", "blue disc"]},
    "build_trunk_fpn_backbone": {
        "MODEL.TRUNK.NAME": "CLIPTrunk",
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    },
    "TimmTrunk": {"MODEL.TIMM.NAME": "test_resnet", "MODEL.TIMM.PRETRAINED": "random"},
}


def config(name: str, fmt: str, statistics: bool) -> CfgNode:
    """Detectron2's default config, the two lines, and the backbone; CLIP's own pixels if `statistics`."""
    cfg = get_cfg()
    clipdense.add_clipdense_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.FORMAT, cfg.MODEL.BACKBONE.NAME = fmt, name
    for key, value in BACKBONES[name].items():
        cfg.merge_from_list([key, value])
    if statistics:
        own = timm.get_pretrained_cfg("test_resnet")
        mean, std = (own.mean, own.std) if name == "TimmTrunk" else ((0.5,) * 3,) * 2
        order = slice(None, None, -1 if fmt == "BGR" else 1)
        cfg.MODEL.PIXEL_MEAN = [255 * x for x in mean[order]]
        cfg.MODEL.PIXEL_STD = [255 * x for x in std[order]]
    return cfg


@torch.no_grad()
def features(cfg: CfgNode) -> dict[str, Tensor]:
    """Maps of one image, normalised as Detectron2's meta-architectures do."""
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    if cfg.INPUT.FORMAT == "BGR":
        image = image.flip(0)
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in (list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD))
    )
    torch.manual_seed(0)
    return build_backbone(cfg).eval()(((image - mean) / std)[None])


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_format_gives_the_same_features(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        expected = features(config(name, "RGB", statistics=True))
        for fmt, statistics in (("BGR", True), ("BGR", False), ("RGB", False)):
            found = features(config(name, fmt, statistics))
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, atol=2e-3, rtol=2e-3)
    assert "Pixel statistics differ" not in caplog.text


def test_the_default_config_proposes_the_same() -> None:
    """The same photograph through Detectron2's ProposalNetwork: the default config, and CLIP's RGB."""
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(1)).float()
    results = []
    for fmt, statistics in (("RGB", True), ("BGR", False)):
        cfg = config("build_trunk_fpn_backbone", fmt, statistics)
        cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        with torch.no_grad():
            pixels = image if fmt == "RGB" else image.flip(0)
            results.append(model([{"image": pixels}])[0]["proposals"])
    ours, theirs = results
    assert len(ours) == len(theirs) > 10
    torch.testing.assert_close(theirs.objectness_logits, ours.objectness_logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(theirs.proposal_boxes.tensor, ours.proposal_boxes.tensor, atol=1e-2, rtol=1e-2)


def test_settings_of_the_user_stay(caplog: pytest.LogCaptureFixture) -> None:
    cfg = config("CLIPTrunk", "BGR", statistics=True)
    cfg.MODEL.PIXEL_MEAN = [1.0, 2.0, 3.0]
    with caplog.at_level(logging.WARNING):
        assert build_backbone(cfg).pixels.scale is None
    assert "set MODEL.PIXEL_MEAN [127.5, 127.5, 127.5]" in caplog.text
    assert "in the order of INPUT.FORMAT BGR" in caplog.text


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="INPUT.FORMAT is 'L'.*RGB or BGR"):
        build_backbone(config("CLIPTrunk", "L", statistics=False))


def test_the_conversion_has_no_state() -> None:
    conversion = PixelConversion(input_format="BGR", scale=[1, 2, 3], shift=[4, 5, 6])
    assert conversion.state_dict() == {} and not [*conversion.parameters()]
    pixels = conversion(torch.tensor([10.0, 20, 30]).view(1, 3, 1, 1))
    assert pixels.flatten().tolist() == [34, 45, 36]
