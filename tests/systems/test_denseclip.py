"""Pixel-text supervision: targets, losses, the wrapper around any meta-architecture, and its export."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from clipdense.backbone import SCORE
from clipdense.checkpoint import CheckpointError, save_checkpoint
from clipdense.data.checks import check_classes
from clipdense.engine.checkpoint import TrainingCheckpointer
from clipdense.run.setup import load_config
from clipdense.systems.denseclip import DenseCLIPRCNN, PixelTextLoss, PixelTextSupervised
from clipdense.systems.denseclip.loss import box_targets, mask_targets

from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, GeneralizedRCNN
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

CPU = torch.device("cpu")


def instances(size: tuple[int, int], boxes: list[list[float]], classes: list[int]) -> Instances:
    result = Instances(size, gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    result.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return result


def by_hand(boxes: list[list[float]], classes: list[int], k: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """The published rule, box by box."""
    target, inside = torch.zeros(k, h, w, dtype=torch.bool), torch.zeros(1, h, w, dtype=torch.bool)
    for (x1, y1, x2, y2), c in zip(boxes, classes, strict=True):
        x1, x2 = (min(max(int(x / 4), 0), w - 1) for x in (x1, x2))
        y1, y2 = (min(max(int(y / 4), 0), h - 1) for y in (y1, y2))
        target[c, y1:y2, x1:x2] = True
        inside[0, y1:y2, x1:x2] = True
    return target, inside


def test_box_targets_by_hand() -> None:
    boxes = [[0.0, 0, 64, 64], [9.9, 17.2, 41, 30.5], [12, 12, 15, 15], [-8, -3, 20, 90]]
    classes = [1, 0, 2, 1]
    target, inside = box_targets([instances((64, 48), boxes, classes)], 3, (66, 51), CPU)
    expected = by_hand(boxes, classes, 3, 16, 12)
    assert torch.equal(target[0], expected[0]) and torch.equal(inside[0], expected[1])
    assert not inside[0, 0, -1].any() and not inside[0, 0, :, -1].any()  # far corners are exclusive
    assert not target[0, 2].any()  # under one cell


def test_cells_in_a_box_but_outside_its_mask_are_negatives() -> None:
    image = instances((32, 32), [[0, 0, 32, 16]], [1])
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, :16, :13] = True  # a quarter of the fourth column of cells
    image.gt_masks = BitMasks(mask)
    target, inside = mask_targets([image], 2, (40, 36), CPU)
    assert target.shape == (1, 2, 10, 9)
    assert target[0, 1, :4, :3].all() and target.sum() == 12
    assert torch.equal(inside, box_targets([image], 2, (40, 36), CPU)[1]) and inside.sum() > 12
    image.gt_masks = PolygonMasks([[torch.tensor([0.0, 0, 13, 0, 13, 16, 0, 16]).numpy()]])
    assert torch.equal(mask_targets([image], 2, (40, 36), CPU)[0], target)
    both = instances((32, 32), [[0, 0, 32, 16], [16, 0, 32, 16]], [1, 0])
    both.gt_masks = PolygonMasks([*image.gt_masks.polygons, []])
    both.gt_has_mask = torch.tensor([True, False])
    target_of_both, known = mask_targets([both], 2, (40, 36), CPU)
    assert torch.equal(target_of_both, target)
    assert torch.equal(known[0, 0, :, 4:], torch.zeros(10, 5, dtype=torch.bool))  # nobody knows its class
    assert torch.equal(known[..., :4], inside[..., :4])
    with pytest.raises(KeyError, match="MASK_ON"):
        mask_targets([instances((32, 32), [[0, 0, 32, 16]], [1])], 2, (40, 36), CPU)


@pytest.mark.parametrize("source", ["boxes", "masks"])
def test_loss_is_the_mean_over_covered_pixels_and_classes(source: str) -> None:
    image = instances((64, 64), [[4, 4, 40, 40]], [2])
    image.gt_masks = BitMasks(torch.ones(1, 64, 64, dtype=torch.bool))
    score = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = PixelTextLoss(source, weight=0.5)(score, [{"instances": image}], (64, 64))
    logits = F.interpolate(score, (16, 16), mode="bilinear")[0, :, 1:10, 1:10]
    target = torch.zeros(3, 9, 9)
    target[2] = 1
    torch.testing.assert_close(loss, 0.5 * F.binary_cross_entropy_with_logits(logits, target))
    at_zero = PixelTextLoss(source)(torch.zeros(1, 3, 2, 2), [{"instances": image}], (64, 64))
    torch.testing.assert_close(at_zero, torch.tensor(2.0).log())


@pytest.mark.parametrize("source", ["boxes", "sem_seg"])
def test_loss_without_targets_is_zero(source: str) -> None:
    score = torch.randn(1, 3, 2, 2, requires_grad=True)
    empty = {"instances": instances((64, 64), [], []), "sem_seg": torch.full((64, 64), 255)}
    loss = PixelTextLoss(source)(score, [empty], (64, 64))
    loss.backward()
    assert loss == 0 and not score.grad.any()


def test_semantic_maps() -> None:
    labels = torch.randint(3, (30, 20))
    labels[:5] = 255
    score = torch.randn(1, 3, 2, 1)
    loss = PixelTextLoss("sem_seg", weight=0.4)(score, [{"sem_seg": labels}], (32, 32))
    logits = F.interpolate(score, (32, 32), mode="bilinear")[:, :, :30, :20]
    expected = F.cross_entropy(logits, labels[None], ignore_index=255)
    torch.testing.assert_close(loss, 0.4 * expected)


def test_wrong_sources_are_errors() -> None:
    with pytest.raises(ValueError, match="boxes, masks, sem_seg"):
        PixelTextLoss("captions")
    with pytest.raises(KeyError, match=r"a\.jpg.*sem_seg"):
        PixelTextLoss("sem_seg")(torch.zeros(1, 1, 1, 1), [{"file_name": "a.jpg"}], (4, 4))


class Scored(Backbone):
    """A backbone with a score map and one weight."""

    def __init__(self, score: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.score = score

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res2": ShapeSpec(channels=3, stride=4)} | (
            {SCORE: ShapeSpec(channels=3, stride=4)} if self.score else {}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.avg_pool2d(x, 4) * self.scale
        return {"res2": features, SCORE: features}


class Toy(nn.Module):
    """A meta-architecture with a loss and an attribute of its own."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.own = "own"

    def forward(self, inputs: list[dict[str, Tensor]]) -> object:
        features = self.backbone(torch.stack([x["image"] for x in inputs]))
        return {"loss_toy": features["res2"].mean()} if self.training else [{"features": features["res2"]}]


