"""CLIPSelf's dense-accuracy evaluation on a panoptic dataset that the golden file describes."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from clipdense.data.mappers import original_sample
from clipdense.evaluation import CLIPProbe, DenseRegionEvaluator, DenseView
from clipdense.evaluation.regions import MIN_AREA, crop_regions
from clipdense.regions import resize_masks
from tests.helpers.eva_files import load_golden

from detectron2.data import MetadataCatalog

METRICS, SIMILARITY = 1e-3, 1e-5
NAMES = {False: "aa_off", True: "NEG_aa_on"}


@pytest.fixture
def dataset(golden, tmp_path):
    """The file's images and segments as a registered dataset; its samples and the table of class
    embeddings."""
    given, categories = golden.part("in"), golden.config["categories"]
    samples, annotations = [], []
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
        samples.append(original_sample(record))
    # in another order than that of the ids, by which labels are ranks
    content = {"annotations": annotations, "categories": categories[::-1]}
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    ranked = {c["id"]: c["name"] for c in categories}
    index = {"classes": [ranked[i] for i in golden.part("out")["cat_id_sorted"].tolist()]}
    table = tmp_path / "table.safetensors"
    save_file({"embeddings": given["class_embeddings"]}, table, {"index": json.dumps(index)})
    name = f"dense_accuracy_{golden.path.stem}"
    MetadataCatalog.get(name).set(panoptic_json=str(tmp_path / "panoptic.json"), panoptic_root=str(tmp_path))
    yield name, samples, table
    MetadataCatalog.remove(name)


@pytest.mark.golden(name="cs_dense_accuracy")
def test_dense_accuracy(golden, dataset, tmp_path):
    name, samples, table = dataset
    config, expected = golden.config, golden.part("out")
    clip = load_golden(golden.part("state"), config, tmp_path / "clip.safetensors")
    assert clip.image_size == (config["crop_size"],) * 2
    views = [DenseView("clipself", config["det_size"], antialias) for antialias in NAMES]
    evaluator = DenseRegionEvaluator(name, CLIPProbe(clip), views=views, table=table, distributed=False)
    regions = [evaluator.regions(sample) for sample in samples]
    _check_inputs(golden, clip, samples[0], regions[0])
    _check_segments(golden, regions)

    records = [evaluator.process_image(sample, {}) for sample in samples]
    found = [record for record in records if record is not None]
    assert len(found) == sum(r is not None for r in regions)
    _check_similarities(golden, {key: torch.cat([record[key] for record in found]) for key in found[0]})

    results = evaluator.score(records)
    for metrics, prefix in zip(results.values(), NAMES.values(), strict=True):
        ours = {k: v for k, v in metrics.items() if "macc" in k}
        assert ours
        for metric, value in ours.items():
            recorded = float(expected[f"{prefix}.{metric}"])
            assert value / 100 == pytest.approx(recorded, abs=METRICS), f"{prefix}.{metric}"


def _check_inputs(golden, clip, sample, regions):
    """Pixels of the first image, letterboxed, and of its first crops."""
    expected, seen = golden.part("out"), []
    handle = clip.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    probe = CLIPProbe(clip)
    probe.dense_map(sample["image"].permute(1, 2, 0).numpy(), "clipself", golden.config["det_size"])
    torch.testing.assert_close(seen[0][0], expected["img0.student"], atol=1e-5, rtol=0)
    if regions is not None:
        kept = expected["img0.crops"]
        probe.embed_crops(crop_regions(regions, probe.crop_size))
        torch.testing.assert_close(torch.cat(seen[1:])[: len(kept)], kept, atol=1e-5, rtol=0)
    handle.remove()


def _check_segments(golden, regions):
    """Boxes, labels and areas of the measured segments, and their masks at the size of the map."""
    config, expected = golden.config, golden.part("out")
    side = config["det_size"] // config["vision"]["patch_size"]
    for i, found in enumerate(regions):
        rows = expected[f"img{i}.annotation_rows_xyxyn_cls_valid_area_thing"]
        valid = rows[:, 5] > 0.5
        assert not rows[~valid].any()
        if found is None:
            assert not valid.any()
            continue
        x0, y0, x1, y1 = boxes = found.boxes.T
        area = (x1 - x0) * (y1 - y0)
        assert area.min() >= MIN_AREA
        relative = boxes / max(found.image.shape[:2])
        table = torch.stack([*relative, found.labels, torch.ones(len(area)), area, found.things], dim=1)
        torch.testing.assert_close(table, rows[valid], atol=1e-6, rtol=0)
        for antialias, prefix in NAMES.items():
            masks = resize_masks(found.masks, side, antialias=antialias).float()
            assert torch.equal(masks, expected[f"{prefix}.img{i}.gt_masks"][valid])


def _check_similarities(golden, merged):
    """Features of all regions, in order of images: cosine with the true class, and the five best classes."""
    expected = golden.part("out")
    assert torch.equal(merged["labels"], expected["labels"])
    text = F.normalize(golden.part("in")["class_embeddings"], dim=1)
    features = {"crops": merged["crops"], "rois": merged["rois"][:, 0]}
    recorded = {source: (f"sim_{source}", f"correct_top5_{source}") for source in features}
    for view, prefix in enumerate(NAMES.values()):
        features[prefix] = merged["maskpool"][:, view]
        recorded[prefix] = (f"{prefix}.sim_maskpool", f"{prefix}.correct_top5_maskpool")
    similarities = {}
    for source, values in features.items():
        similarity, hits = _ranked(values, text, merged["labels"])
        torch.testing.assert_close(similarity, expected[recorded[source][0]], atol=SIMILARITY, rtol=0)
        assert torch.equal(hits, expected[recorded[source][1]])
        similarities[source] = similarity
    off, on = (
        torch.cat([v.flatten() for k, v in expected.items() if k.startswith(p) and "masks" in k])
        for p in NAMES.values()
    )
    if not torch.equal(
        off, on
    ):  # control: antialiasing changes the masks of this file, and so their features
        golden.tolerance = (SIMILARITY, 0.0)
        assert golden.differs("NEG_aa_on.sim_maskpool", similarities["aa_off"])


def _ranked(features, text, labels):
    """Cosine with the true class (n,), and which of the five best classes it is (n, 5)."""
    scores = features @ text.T
    hits = scores.topk(min(5, len(text)), dim=1).indices == labels[:, None]
    return scores.gather(1, labels[:, None])[:, 0], hits.float()
