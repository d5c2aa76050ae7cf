"""What `DetectionMapper` makes of ordinary and of bad dataset dicts."""

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from clipdense.data.image import BadImageError
from clipdense.data.mappers import MAPPER_REGISTRY, build_mapper

from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from detectron2.utils.events import EventStorage

POLYGON = [[2.0, 2.0, 20.0, 2.0, 20.0, 20.0, 2.0, 20.0]]


def rle(height: int = 24, width: int = 36) -> dict[str, Any]:
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[4:12, 6:18] = 1
    return mask_util.encode(mask)


def annotation(box: list[float], mask: Any = POLYGON, category: int = 0, **extra: Any) -> dict[str, Any]:
    return {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "segmentation": mask, "category_id": category} | extra


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    pixels = np.random.default_rng(1).integers(0, 255, (24, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    boxes = [annotation([2, 2, 20, 20]), annotation([3, 3, 20, 20], category=1)]
    path = str(tmp_path / "image.png")
    return {"file_name": path, "image_id": 1, "height": 24, "width": 36, "annotations": boxes}


def fixed_size(cfg):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (24,), "none"
    return cfg


def test_equals_detectron2_on_ordinary_input(cfg, record, tmp_path: Path):
    """The same randomness, the same image, boxes, polygons and labels as Detectron2's own mapper."""
    labels = np.random.default_rng(2).integers(0, 255, (24, 36)).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record["sem_seg_file_name"] = str(tmp_path / "labels.png")
    mine, theirs = build_mapper(cfg, True), DatasetMapper(cfg, True)
    for seed in range(4):
        np.random.seed(seed)  # noqa: NPY002  (what Detectron2's augmentations draw from)
        a = mine(record)
        np.random.seed(seed)  # noqa: NPY002
        b = theirs(copy.deepcopy(record))
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)
        assert torch.equal(a["sem_seg"], b["sem_seg"])
        for p, q in zip(a["instances"].gt_masks.polygons, b["instances"].gt_masks.polygons, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(p, q, strict=True))


def test_channel_order(cfg, record):
    fixed_size(cfg)
    cfg.INPUT.FORMAT = "RGB"
    rgb = build_mapper(cfg, True)(record)["image"]
    cfg.INPUT.FORMAT = "BGR"
    assert torch.equal(build_mapper(cfg, True)(record)["image"], rgb.flip(0))
    assert np.array_equal(rgb.permute(1, 2, 0).numpy(), np.asarray(Image.open(record["file_name"])))


def test_polygons_and_rle_side_by_side(cfg, record):
    mapper = build_mapper(fixed_size(cfg), True)
    assert isinstance(mapper(record)["instances"].gt_masks, PolygonMasks)
    record["annotations"].append(annotation([6, 4, 18, 12], rle()))
    masks = mapper(record)["instances"].gt_masks
    assert isinstance(masks, BitMasks)
    assert masks.tensor[2].sum() == 8 * 12 and masks.tensor[2, 4:12, 6:18].all()
    assert masks.tensor[0, 3:19, 3:19].all() and not masks.tensor[0, 21:].any()


def test_the_dict_is_not_changed(cfg, record):
    before = copy.deepcopy(record)
    build_mapper(cfg, True)(record)
    assert record == before


def test_boxes_outside_the_image(cfg, record):
    record["annotations"] = [
        annotation([-5, -5, 10, 10]),
        annotation([30, 20, 99, 99], category=1),
        annotation([40, 2, 60, 9]),  # beyond the right border
        annotation([5, 5, 5, 9]),  # no width
    ]
    instances = build_mapper(fixed_size(cfg), True)(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 10, 10], [30, 20, 36, 24]]
    assert instances.gt_classes.tolist() == [0, 1] and len(instances.gt_masks) == 2


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_no_annotation_and_crowds_only(cfg, record, mask_format: str):
    cfg.INPUT.MASK_FORMAT = mask_format
    for annotations in ([], [annotation([2, 2, 20, 20], rle(), iscrowd=1)]):
        instances = build_mapper(cfg, True)(record | {"annotations": annotations})["instances"]
        assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)
        assert instances.has("gt_masks") and instances.gt_classes.dtype == torch.int64


def test_no_annotation_trains(cfg, record):
    """A Mask R-CNN of Detectron2 takes an image without annotations beside one with."""
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = "cpu", 18, 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 2, 8
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
    mapper = build_mapper(cfg, True)
    with EventStorage():
        losses = build_model(cfg)([mapper(record), mapper(record | {"annotations": []})])
    assert all(torch.isfinite(loss) for loss in losses.values()) and "loss_mask" in losses


