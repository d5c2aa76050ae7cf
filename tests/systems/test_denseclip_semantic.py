"""Semantic segmentation: decoders, losses, sliding windows and views, limits, export, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone import SCORE, CLIPBlockTrunk, LanguageTrunk, TimmTrunk
from clipdense.backbone.class_text import ClassTable
from clipdense.backbone.score_map import joint_features, score_maps
from clipdense.checkpoint import save_checkpoint
from clipdense.clip import load_clip
from clipdense.data.checks import check_classes
from clipdense.data.heads import head_classes
from clipdense.engine.build import build_model
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.run.setup import load_config
from clipdense.systems.denseclip import SemanticFPNHead, UPerNetHead, WindowedSemanticSegmentor
from clipdense.systems.denseclip.loss import pixel_cross_entropy
from clipdense.systems.denseclip.semantic import SemanticInference

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.utils.events import EventStorage

CONFIG = "configs/shapes/denseclip_semantic_fpn_rn.yaml"


class Pixels(Backbone):
    """A backbone whose map is the image, so that every number can be computed by hand."""

    def __init__(self, divisor: int = 0) -> None:
        super().__init__()
        self.divisor, self.sizes = divisor, []

    @property
    def size_divisibility(self) -> int:
        return self.divisor

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res2": ShapeSpec(channels=3, stride=1)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.sizes.append(tuple(x.shape))
        return {"res2": x}


class MeanHead(nn.Module):
    """Logits are the pixels plus the mean of the window, which tells windows apart."""

    ignore_value = 255

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        x = features["res2"]
        return x + x.mean((2, 3), keepdim=True)


def segmentor(divisor: int = 0, **settings: Any) -> Any:
    return WindowedSemanticSegmentor(
        backbone=Pixels(divisor),
        sem_seg_head=MeanHead(),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
        inference=SemanticInference(**settings),
    ).eval()


def by_hand(image: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Window by window, as the published code places them."""
    total, count = torch.zeros_like(image), torch.zeros(image.shape[1:])
    rows, columns = image.shape[1:]
    for i in range(max(-(-(rows - window[0]) // stride[0]), 0) + 1):
        for j in range(max(-(-(columns - window[1]) // stride[1]), 0) + 1):
            bottom, right = min(i * stride[0] + window[0], rows), min(j * stride[1] + window[1], columns)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            crop = image[:, top:bottom, left:right]
            total[:, top:bottom, left:right] += crop + crop.mean((1, 2), keepdim=True)
            count[top:bottom, left:right] += 1
    return total / count


@pytest.mark.parametrize("size", [(20, 33), (10, 33), (16, 12)])
@pytest.mark.parametrize("limit", [4096, 0])
def test_windows(size: tuple[int, int], limit: int) -> None:
    image = torch.rand(3, *size)
    model = segmentor(window=(16, 12), stride=(10, 8), batch_size=2, memory_limit=limit)
    (output,) = model([{"image": image}])
    torch.testing.assert_close(output["sem_seg"], by_hand(image, (16, 12), (10, 8)))
    assert max(n for n, *_ in model.backbone.sizes) <= 2  # windows per forward pass
    whole = segmentor()([{"image": image}])[0]["sem_seg"]
    assert torch.allclose(whole, output["sem_seg"]) == (size[0] <= 16 and size[1] <= 12)


def test_views_average_probabilities() -> None:
    image = torch.rand(3, 12, 20)
    (output,) = segmentor(scales=(0.5, 1.0), flip=True)([{"image": image, "height": 9, "width": 15}])
    expected = 0
    for scale in (0.5, 1.0):
        view = F.interpolate(image[None], scale_factor=scale, mode="bilinear")
        for flipped in (False, True):
            x = view.flip(-1) if flipped else view
            y = F.interpolate(x + x.mean((2, 3), keepdim=True), (9, 15), mode="bilinear").softmax(1)
            expected = expected + (y.flip(-1) if flipped else y) / 4
    torch.testing.assert_close(output["sem_seg"], expected[0])
    torch.testing.assert_close(output["sem_seg"].sum(0), torch.ones(9, 15))


def test_padding_to_the_divisor_is_cut_off() -> None:
    image = torch.rand(3, 10, 13)
    padded, unpadded = segmentor(8), segmentor(8, pad=False)
    outputs = [model([{"image": image}])[0]["sem_seg"] for model in (padded, unpadded)]
    assert padded.backbone.sizes == [(1, 3, 16, 16)] and unpadded.backbone.sizes == [(1, 3, 10, 13)]
    assert outputs[0].shape == outputs[1].shape == (3, 10, 13)
    # padding changes the mean over the image, and nothing else
    assert (outputs[1] - outputs[0]).flatten(1).std(1).max() < 1e-5 < (outputs[1] - outputs[0]).abs().min()


def test_large_vocabularies_give_labels() -> None:
    image = torch.rand(3, 10, 13)
    (dense,) = segmentor()([{"image": image, "height": 21, "width": 20}])
    for limit in ({"max_dense_classes": 2}, {"max_dense_megabytes": 1}):
        sized = {"image": image, "height": 21, "width": 20}
        if "max_dense_megabytes" in limit:
            sized |= {"height": 300, "width": 300}
        (output,) = segmentor(**limit)([sized])
        assert set(output) == {"sem_seg_labels"}
        if "max_dense_classes" in limit:
            assert torch.equal(output["sem_seg_labels"], dense["sem_seg"].argmax(0))


def test_settings_that_leave_gaps_are_refused() -> None:
    for settings, message in (
        ({"window": (16,)}, "give height and width"),
        ({"window": (16, 16)}, r"STRIDE is \[\]"),
        ({"window": (16, 16), "stride": (17, 8)}, "leave no gap"),
        ({"scales": ()}, "factors above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SemanticInference(**settings)


def test_cross_entropy_over_labelled_or_all_pixels() -> None:
    logits, target = torch.randn(1, 3, 4, 4), torch.randint(3, (1, 8, 8))
    target[:, :2] = 255
    resized = F.interpolate(logits, (8, 8), mode="bilinear")
    mean = F.cross_entropy(resized, target, ignore_index=255)
    torch.testing.assert_close(pixel_cross_entropy(logits, target, 255), mean)
    torch.testing.assert_close(pixel_cross_entropy(logits, target, 255, "all"), mean * 48 / 64)
    assert pixel_cross_entropy(logits, torch.full_like(target, 255), 255) == 0
    shapes = {"p2": ShapeSpec(channels=8, stride=4)}
    with pytest.raises(ValueError, match="LOSS_AVERAGE must be one of labelled, all, not 'some'"):
        UPerNetHead(shapes, num_classes=3, loss_average="some")  # type: ignore[arg-type]


SHAPES = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 6)}


def odd_maps() -> dict[str, Tensor]:
    """Maps of which none is a multiple of the next."""
    sizes = ((19, 27), (9, 13), (5, 7), (2, 3))
    return {f"p{i}": torch.randn(2, 8, *size) for i, size in enumerate(sizes, start=2)}


def test_semantic_fpn_by_hand() -> None:
    """Its convolutions, each followed by doubling; all levels at the size of the finest."""
    head = SemanticFPNHead(
        SHAPES, num_classes=5, conv_dims=8, common_stride=4, norm="BN", ignore_value=255
    ).eval()
    maps, total = odd_maps(), 0
    for i, name in enumerate(head.in_features):
        x = maps[name]
        for layer in [m for m in getattr(head, name) if not isinstance(m, nn.Upsample)]:
            x = layer(x)
            x = F.interpolate(x, scale_factor=2, mode="bilinear") if i else x
        total = total + F.interpolate(x, (19, 27), mode="bilinear")
    torch.testing.assert_close(head.layers(maps), head.predictor(total))
    assert [len(getattr(head, name)) for name in head.in_features] == [1, 2, 4, 6]


@pytest.mark.parametrize("kind", [SemanticFPNHead, UPerNetHead])
def test_heads_take_maps_of_any_size_and_drop_channels_in_training(kind: Any) -> None:
    torch.manual_seed(0)
    arguments = {"common_stride": 4} if kind is SemanticFPNHead else {}
    head = kind(SHAPES, num_classes=5, conv_dims=8, norm="", ignore_value=255, dropout=0.5, **arguments)
    maps = odd_maps()
    assert head.eval().layers(maps).shape == (2, 5, 19, 27)
    assert torch.equal(head.layers(maps), head.layers(maps))
    head.train()
    assert not torch.equal(head.layers(maps), head.layers(maps))
    _, losses = head(maps, torch.randint(5, (2, 76, 109)))
    losses["loss_sem_seg"].backward()
    assert all(p.grad is not None for p in head.parameters())


def sample(height: int = 64, width: int = 96) -> dict[str, Tensor]:
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "sem_seg": torch.randint(88, (height, width))}


def test_losses_of_the_model() -> None:
    cfg = load_config(
        CONFIG, ["MODEL.SEM_SEG_HEAD.DROPOUT", "0.0", "MODEL.LANGUAGE.CONTEXT_DECODER.DROPOUT", "0.0"]
    )
    check_classes(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    batch = [sample(), sample(64, 80)]
    with EventStorage():
        losses = model(batch)
    assert set(losses) == {"loss_sem_seg", "loss_pixel_text"}
    image = torch.zeros(2, 3, 64, 96)
    target = torch.full((2, 64, 96), 255)
    for i, x in enumerate(batch):
        image[i, :, :, : x["image"].shape[2]] = (x["image"] - 127.5) / 127.5
        target[i, :, : x["image"].shape[2]] = x["sem_seg"]
    features = model.backbone(image)
    expected = pixel_cross_entropy(model.sem_seg_head.layers(features), target, 255)
    torch.testing.assert_close(losses["loss_sem_seg"], expected)
    auxiliary = 0.4 * pixel_cross_entropy(features[SCORE], target, 255)
    torch.testing.assert_close(losses["loss_pixel_text"], auxiliary)


@pytest.mark.parametrize("name", [CONFIG, "configs/shapes/denseclip_score_map_rn.yaml"])
def test_export_without_text_tower(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(load_config(name)).eval()
    state, metadata = model.export_state()
    assert not any(".text.tower." in key for key in state)
    save_checkpoint(tmp_path / "export.safetensors", state, metadata)
    cfg = load_config(name, ["MODEL.WEIGHTS", str(tmp_path / "export.safetensors")])
    other = build_model(cfg).eval()
    TrainingCheckpointer(other).load_weights(cfg.MODEL.WEIGHTS, complete=True)
    x = [sample()]
    with torch.no_grad():
        torch.testing.assert_close(other(x)[0]["sem_seg"], model(x)[0]["sem_seg"])


def test_a_score_map_segments_other_classes_without_training(tmp_path: Path) -> None:
    name, weights = "configs/shapes/denseclip_score_map_rn.yaml", tmp_path / "model.safetensors"
    torch.manual_seed(0)
    trained = build_model(load_config(name))
    save_checkpoint(weights, trained.state_dict(), {"stuff_classes": list(trained.backbone.text.classes)})
    words = ["MODEL.LANGUAGE.CLASSES", "['red star', 'grass', 'sky']", "MODEL.WEIGHTS", str(weights)]
    cfg = load_config(name, words)
    assert head_classes(cfg) == ()
    model = build_model(cfg).eval()
    TrainingCheckpointer(model).load_weights(str(weights), complete=True)
    x = sample()
    with torch.no_grad():
        assert model([x])[0]["sem_seg"].shape == (3, 64, 96)
        first = trained.eval()([x])[0]["sem_seg"][list(trained.backbone.text.classes).index("red star")]
    # the map of a class does not depend on the others, except through the context decoder at its start
    torch.testing.assert_close(model([x])[0]["sem_seg"][0], first, atol=0.05, rtol=0.05)


def test_heads_that_do_not_fit_are_refused() -> None:
    name = "configs/shapes/denseclip_score_map_rn.yaml"
    decoder = ["MODEL.SEM_SEG_HEAD.NAME", "UPerNetHead", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res3', 'res5']"]
    for words, message in (
        (["MODEL.BACKBONE.NAME", "CLIPTrunk"], "needs a backbone with a score map"),
        (decoder, "ScoreMapSegmentor has no decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(load_config(name, words))
    with pytest.raises(ValueError, match="a Linear has no `layers`"):
        WindowedSemanticSegmentor(
            backbone=Pixels(), sem_seg_head=nn.Linear(1, 1), pixel_mean=[0.0], pixel_std=[1.0]
        )
    with pytest.raises(KeyError, match=r"a\.jpg has no 'sem_seg'"):
        segmentor().train()([{"image": torch.rand(3, 8, 8), "file_name": "a.jpg"}])


# ---- the trunk over blocks of a ViT


def vit(**arguments: Any) -> CLIPBlockTrunk:
    return CLIPBlockTrunk(
        load_clip("shapes-vit").visual, **{"blocks": [0, 2, 3], "scale_factors": [2, 1, 0.5]} | arguments
    )


def test_block_trunk_trains_its_levels_and_freezes_stages() -> None:
    trunk = vit(freeze_at=5, group_norm=True)
    assert {name: s.stride for name, s in trunk.output_shape().items()} == {"res2": 4, "res3": 8, "res4": 16}
    trained = {name.split(".")[0] for name, p in trunk.named_parameters() if p.requires_grad}
    assert trained == {"levels"}
    maps = trunk(torch.randn(1, 3, 64, 80))
    assert [tuple(x.shape[-2:]) for x in maps.values()] == [(16, 20), (8, 10), (4, 5)]
    sum(x.sum() for x in maps.values()).backward()
    assert all(p.grad is not None for p in trunk.levels.parameters())


def test_block_trunk_refuses() -> None:
    for arguments, message in (
        ({"blocks": [0, 2, 4]}, r"blocks, which are 0\.\.3; it has no \[4\]"),
        ({"blocks": []}, "give indices of blocks"),
        ({"scale_factors": [1, 2, 0.5]}, "must decrease"),
        ({"scale_factors": [2, 1]}, "one factor for each"),
    ):
        with pytest.raises(ValueError, match=message):
            vit(**arguments)
    with pytest.raises(ValueError, match="needs a ViT, not a ResNetTower"):
        CLIPBlockTrunk(load_clip("shapes-rn").visual, blocks=[0])


def test_stochastic_depth_and_class_embedding_are_the_vits_alone() -> None:
    tower = load_clip("shapes-vit").visual
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        once = tower.eval()(images).pooled
        tower.set_drop_path(0.5)
        assert torch.equal(tower(images).pooled, once)  # in training only
        torch.manual_seed(0)
        assert not torch.equal(tower.train()(images).pooled, once)
        rates = [tower.block(i).drop_path for i in range(len(tower.blocks))]
        assert rates == pytest.approx([0.5 * i / (len(rates) - 1) for i in range(len(rates))])
        tower.eval().double_class_embedding()
        assert not torch.allclose(tower(images).pooled, once)
    resnet = load_clip("shapes-rn").visual
    for call in (lambda: resnet.set_drop_path(0.1), resnet.double_class_embedding):
        with pytest.raises(ValueError, match="only open_clip's ViTs can"):
            call()


def test_windows_of_the_model_are_those_of_the_config() -> None:
    """A config with windows; the whole image gives another segmentation."""
    torch.manual_seed(0)
    model = build_model(load_config("configs/shapes/denseclip_semantic_fpn_vit.yaml")).eval()
    x = [sample(192, 256)]
    with torch.no_grad():
        windows = model(x)[0]["sem_seg"]
        model.inference = replace(model.inference, window=(), stride=())
        assert windows.shape == (88, 192, 256) and not torch.allclose(windows, model(x)[0]["sem_seg"])


def test_the_score_map_of_a_model_with_windows_covers_the_image() -> None:
    torch.manual_seed(0)
    model = build_model(load_config("configs/shapes/denseclip_semantic_fpn_vit.yaml")).eval()
    x = sample(200, 256)
    (score,) = score_maps(model, [x])
    assert score.shape == (88, 25, 32) and model.backbone_input(x).shape == (1, 3, 224, 256)
    z, t = joint_features(model, x)
    cosines = torch.einsum("dhw,kd->khw", z, t) / model.backbone.bottom_up.tau
    torch.testing.assert_close(cosines, torch.from_numpy(score), atol=1e-4, rtol=1e-4)


def test_maps_of_one_encoder_beside_the_score_map_of_another() -> None:
    torch.manual_seed(0)
    words = [
        "MODEL.TRUNK.NAME",
        "BesideTrunk",
        "MODEL.LANGUAGE.BESIDE",
        "CLIPTrunk",
        "MODEL.CLIP.NAME",
        "shapes-rn",
    ]
    model = build_model(load_config(CONFIG, [*words, "SOLVER.PARAM_GROUPS", "[]"])).eval()
    trunk, images = model.backbone.bottom_up, torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, score = trunk(images), trunk.language(images)[SCORE]
        plain = trunk.trunk(images)
    assert torch.equal(maps[SCORE], score) and torch.equal(maps["res4"], plain["res4"])
    channels = plain["res5"].shape[1]
    assert torch.equal(maps["res5"][:, :channels], plain["res5"])
    torch.testing.assert_close(maps["res5"][:, channels:], score * trunk.language.tau)
    assert model.backbone.output_shape()[SCORE].channels == 88
    with EventStorage():
        sum(model.train()([sample(), sample()]).values()).backward()
    assert all(p.grad is not None for p in trunk.trunk.parameters() if p.requires_grad)


SAM = {"depth": 2, "embed_dim": 32, "num_heads": 2, "global_attn_indexes": (1,), "neck_chans": 16}


@pytest.mark.parametrize(
    ("name", "kwargs", "grid"), [("resnet18", {}, (3, 5)), ("samvit_base_patch16", SAM, (6, 10))]
)
def test_score_maps_of_encoders_without_text(
    name: str, kwargs: dict[str, Any], grid: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    text = ClassTable(["road", "tree", "sky"], 16)
    text.table.normal_()
    trunk = LanguageTrunk(
        TimmTrunk(name, pretrained="random", kwargs=kwargs), text, concatenate="cosine"
    ).eval()
    with torch.no_grad():
        maps = trunk(torch.randn(1, 3, 96, 160))
    assert maps[SCORE].shape == (1, 3, *grid) and maps[SCORE].std() > 0
    assert maps[SCORE].abs().max() <= 1 / trunk.tau + 1e-4


# All but the baselines without text.
RECIPES = [
    path
    for path in sorted(Path("projects/DenseCLIP/configs").glob("*.yaml"))
    if not re.search(r"^Base-SemanticFPN$|_(clip|in1k|in21k)$", path.stem)
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_recipe_trains_the_text_tower_at_full_rate(path: Path) -> None:
    """With FREEZE_TEXT False the published schedule's smallest rate alone moves it."""
    rules = load_config(str(path)).SOLVER.PARAM_GROUPS
    name = "backbone.bottom_up.text.tower.ln_final.weight"
    assert [rule["LR"] for rule in rules if "LR" in rule and re.search(rule["MATCH"], name)] == [0.0]
