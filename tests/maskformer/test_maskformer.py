"""Mask proposals: behaviour that the golden files do not cover."""

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.backbone import SwinTrunk
from clipdense.checkpoint import CheckpointError, read_checkpoint
from clipdense.data.mappers import build_mapper
from clipdense.maskformer import HungarianMatcher, MaskPrediction, MSDeformAttn, SetCriterion, Targets
from clipdense.maskformer.layers import sine_position
from clipdense.maskformer.targets import pad_targets, panoptic_targets, semantic_targets
from clipdense.run.config import add_clipdense_config

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model


def config(**keys: Any) -> CfgNode:
    """A MaskFormer of R50's form, narrow."""
    cfg = get_cfg()
    add_clipdense_config(cfg)
    small = {
        "MODEL.META_ARCHITECTURE": "MaskFormer",
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3,
        "MODEL.MASK_FORMER.PIXEL_DECODER.CONV_DIM": 32,
        "MODEL.MASK_FORMER.MASK_DIM": 32,
        "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 5,
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
        "MODEL.MASK_FORMER.DEC_LAYERS": 2,
    }
    for key, value in (small | keys).items():
        cfg.merge_from_list([key, value])
    return cfg


@pytest.mark.parametrize("points", [0, 64])
@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_matching_has_the_minimum_total_cost(points: int, count: int) -> None:
    torch.manual_seed(count)
    matcher = HungarianMatcher(cost_class=1.0, cost_mask=2.0, cost_dice=1.0, num_points=points)
    logits, masks = torch.randn(1, 4, 6), torch.randn(1, 4, 16, 16)
    target = Targets(torch.randint(5, (count,)), torch.rand(count, 16, 16) > 0.5)
    torch.manual_seed(0)
    ((query, index),) = matcher(logits, masks, [target])
    assert len(query) == len(index) == min(count, 4)
    assert query.tolist() == sorted(query.tolist())
    torch.manual_seed(0)  # the same points again
    cost = matcher.costs(logits[0], masks[0], target)
    table = cost if count <= 4 else cost.T
    best = min(
        sum(float(table[row, column]) for column, row in enumerate(rows))
        for rows in itertools.permutations(range(len(table)), table.shape[1])
    )
    assert float(cost[query, index].sum()) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("points", [0, 64])
def test_images_without_objects_train_too(points: int) -> None:
    matcher = HungarianMatcher(cost_class=1.0, cost_mask=1.0, cost_dice=1.0, num_points=points)
    criterion = SetCriterion(4, matcher, num_points=points)
    logits, masks = torch.randn(2, 6, 5, requires_grad=True), torch.randn(2, 6, 8, 8, requires_grad=True)
    nothing = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 16, 16, dtype=torch.bool))
    losses = criterion(MaskPrediction(class_logits=logits, mask_logits=masks), [nothing, nothing])
    sum(losses.values()).backward()
    assert losses["loss_mask"] == losses["loss_dice"] == 0 < losses["loss_ce"]
    assert masks.grad is not None and masks.grad.abs().sum() == 0
    diverged = MaskPrediction(class_logits=torch.full_like(logits, torch.nan), mask_logits=masks)
    one = Targets(torch.tensor([1]), torch.ones(1, 16, 16, dtype=torch.bool))
    assert criterion(diverged, [one, nothing])["loss_ce"].isnan()  # reported by the trainer


def test_targets_of_label_maps() -> None:
    sem_seg = torch.tensor([[2, 2, 255], [0, 0, 2]])
    labels, masks = semantic_targets({"sem_seg": sem_seg}, 255)
    assert labels.tolist() == [0, 2] and masks.sum((1, 2)).tolist() == [2, 3]
    segments = [
        {"id": 7, "category_id": 1},
        {"id": 300, "category_id": 1},
        {"id": 9, "category_id": 0, "iscrowd": 1},
        {"id": 11, "category_id": 2},  # cropped away
    ]
    pan_seg = torch.tensor([[7, 300, 300], [9, 9, 0]])
    labels, masks = panoptic_targets({"pan_seg": pan_seg, "segments_info": segments})
    assert labels.tolist() == [1, 1] and masks.sum((1, 2)).tolist() == [1, 2]
    ((_, padded),) = pad_targets([Targets(labels, masks)], (4, 5))
    assert padded.shape == (2, 4, 5) and padded.sum() == 3
    labels, masks = panoptic_targets({"pan_seg": pan_seg, "segments_info": []})
    assert labels.dtype == torch.int64 and masks.shape == (0, 2, 3)