def inputs() -> list[dict[str, object]]:
    return [{"image": torch.rand(3, 32, 32), "instances": instances((32, 32), [[4, 4, 24, 24]], [1])}]


def test_wrapper_adds_one_loss_and_nothing_else() -> None:
    base = Toy(Scored())
    model = PixelTextSupervised(base, PixelTextLoss()).train()
    losses = model(inputs())
    assert list(losses) == ["loss_toy", "loss_pixel_text"]
    losses["loss_pixel_text"].backward()
    assert base.backbone.scale.grad != 0
    model.eval()
    assert list(model(inputs())[0]) == ["features"]


def test_wrapper_names_each_parameter_once() -> None:
    model = PixelTextSupervised(Toy(Scored()), PixelTextLoss())
    names = [name for name, _ in model.named_parameters()]
    assert names == list(model.state_dict()) == ["base.backbone.scale"]


def test_wrapper_loads_a_checkpoint_of_its_base() -> None:
    """Files that were written before the wrapper had names of its own are such files too."""
    model = PixelTextSupervised(Toy(Scored()), PixelTextLoss())
    model.load_state_dict({"backbone.scale": torch.tensor(3.0)})
    assert model.base.backbone.scale == 3
    nested = nn.Sequential(model)
    nested.load_state_dict({"0.backbone.scale": torch.tensor(4.0)})
    assert model.base.backbone.scale == 4
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="base.backbone.other"):
        model.load_state_dict({"backbone.scale": torch.tensor(3.0), "backbone.other": torch.tensor(3.0)})


def test_wrapper_exports_a_checkpoint_of_its_base() -> None:
    base = Toy(Scored())
    state, _ = PixelTextSupervised(copy.deepcopy(base), PixelTextLoss()).export_state()
    base.load_state_dict(state)
    assert list(state) == ["backbone.scale"]


