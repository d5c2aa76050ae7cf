"""Objects with a box but no mask: their boxes train, their masks do not."""

from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image
from torch import nn

from clipdense.data.mappers import build_mapper
from clipdense.engine.mask_loss import leave_out_objects_without_mask
from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

SQUARE = [[2.0, 2.0, 20.0, 2.0, 20.0, 20.0, 2.0, 20.0]]


@pytest.fixture
def cfg() -> CfgNode:
    """A Mask R-CNN for images of 24 x 36 pixels."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.MODEL.MASK_ON, cfg.MODEL.DEVICE = True, "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 2, 16
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (24,), "none"
    return cfg


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """Two objects; the second has no mask."""
    pixels = np.random.default_rng(1).integers(0, 255, (24, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    objects = [
        {"bbox": [2, 2, 20, 20], "segmentation": SQUARE, "category_id": 0},
        {"bbox": [22, 4, 34, 22], "segmentation": [], "category_id": 1, "has_mask": False},
    ]
    return {
        "file_name": str(tmp_path / "image.png"),
        "height": 24,
        "width": 36,
        "annotations": [{**o, "bbox_mode": BoxMode.XYXY_ABS} for o in objects],
    }


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_the_mapper_keeps_the_box_and_says_that_there_is_no_mask(cfg, record, mask_format: str) -> None:
    cfg.INPUT.MASK_FORMAT = mask_format
    instances = build_mapper(cfg, True)(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[2, 2, 20, 20], [22, 4, 34, 22]]
    assert instances.gt_has_mask.tolist() == [True, False]
    assert instances.gt_masks.nonempty().tolist() == [True, False]
    record["annotations"][1].update(segmentation=SQUARE, has_mask=True)
    assert not build_mapper(cfg, True)(record)["instances"].has("gt_has_mask")


def test_boxes_are_recomputed_only_from_masks(cfg, record) -> None:
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [24, 36]
    cfg.INPUT.MASK_FORMAT = "bitmask"
    whole = np.zeros((24, 36), np.uint8, order="F")
    whole[2:20, 2:20] = 1
    record["annotations"][0].update(bbox=[0, 0, 24, 24], segmentation=mask_util.encode(whole))  # a looser box
    instances = build_mapper(cfg, True)(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[2, 2, 20, 20], [22, 4, 34, 22]]


def test_an_object_with_an_empty_mask_is_still_dropped(cfg, record) -> None:
    cfg.INPUT.MASK_FORMAT = "bitmask"
    record["annotations"].append(
        {**record["annotations"][0], "segmentation": [[40.0, 2, 50, 2, 50, 20]], "bbox": [30, 2, 36, 20]}
    )
    assert build_mapper(cfg, True)(record)["instances"].gt_has_mask.tolist() == [True, False]


def mask_head() -> nn.Module:
    seed_all_rng(0)
    head = MaskRCNNConvUpsampleHead(ShapeSpec(4, 7, 7), num_classes=2, conv_dims=[4, 4], loss_weight=1.0)
    for parameter in head.parameters():  # the predictor starts near 0, where all logits are alike
        nn.init.normal_(parameter)
    return head


def foreground(masks: PolygonMasks | BitMasks) -> Instances:
    boxes = torch.tensor([[2.0, 2, 20, 20], [22, 4, 34, 22], [5, 5, 15, 15]])
    instances = Instances((24, 36), proposal_boxes=Boxes(boxes), gt_masks=masks)
    instances.gt_classes = torch.tensor([0, 1, 1])
    return instances


def test_the_mask_loss_is_that_of_the_objects_with_masks() -> None:
    regions, instances = torch.randn(3, 4, 7, 7), foreground(PolygonMasks([SQUARE, [], SQUARE]))
    chosen = torch.tensor([True, False, True])
    with EventStorage():
        expected = mask_head()(regions[chosen], [instances[chosen]])["loss_mask"]
        as_empty = mask_head()(regions, [instances])["loss_mask"]
        model: Any = nn.Module()
        model.mask_head = mask_head()
        assert leave_out_objects_without_mask(model)
        instances.gt_has_mask = chosen
        assert torch.equal(model.mask_head(regions, [instances])["loss_mask"], expected)
        assert not torch.isclose(as_empty, expected)
        # a second image, all of whose objects have masks, needs no field
        other = foreground(PolygonMasks([SQUARE] * 3))
        both = model.mask_head(regions.repeat(2, 1, 1, 1), [instances, other])["loss_mask"]
        weighted = (2 * expected + 3 * mask_head()(regions, [other])["loss_mask"]) / 5
        torch.testing.assert_close(both, weighted)
        instances.gt_has_mask = torch.zeros(3, dtype=torch.bool)
        assert model.mask_head(regions, [instances])["loss_mask"] == 0


def test_only_heads_on_pooled_regions_can_skip_objects() -> None:
    model: Any = nn.Module()
    assert not leave_out_objects_without_mask(model)
    model.mask_head, model.mask_pooler = mask_head(), None  # the head gets whole maps
    assert not leave_out_objects_without_mask(model)
    assert not leave_out_objects_without_mask(nn.ModuleList([nn.Linear(1, 1)]))


def test_a_mask_rcnn_trains_the_box_whatever_stands_for_its_mask(cfg, record) -> None:
    model = build_model(cfg)
    assert leave_out_objects_without_mask(model)
    sample = build_mapper(cfg, True)(record)

    def losses() -> dict[str, float]:
        seed_all_rng(0)
        with EventStorage():
            return {name: float(loss) for name, loss in model([sample]).items()}

    first = losses()
    assert all(np.isfinite(list(first.values()))) and first["loss_mask"] > 0
    sample["instances"].gt_masks = PolygonMasks([SQUARE, [[22.0, 4, 34, 4, 34, 22]]])
    assert losses() == first
    sample["instances"] = sample["instances"][:1]
    alone = losses()
    assert alone["loss_rpn_loc"] != first["loss_rpn_loc"] and alone["loss_cls"] != first["loss_cls"]