def test_positions_and_sampling_directions() -> None:
    position = sine_position(3, 5, 8)
    assert position.shape == (8, 3, 5)
    assert torch.equal(position[:4, :, 0], position[:4, :, 4])  # the first half is of y
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_position(2, 2, 6)
    attention = MSDeformAttn(16, levels=3, heads=4, points=2)
    bias = attention.sampling_offsets.bias.view(4, 3, 2, 2)
    steps = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    torch.testing.assert_close(bias[:, 0, 0], steps)
    torch.testing.assert_close(bias[:, 2, 1], 2 * steps)


def test_configurations_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of semantic, panoptic"):
        build_model(config(**{"MODEL.MASK_FORMER.TARGETS": "boxes"}))
    with pytest.raises(ValueError, match=r"name \['p9'\]"):
        build_model(config(**{"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "p9"}))
    with pytest.raises(ValueError, match="StandardTransformerDecoder reads 1 maps"):
        build_model(config(**{"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": ""}))
    deformable = {"MODEL.MASK_FORMER.PIXEL_DECODER.NAME": "MSDeformAttnPixelDecoder"}
    with pytest.raises(ValueError, match="needs at least 4 maps"):
        build_model(config(**deformable, **{"MODEL.MASK_FORMER.IN_FEATURES": ["res3", "res4", "res5"]}))
    model = build_model(config())
    sample = {"image": torch.zeros(3, 64, 64), "file_name": "a.png", "sem_seg": torch.full((64, 64), 3)}
    with pytest.raises(ValueError, match=r"a\.png has class 3, but there are 3"):
        model([sample])


@torch.no_grad()
def test_r101c_and_outputs_of_any_size() -> None:
    deeplab = {"MODEL.BACKBONE.NAME": "build_resnet_deeplab_backbone", "MODEL.RESNETS.STRIDE_IN_1X1": False}
    model = build_model(config(**deeplab)).eval()
    assert hasattr(model.backbone.stem, "conv3")
    assert [block.conv2.dilation for block in model.backbone.res5] == [(1, 1), (2, 2), (4, 4)]
    samples = [
        {"image": torch.randint(0, 255, (3, 50, 70)), "height": 33, "width": 91},
        {"image": torch.randint(0, 255, (3, 64, 40))},
    ]
    first, second = model(samples)
    assert first["sem_seg"].shape == (3, 33, 91) and second["sem_seg"].shape == (3, 64, 40)
    assert set(first) == {"sem_seg"}


@torch.no_grad()
def test_swin_trunk() -> None:
    sizes = {"embed_dim": 8, "depths": [2, 2, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
    trunk = SwinTrunk("swin_tiny_patch4_window7_224", pretrained="random", freeze_at=2, kwargs=sizes).eval()
    maps = trunk(torch.randn(1, 3, 36, 60))
    shapes = {"res2": (8, 9, 15), "res3": (16, 5, 8), "res4": (32, 3, 4), "res5": (64, 2, 2)}
    assert {name: tuple(x.shape[1:]) for name, x in maps.items()} == shapes
    assert all(x.mean(1).abs().max() < 1e-5 for x in maps.values())  # normed
    trained = {name for name, p in trunk.named_parameters() if p.requires_grad}
    assert "norms.res2.weight" in trained and not any("layers_0" in name for name in trained)
    with pytest.raises(ValueError, match="Swin"):
        SwinTrunk("resnet18", pretrained="random")


def test_training_crops_after_resizing(tmp_path: Any) -> None:
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "image.png")
    Image.fromarray((np.arange(2400) // 200).astype(np.uint8).reshape(40, 60)).save(tmp_path / "labels.png")
    record = {key: str(tmp_path / name) for key, name in FILES.items()} | {"height": 40, "width": 60}
    keys = {"INPUT.MAPPER": "SegmentationMapper", "INPUT.FORMAT": "RGB", "INPUT.COLOR_AUG_SSD": True}
    keys |= {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [64, 64]}
    cfg = config(**keys, **{"INPUT.MIN_SIZE_TRAIN": (80,), "INPUT.MIN_SIZE_TEST": 20})
    sample = build_mapper(cfg, True)(dict(record))
    assert sample["image"].shape == (3, 64, 64) and sample["sem_seg"].shape == (64, 64)
    assert sample["image"].dtype == torch.uint8
    assert build_mapper(cfg, False)(dict(record))["image"].shape == (3, 20, 30)
    assert cfg.INPUT.CROP.ENABLED


FILES = {"file_name": "image.png", "sem_seg_file_name": "labels.png"}


def test_model_zoo_pickles(tmp_path: Any) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": np.ones(2, np.float32)}, "__author__": "x"}))
    with pytest.raises(CheckpointError, match="allow_pickle"):
        read_checkpoint(path)
    read = read_checkpoint(path, allow_pickle=True)
    assert torch.equal(read.state["a"], torch.ones(2)) and read.extras == {"__author__": "x"}
    path.write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=r"model\.pkl"):
        read_checkpoint(path, allow_pickle=True)