def test_strict_loading_accounts_for_the_names_of_the_base(tmp_path: Path) -> None:
    """`TrainingCheckpointer` compares keys before it loads them."""
    model = PixelTextSupervised(Toy(Scored()), PixelTextLoss())
    save_checkpoint(tmp_path / "base.safetensors", {"backbone.scale": torch.tensor(3.0)}, {})
    TrainingCheckpointer(model).load_weights(str(tmp_path / "base.safetensors"), complete=True)
    assert model.base.backbone.scale == 3
    save_checkpoint(tmp_path / "wrong.safetensors", {"backbone.scale": torch.zeros(2)}, {})
    with pytest.raises(CheckpointError, match="base.backbone.scale"):
        TrainingCheckpointer(model).load_weights(str(tmp_path / "wrong.safetensors"), complete=True)


def test_a_backbone_without_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="LanguageTrunk"):
        PixelTextSupervised(Toy(Scored(score=False)), PixelTextLoss())
    with pytest.raises(ValueError, match="LanguageTrunk"):
        PixelTextSupervised(nn.Linear(1, 1), PixelTextLoss())


def detector(*overrides: str) -> nn.Module:
    options = ["MODEL.CLIP.PRETRAINED", "random", "MODEL.LANGUAGE.CLASSES", "['red star', 'blue ring']"]
    options += ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", "2", *overrides]
    cfg = load_config("configs/shapes/denseclip_mask_rcnn_rn.yaml", options)
    torch.manual_seed(0)
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def test_mask_rcnn_trains_and_its_export_needs_no_text_tower(tmp_path: Path) -> None:
    model = detector("MODEL.BACKBONE.FREEZE_AT", "0")
    assert isinstance(model, DenseCLIPRCNN) and isinstance(model, GeneralizedRCNN)
    image = instances((64, 64), [[4, 4, 40, 40]], [1])
    image.gt_masks = BitMasks(torch.ones(1, 64, 64, dtype=torch.bool))
    batch = [{"image": torch.randint(256, (3, 64, 64)), "instances": image, "height": 64, "width": 64}]
    with EventStorage():
        losses = model.train()(batch)
    assert "loss_pixel_text" in losses and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []

    state, metadata = model.export_state()
    save_checkpoint(tmp_path / "export.safetensors", state, metadata)
    options = metadata["options"]["config"]
    assert options["MODEL.LANGUAGE.TEXT"] == "table" and options["MODEL.LANGUAGE.TABLE_DIM"] == 128
    light = detector("MODEL.LANGUAGE.TEXT", "table", "MODEL.LANGUAGE.TABLE_DIM", "128")
    light.load_state_dict(load_file(tmp_path / "export.safetensors"))
    assert not [n for n, _ in light.named_parameters() if ".text." in n]
    with torch.no_grad():
        a, b = (m.eval()(batch)[0]["instances"] for m in (model, light))
    torch.testing.assert_close(a.scores, b.scores)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)


@pytest.mark.parametrize("name", ["PixelTextSupervised", "DenseCLIPRCNN", "DenseCLIPRetinaNet"])
def test_heads_are_checked_against_the_classes(name: str) -> None:
    key = "RETINANET" if "Retina" in name else "ROI_HEADS"
    options = ["MODEL.META_ARCHITECTURE", name, f"MODEL.{key}.NUM_CLASSES", "79"]
    cfg = load_config("configs/shapes/denseclip_mask_rcnn_rn.yaml", options)
    with pytest.raises(ValueError, match=f"{key}.NUM_CLASSES = 79.* 80 thing classes"):
        check_classes(cfg)


def test_keys_of_an_export_win_over_the_config_that_a_run_wrote(tmp_path: Path) -> None:
    state, metadata = detector().export_state()
    save_checkpoint(tmp_path / "export.safetensors", state, metadata)
    (tmp_path / "config.yaml").write_text(load_config("configs/shapes/denseclip_mask_rcnn_rn.yaml").dump())
    weights = ["MODEL.WEIGHTS", str(tmp_path / "export.safetensors")]
    cfg = load_config(str(tmp_path / "config.yaml"), weights)
    assert (cfg.MODEL.LANGUAGE.TEXT, cfg.MODEL.LANGUAGE.TABLE_DIM) == ("table", 128)