def test_boxes_without_masks(cfg, record):
    for item in record["annotations"]:
        del item["segmentation"]
    with pytest.raises(ValueError, match=r"image\.png.*MASK_ON False"):
        build_mapper(cfg, True)(record)
    cfg.MODEL.MASK_ON = False
    assert not build_mapper(cfg, True)(record)["instances"].has("gt_masks")


def test_cropping_recomputes_boxes(cfg, record):
    fixed_size(cfg)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [16, 16]
    record["annotations"] = [annotation([6, 4, 18, 12], rle())]
    for _ in range(10):
        instances = build_mapper(cfg, True)(record)["instances"]
        for box, mask in zip(instances.gt_boxes.tensor, instances.gt_masks.tensor, strict=True):
            ys, xs = torch.where(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_semantic_and_panoptic_maps(cfg, record, tmp_path: Path):
    labels = (np.arange(24 * 36).reshape(24, 36) % 256).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    ids = np.arange(24 * 36).reshape(24, 36) * 321
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "panoptic.png")
    record |= {
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "pan_seg_file_name": str(tmp_path / "panoptic.png"),
        "segments_info": [],
    }
    sample = build_mapper(fixed_size(cfg), True)(record)
    assert np.array_equal(sample["sem_seg"], labels) and np.array_equal(sample["pan_seg"], ids)
    cfg.INPUT.MIN_SIZE_TRAIN = (17,)  # wide labels move as narrow ones do, and none is invented
    sample = build_mapper(cfg, True)(record)
    assert torch.equal(sample["pan_seg"] // 321 % 256, sample["sem_seg"])
    cfg.INPUT.MIN_SIZE_TRAIN = (48,)
    sample = build_mapper(cfg, True)(record)
    assert sample["pan_seg"].shape == (48, 72) and set(sample["pan_seg"].unique().tolist()) <= set(
        ids.ravel()
    )
    tested = build_mapper(cfg, False)(record)
    assert not {"sem_seg", "pan_seg", "instances", "annotations", "sem_seg_file_name"} & tested.keys()


@pytest.mark.parametrize("size", [(1, 1), (500, 1), (1, 500)])
def test_extreme_sizes(cfg, tmp_path: Path, size: tuple[int, int]):
    Image.new("RGB", size, "red").save(tmp_path / "thin.png")
    for is_train in (True, False):
        image = build_mapper(cfg, is_train)({"file_name": str(tmp_path / "thin.png")})["image"]
        assert min(image.shape[1:]) >= 1 and (image[2] == 255).all()  # BGR


def test_size_that_the_annotations_deny(cfg, record):
    with pytest.raises(ValueError, match=r"image\.png"):
        build_mapper(cfg, True)(record | {"width": 99})
    record["annotations"] = [annotation([2, 2, 9, 9], rle(10, 10))]
    with pytest.raises(ValueError, match=r"annotations of .*image\.png"):
        build_mapper(cfg, True)(record)


def test_damaged_image(cfg, record, caplog):
    path = Path(record["file_name"])
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(BadImageError, match=r"image\.png"):
        build_mapper(cfg, True)(record)
    cfg.INPUT.SKIP_BAD_IMAGES = True
    with caplog.at_level(logging.WARNING):
        assert build_mapper(cfg, True)(record) is None
        assert build_mapper(cfg, True)(record) is None
    assert [message for message in caplog.messages if "image.png" in message] == caplog.messages[-1:]
    with pytest.raises(BadImageError, match=r"image\.png"):  # never in evaluation
        build_mapper(cfg, False)(record)


def test_what_it_does_not_read(cfg):
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(ValueError, match="KEYPOINT_ON"):
        build_mapper(cfg, True)


def test_mapper_names(cfg):
    assert "DetectionMapper" in MAPPER_REGISTRY
    cfg.INPUT.MAPPER = "DetectionMaper"
    with pytest.raises(KeyError, match="DetectionMaper.*DetectionMapper"):
        build_mapper(cfg, True)
    cfg.INPUT.MAPPER, cfg.INPUT.MASK_FORMAT = "DetectionMapper", "rle"
    with pytest.raises(ValueError, match=r"INPUT\.MASK_FORMAT"):
        build_mapper(cfg, True)
