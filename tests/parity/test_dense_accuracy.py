"""CLIPSelf's dense-accuracy evaluation on a panoptic data set that the golden file describes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipdense.clip import load_clip
from clipdense.evaluation import DenseRegionEvaluator, DenseView
from clipdense.evaluation.dense_regions import MIN_AREA
from clipdense.regions import resize_masks

from detectron2.data import MetadataCatalog

METRICS, SIMILARITY = 1e-3, 1e-5
NAMES = {False: "aa_off", True: "NEG_aa_on"}


@pytest.fixture
def dataset(golden, tmp_path):
    """The file's images and segments as a registered data set; its records and the table of class
    embeddings."""
    given, categories = golden.part("in"), golden.config["categories"]
    records, annotations = [], []
    for i in range(len(golden.config["images"])):
        record = {"image_id": i, "file_name": str(tmp_path / f"image{i}.png")}
        Image.fromarray(given[f"image{i}"].numpy()).save(record["file_name"])
        ids = given[f"segmap{i}"].numpy()
        colours = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
        Image.fromarray(colours).save(tmp_path / f"segments{i}.png")
        segments = [
            {"id": row[0], "category_id": row[1], "bbox": row[3:]}
            for row in given[f"segments{i}_id_cat_isthing_xywh"].tolist()
        ]
        annotations.append({"image_id": i, "file_name": f"segments{i}.png", "segments_info": segments})
        records.append(record)
    # in another order than that of the ids, by which labels are ranks
    content = {"annotations": annotations, "categories": categories[::-1]}
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    ranked = {c["id"]: c["name"] for c in categories}
    index = {"classes": [ranked[i] for i in golden.part("out")["cat_id_sorted"].tolist()]}
    table = tmp_path / "table.safetensors"
    save_file({"embeddings": given["class_embeddings"]}, table, {"index": json.dumps(index)})
    name = f"dense_accuracy_{golden.path.stem}"
    MetadataCatalog.get(name).set(panoptic_json=str(tmp_path / "panoptic.json"), panoptic_root=str(tmp_path))
    yield name, records, table
    MetadataCatalog.remove(name)


@pytest.mark.golden(name="cs_dense_accuracy")
def test_dense_accuracy(golden, dataset, tmp_path):
    name, records, table = dataset
    config, expected = golden.config, golden.part("out")
    save_file(golden.part("state"), tmp_path / "clip.safetensors")
    vision = config["vision"]
    clip = load_clip(
        tmp_path / "clip.safetensors", head_width=vision["head_width"], text_heads=config["text"]["heads"]
    )
    clip.visual.trunk.rope.ref_feat_shape = (vision["pt_hw_seq_len"],) * 2
    assert clip.image_size == (config["crop_size"],) * 2
    views = [DenseView("clipself", config["det_size"], antialias) for antialias in NAMES]
    evaluator = DenseRegionEvaluator(name, views=views, table=table, distributed=False)

    seen = []
    clip.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = [evaluator.process_image(record, {"clip": clip}) for record in records]
    student, crops = seen[:2]
    torch.testing.assert_close(student[0], expected["img0.student"], atol=1e-5, rtol=0)
    kept = expected["img0.crops"]
    torch.testing.assert_close(crops[: len(kept)], kept, atol=1e-5, rtol=0)

    _check_segments(golden, evaluator, records)

    # features of every region, in order of images
    labels = torch.cat([record["labels"] for record in found])
    assert torch.equal(labels, expected["labels"])
    text = golden.part("in")["class_embeddings"]
    text = text / text.norm(dim=1, keepdim=True)
    features = {key: torch.cat([r[key] for r in found]) for key in ("crops", "rois", "maskpool")}
    for source, values in (("crops", features["crops"]), ("rois", features["rois"][:, 0])):
        similarity, hits = _ranked(values, text, labels)
        torch.testing.assert_close(similarity, expected[f"sim_{source}"], atol=SIMILARITY, rtol=0)
        assert torch.equal(hits, expected[f"correct_top5_{source}"])
    pooled = {}
    for view, prefix in enumerate(NAMES.values()):
        similarity, hits = pooled[prefix] = _ranked(features["maskpool"][:, view], text, labels)
        torch.testing.assert_close(similarity, expected[f"{prefix}.sim_maskpool"], atol=SIMILARITY, rtol=0)
        assert torch.equal(hits, expected[f"{prefix}.correct_top5_maskpool"])
    golden.tolerance = (SIMILARITY, 0.0)
    assert golden.differs("NEG_aa_on.sim_maskpool", pooled["aa_off"][0])

    results = evaluator.score(found)
    for metrics, prefix in zip(results.values(), NAMES.values(), strict=True):
        recorded = {k.removeprefix(f"{prefix}."): v for k, v in expected.items() if "macc" in k}
        recorded = {k: float(v) for k, v in recorded.items() if k in metrics}
        assert len(recorded) == 12
        for metric, value in recorded.items():
            assert metrics[metric] / 100 == pytest.approx(value, abs=METRICS), f"{prefix}.{metric}"


def _check_segments(golden, evaluator, records):
    """Boxes, labels and areas of the segments that count, and their masks at the size of the map."""
    config, expected = golden.config, golden.part("out")
    side = config["det_size"] // config["vision"]["patch_size"]
    differing = 0
    for i, record in enumerate(records):
        regions = evaluator.regions(record)
        rows = expected[f"img{i}.annotation_rows_xyxyn_cls_valid_area_thing"]
        valid = rows[:, 5] > 0.5
        x0, y0, x1, y1 = boxes = regions.boxes.T
        area = (x1 - x0) * (y1 - y0)
        assert area.min() >= MIN_AREA
        table = torch.stack(
            [
                *boxes / max(regions.image.shape[:2]),
                regions.labels,
                torch.ones(len(area)),
                area,
                regions.things,
            ]
        )
        torch.testing.assert_close(table.T, rows[valid], atol=1e-6, rtol=0)
        assert not rows[~valid].any()
        for antialias, prefix in NAMES.items():
            masks = resize_masks(regions.masks, side, antialias=antialias).float()
            assert torch.equal(masks, expected[f"{prefix}.img{i}.gt_masks"][valid])
            differing += int((masks != expected[f"aa_off.img{i}.gt_masks"][valid]).sum())
    assert differing


def _ranked(features, text, labels):
    """Cosine with the true class (n,), and which of the five best classes it is (n, 5)."""
    scores = features @ text.T
    hits = scores.topk(5, dim=1).indices == labels[:, None]
    return scores.gather(1, labels[:, None])[:, 0], hits.float()
