"""The recipe of configs/shapes/denseclip_mask_rcnn_rn.yaml learns: score maps tell classes apart."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdense.backbone import SCORE
from clipdense.backbone.score_map import score_maps
from clipdense.data.shapes.records import draw_scene
from clipdense.data.shapes.world import Scene
from clipdense.engine.denormals import flush_denormals
from clipdense.run.setup import load_config
from clipdense.systems.denseclip.loss import mask_targets

from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

CONFIG = "configs/shapes/denseclip_mask_rcnn_rn.yaml"


def sample(scene: Scene) -> dict[str, Any]:
    """Convert a scene to an input with ground truth, as the mapper of the config does."""
    size = scene.ground.shape
    masks = BitMasks(torch.stack([torch.from_numpy(thing.mask.astype(bool)) for thing in scene.things]))
    instances = Instances(size, gt_boxes=masks.get_bounding_boxes(), gt_masks=masks)
    instances.gt_classes = torch.tensor([thing.category for thing in scene.things])
    image = torch.from_numpy(scene.image).permute(2, 0, 1)
    return {"image": image, "instances": instances, "height": size[0], "width": size[1]}


def build(*overrides: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(load_config(CONFIG, ["MODEL.BACKBONE.FREEZE_AT", "0", *overrides]))


def forget(trunk: Any) -> None:
    """Give the projection to the joint space random weights."""
    for layer in (trunk.trunk.tower.attnpool.v_proj, trunk.trunk.tower.attnpool.c_proj):
        layer.reset_parameters()


def pixel_accuracy(trunk: nn.Module, images: Tensor, batch: list[dict[str, Any]]) -> float:
    """Compute the share of the masks' pixels whose highest score is that of their class."""
    targets, _ = mask_targets([x["instances"] for x in batch], 80, images.shape[-2:], images.device)
    with torch.no_grad():
        score = F.interpolate(trunk(images)[SCORE], targets.shape[-2:], mode="bilinear")
    hit = targets.gather(1, score.argmax(1, keepdim=True))
    return float(hit.sum() / targets.any(1).sum())


LOSSES = {"ce": ["MODEL.PIXEL_TEXT.LOSS", "ce"]}
LOSSES["bce with bias"] = ["MODEL.PIXEL_TEXT.LOSS", "bce", "MODEL.PIXEL_TEXT.BIAS", "-8.0"]


@pytest.mark.parametrize("loss", LOSSES)
def test_four_images_are_learned_by_heart(loss: str) -> None:
    """The auxiliary loss alone, whole trunk, from a projection to the joint space that tells nothing."""
    batch = [sample(draw_scene("train", i)) for i in range(4)]
    model = build(*LOSSES[loss]).train()
    images, trunk = model.preprocess_image(batch).tensor, model.backbone.bottom_up
    forget(trunk)
    assert pixel_accuracy(trunk, images, batch) < 0.1
    optimizer = torch.optim.AdamW([p for p in trunk.parameters() if p.requires_grad], lr=1e-3)
    with flush_denormals():
        for _ in range(30):
            optimizer.zero_grad()
            model.pixel_text_loss(trunk(images)[SCORE], batch, images.shape[-2:]).backward()
            optimizer.step()
        assert pixel_accuracy(trunk, images, batch) > 0.8


def ranked_first(model: nn.Module, batch: list[dict[str, Any]]) -> float:
    """Compute the share of the boxes in whose mask the mean score of the right class is highest."""
    hits = []
    for x, score in zip(batch, score_maps(model, batch), strict=True):
        score = F.interpolate(torch.from_numpy(score)[None], x["image"].shape[-2:], mode="bilinear")[0]
        masks, classes = x["instances"].gt_masks.tensor, x["instances"].gt_classes
        for mask, category in zip(masks, classes.tolist(), strict=True):
            hits.append(int(score[:, mask].mean(1).argmax()) == category)
    return sum(hits) / len(hits)


def test_training_a_detector_teaches_its_score_map_the_classes() -> None:
    """The whole detector, 45 iterations; images of the validation split.

    The map tells nothing at first. Of 80 classes, chance ranks the right one first in 1 % of the boxes.
    """
    train = [sample(draw_scene("train", i)) for i in range(180)]
    val = [sample(draw_scene("val", i)) for i in range(16)]
    model = build("MODEL.BACKBONE.FREEZE_AT", "4")
    forget(model.backbone.bottom_up)
    assert ranked_first(model.eval(), val) < 0.1
    trunk = {id(p) for p in model.backbone.bottom_up.parameters()}
    groups = [{"params": [p for p in model.parameters() if p.requires_grad and id(p) not in trunk]}]
    groups += [{"params": [p for p in model.parameters() if p.requires_grad and id(p) in trunk], "lr": 3e-4}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    model.train()
    with flush_denormals(), EventStorage():
        for i in range(45):
            optimizer.zero_grad()
            first = 4 * i % len(train)
            sum(model(train[first : first + 4]).values()).backward()
            optimizer.step()
        assert ranked_first(model.eval(), val) > 0.5


def test_the_boxes_are_those_of_the_masks() -> None:
    """The inputs above are what they are meant to be."""
    instances = sample(draw_scene("train", 0))["instances"]
    assert isinstance(instances.gt_boxes, Boxes) and len(instances) >= 2
    assert all(instances.gt_masks.tensor.flatten(1).any(1))
