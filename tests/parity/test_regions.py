"""Weight-free pooling against the dense maps that golden files store.

These tests read parts of files whose towers and systems have tests of their own, so they claim none of them.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from clipdense.regions import Pooling, pool_boxes, pool_masks, resize_masks


@pytest.fixture
def stored(parity_dir):
    """(config, tensors) of a file of the CLIPSelf family."""

    def load(stem):
        path = parity_dir / "clipself_family" / f"{stem}.safetensors"
        if not path.is_file():
            pytest.skip(f"{path} is not there")
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return json.loads(file.metadata()["config"]), tensors

    return load


def relative_boxes(features, boxes, **options):
    h, w = features.shape[-2:]
    return pool_boxes(features, boxes, scale=(w, h), **options)


def test_clipself_boxes_and_masks(stored):
    _, t = stored("cs_eva_roi_mask")
    dense, boxes, masks = (
        t["out/dense"] * 3,
        t["in/normed_boxes"],
        t["in/masks"],
    )  # any length: it is normalised
    for pooling, suffix in (("clipself_raw", "raw"), ("clipself", "norm")):
        for got, name in (
            (relative_boxes(dense, boxes, pooling=pooling), f"roi_{suffix}"),
            (pool_masks(dense, masks, pooling=pooling), f"mask_{suffix}"),
        ):
            torch.testing.assert_close(got, t[f"out/{name}"], atol=1e-5, rtol=0)
    unnormalised = relative_boxes(dense, boxes) - t["out/roi_raw"]
    assert unnormalised.abs().max() > 1e-3
    samples = relative_boxes(dense, boxes, pooling="clipself_raw", sampling_ratio=1) - t["out/roi_raw"]
    assert samples.abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
def test_clipself_on_a_map_that_is_not_square(stored, activation):
    config, t = stored(f"cs_openclip_dense_{activation}")
    h, w = config["sizes"][-1]
    dense, boxes = t[f"out/dense_{h}x{w}"], t["in/normed_boxes"]
    for pooling, suffix in (("clipself_raw", "raw"), ("clipself", "norm")):
        got = relative_boxes(dense, boxes, pooling=pooling)
        torch.testing.assert_close(got, t[f"out/roi_{suffix}"], atol=1e-5, rtol=0)
    got = pool_masks(dense, t["in/masks"], pooling="clipself_raw")
    torch.testing.assert_close(got, t["out/mask_pool_raw"], atol=1e-5, rtol=0)
    swapped = pool_boxes(dense, boxes, scale=dense.shape[-2:], pooling="clipself_raw")
    assert h == w or (swapped - t["out/roi_raw"]).abs().max() > 1e-3


def test_fcclip_masks(stored):
    _, t = stored("fcclip_ensemble_inference")
    logits = t["in/pred_masks"]
    for features, name in (("clip_vis_dense", "clip_dense"), ("mask_features", "mask_features")):
        dense, expected = t[f"in/{features}"], t[f"out/pooled_{name}"]
        resized = F.interpolate(logits, dense.shape[-2:], mode="bilinear", align_corners=False)
        got = pool_masks(dense, resized, pooling="fcclip").unflatten(0, logits.shape[:2])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        soft = pool_masks(dense, resized.sigmoid()).unflatten(0, logits.shape[:2])
        assert (soft - expected).abs().max() > 1e-3
        globally = pool_masks(dense, resized, pooling=Pooling(threshold=0.0, eps=1e-8, empty="global"))
        empty = (resized <= 0).flatten(0, 1).flatten(1).all(1)
        assert empty.any() and (globally[empty] - expected.flatten(0, 1)[empty]).abs().min(1).values.max() > 0


def test_masks_at_the_size_of_the_map(stored):
    config, t = stored("cs_dense_accuracy")
    side = config["det_size"] // config["vision"]["patch_size"]
    differing = 0
    for i in range(len(config["images"])):
        ids = t[f"in/segments{i}_id_cat_isthing_xywh"][:, 0]
        valid = t[f"out/img{i}.annotation_rows_xyxyn_cls_valid_area_thing"][:, 5] > 0.5
        masks = (t[f"in/segmap{i}"] == ids[:, None, None])[valid[: len(ids)]]
        for antialias, name in ((False, "aa_off"), (True, "NEG_aa_on")):
            golden = t[f"out/{name}.img{i}.gt_masks"][: len(ids)][valid[: len(ids)]]
            torch.testing.assert_close(
                resize_masks(masks, side, antialias=antialias).float(), golden, atol=0, rtol=0
            )
            differing += int((resize_masks(masks, side).float() != golden).sum())
    assert differing > 0