# ---- losses beyond the paper


def two_masks() -> Instances:
    """Two overlapping masks of classes 0 and 2, inside larger boxes."""
    image = instances((64, 64), [[0, 0, 40, 40], [16, 16, 60, 60]], [0, 2])
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 4:32, 4:32], masks[1, 24:56, 24:56] = True, True
    image.gt_masks = BitMasks(masks)
    return image


def test_softmax_loss_is_that_of_the_pixels_with_a_class() -> None:
    score, image = torch.randn(1, 3, 2, 2), two_masks()
    loss = PixelTextLoss("masks", weight=0.4, loss="ce")(score, [{"instances": image}], (64, 64))
    logits = F.interpolate(score, (16, 16), mode="bilinear")[0].permute(1, 2, 0)
    masks = image.gt_masks.tensor[:, 2::4, 2::4]
    terms = []
    for y, x in masks.any(0).nonzero().tolist():
        present = [c for c, mask in zip((0, 2), masks, strict=True) if mask[y, x]]
        terms.append(-logits[y, x].log_softmax(0)[present].mean())
    torch.testing.assert_close(loss, 0.4 * torch.stack(terms).mean())
    empty = instances((64, 64), [], [])
    assert PixelTextLoss("boxes", loss="ce")(score, [{"instances": empty}], (64, 64)) == 0


def test_focal_loss_by_hand() -> None:
    score, image = torch.randn(1, 3, 2, 2), two_masks()
    loss = PixelTextLoss("masks", loss="focal", bias=-1.0)(score, [{"instances": image}], (64, 64))
    target, inside = mask_targets([image], 3, (64, 64), CPU)
    p = (F.interpolate(score, (16, 16), mode="bilinear") - 1.0).sigmoid()
    terms = torch.where(target, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    torch.testing.assert_close(loss, (terms * inside).sum() / target.sum())


@pytest.mark.parametrize("learn", [False, True])
def test_bias_shifts_the_logits_inside_the_loss_only(learn: bool) -> None:
    score, batch = torch.randn(1, 3, 2, 2), [{"instances": two_masks()}]
    biased = PixelTextLoss("masks", bias=-8.0, learn_bias=learn)
    loss = biased(score, batch, (64, 64))
    torch.testing.assert_close(loss, PixelTextLoss("masks")(score - 8.0, batch, (64, 64)))
    assert [name for name, _ in biased.named_parameters()] == (["bias"] if learn else [])
    if learn:
        loss.backward()
        assert biased.bias.grad is not None and biased.bias.grad != 0


def test_wrong_losses_are_errors() -> None:
    with pytest.raises(ValueError, match=r"PIXEL_TEXT\.LOSS must be one of bce, focal, ce"):
        PixelTextLoss(loss="mse")
    with pytest.raises(ValueError, match="no effect on softmax"):
        PixelTextLoss("masks", loss="ce", bias=-8.0)
    with pytest.raises(ValueError, match="no effect on softmax"):
        PixelTextLoss("sem_seg", learn_bias=True)


def test_a_learned_bias_is_exported_and_loaded(tmp_path: Path) -> None:
    keys = [
        "MODEL.PIXEL_TEXT.LOSS",
        "bce",
        "MODEL.PIXEL_TEXT.BIAS",
        "-8.0",
        "MODEL.PIXEL_TEXT.SOURCE",
        "masks",
    ]
    model = detector(*keys, "MODEL.PIXEL_TEXT.LEARN_BIAS", "True")
    state, metadata = model.export_state()
    assert state["pixel_text_loss.bias"] == -8
    needed = {"LEARN_BIAS": True, "LOSS": "bce", "SOURCE": "masks"}  # of another loss, the bias is an error
    assert (
        needed.items()
        <= {
            key.removeprefix("MODEL.PIXEL_TEXT."): value
            for key, value in metadata["options"]["config"].items()
        }.items()
    )
    wrapped = PixelTextSupervised(Toy(Scored()), PixelTextLoss(bias=-8.0, learn_bias=True))
    wrapped.load_state_dict({"backbone.scale": torch.tensor(2.0), "pixel_text_loss.bias": torch.tensor(-3.0)})
    assert wrapped.pixel_text_loss.bias == -3 and wrapped.backbone.scale == 2
