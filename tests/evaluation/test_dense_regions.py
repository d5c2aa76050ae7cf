"""Dense regions: which segments are measured, what is pooled, and what the metrics mean."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipdense import add_clipdense_config
from clipdense.clip import TowerRequest, load_clip
from clipdense.clip.text import TextBank
from clipdense.data.datasets.standard import register_standard
from clipdense.data.image import read_labels
from clipdense.data.mappers import original_sample
from clipdense.evaluation import CLIPProbe, DenseRegionEvaluator, DenseView, Probes, build_evaluator
from clipdense.evaluation.accuracy import recall, region_accuracy
from clipdense.evaluation.dense_regions import pixel_hits, pool_regions
from clipdense.evaluation.probes import best_dense_mode
from clipdense.evaluation.regions import Regions, crop_regions, find_regions

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

CATEGORIES = [
    {"id": 9, "name": "grass", "isthing": 0},
    {"id": 2, "name": "red star", "isthing": 1},
    {"id": 4, "name": "blue ring", "isthing": 1},
]
CLASSES = {2: (0, True), 4: (1, True), 9: (2, False)}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return load_clip("shapes-vit", "random")


@pytest.fixture(scope="module")
def probe(clip):
    return CLIPProbe(clip)


def model_input(clip, image):
    """Images (B, H, W, 3) uint8 as the CLIP takes them."""
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(clip.pixel_mean).view(3, 1, 1)) / torch.tensor(clip.pixel_std).view(3, 1, 1)


def crop_features(probe, regions: Regions):
    return F.normalize(probe.embed_crops(crop_regions(regions, probe.crop_size)), dim=1)


@pytest.fixture
def scene():
    """60 x 96 px: grass with a red thing of id 7 at (10, 5) .. (30, 25) and a small one of id 300."""
    ids = np.full((60, 96), 1, np.int64)
    ids[5:25, 10:30] = 7
    ids[50:56, 80:86] = 300
    image = np.full((60, 96, 3), 90, np.uint8)
    image[5:25, 10:30] = (255, 0, 0)
    segments = [
        {"id": 1, "category_id": 9, "bbox": [0, 0, 96, 60]},
        {"id": 7, "category_id": 4, "bbox": [10, 5, 20, 20]},
        {"id": 300, "category_id": 2, "bbox": [80, 50, 6, 6]},
    ]
    return image, ids, segments


@pytest.fixture
def dataset(scene, tmp_path, register):
    """A registered dataset of that scene, twice, and its samples."""
    image, ids, segments = scene
    records, annotations = [], []
    for i in (1, 2):
        Image.fromarray(np.roll(image, i, axis=2)).save(tmp_path / f"{i}.png")
        Image.fromarray(np.stack([ids & 255, ids >> 8, 0 * ids], -1).astype(np.uint8)).save(
            tmp_path / f"panoptic_{i}.png"
        )
        annotations.append({"image_id": i, "file_name": f"panoptic_{i}.png", "segments_info": segments})
        records.append(original_sample({"image_id": i, "file_name": str(tmp_path / f"{i}.png")}))
    path = tmp_path / "panoptic.json"
    images = [{"id": i, "file_name": f"{i}.png", "height": 60, "width": 96} for i in (1, 2)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    name = register(
        records,
        panoptic_json=str(path),
        panoptic_root=str(tmp_path),
        thing_classes=["red star", "blue ring"],
        class_attributes={"color": ["red", "blue"]},
        novel_classes=["blue ring"],
    )
    return name, records


def test_measured_segments(scene):
    image, ids, segments = scene
    found = find_regions(image, ids, segments, CLASSES)
    assert found.labels.tolist() == [2, 1] and found.things.tolist() == [False, True]
    # stuff: the extreme pixels of the mask, not one more; a thing: its annotated box
    assert found.boxes.tolist() == [[0, 0, 95, 59], [10, 5, 30, 25]]
    assert np.array_equal(found.masks.numpy(), [ids == 1, ids == 7])
    at_limit = {"id": 7, "category_id": 4, "bbox": [0, 0, 8, 8]}
    below = {"id": 7, "category_id": 4, "bbox": [0, 0, 8, 7.9]}
    assert len(find_regions(image, ids, [at_limit, below], CLASSES).labels) == 1
    empty_stuff = {"id": 99, "category_id": 9, "bbox": [0, 0, 50, 50]}
    assert find_regions(image, ids, [below, empty_stuff], CLASSES) is None
    assert len(find_regions(image, ids, [at_limit] * 101, CLASSES).labels) == 100


def test_features_by_hand(clip, probe, scene):
    regions = find_regions(*scene, CLASSES)
    with torch.inference_mode():
        # the thing's crop is its box, 1.5 times as large, cut at the border: (5, 0) .. (35, 30)
        cut = Image.fromarray(scene[0]).crop((5, 0, 35, 30)).resize((64, 64), Image.Resampling.BICUBIC)
        expected = F.normalize(clip.encode_image(model_input(clip, np.array(cut)[None])), dim=1)
        torch.testing.assert_close(crop_features(CLIPProbe(clip, batch_size=1), regions)[1:], expected)
        dense = probe.dense_map(regions.image, "value")
        canvas = np.zeros((1, 96, 96, 3), np.uint8)  # longest side 96 = 12 patches, black below
        canvas[0, :60] = scene[0]
        expected = clip.visual(model_input(clip, canvas), TowerRequest(dense="value")).dense
        torch.testing.assert_close(dense, expected)
        boxes, masks = pool_regions(dense, regions)
    unit = F.normalize(dense, dim=1)[0]
    # the mask of the thing covers cells whose centre value is above 0 after bicubic resizing: all in
    # columns 1 .. 3, rows 0 .. 3
    cells = F.interpolate(regions.masks[1:, None].float(), (8, 12), mode="bicubic")[0, 0] > 0
    torch.testing.assert_close(masks[1], F.normalize(unit[:, :8][:, cells].mean(1), dim=0))
    assert (boxes.norm(dim=1) - 1).abs().max() < 1e-5 and not torch.allclose(boxes[1], masks[1], atol=1e-3)


def test_pixels_by_hand(scene):
    """A map of 12 x 12 cells of 8 px over 96 px: rows below 60 px are padding and must not count."""
    regions = find_regions(*scene, CLASSES)
    text = torch.eye(3)
    dense = text[2].view(1, 3, 1, 1).repeat(1, 1, 12, 12)  # grass everywhere
    thing, ground = int(regions.masks[1].sum()), int(regions.masks[0].sum())
    assert pixel_hits(dense, text, regions).tolist() == [0, thing, ground, thing + ground]
    dense[:, :, 8:] = -dense[:, :, 8:]  # whatever the padding says
    assert pixel_hits(dense, text, regions).tolist() == [0, thing, ground, thing + ground]
    dense[0, :, :5, :6] = text[1].view(3, 1, 1)  # blue ring on the top left 40 x 48 px, up to the resizing
    hits = pixel_hits(dense, text, regions).tolist()
    assert hits[:2] == [thing, thing]
    assert abs((hits[2] - hits[0]) - (ground - (40 * 48 - thing))) < 2 * (40 + 48)


def test_sizes_and_modes(clip, probe, scene):
    image = scene[0]
    assert probe.dense_map(image).shape[-2:] == (12, 12)
    assert probe.dense_map(image[:, :93]).shape[-2:] == (12, 12)  # rounded up
    assert probe.dense_map(image, image_size=64).shape[-2:] == (8, 8)
    with pytest.raises(ValueError, match="100 is not a multiple of the stride 8"):
        probe.dense_map(image, image_size=100)
    mode = best_dense_mode(clip.visual)
    assert mode in ("clipself", "value") and best_dense_mode(load_clip("shapes-rn").visual) == "value"
    assert torch.equal(probe.dense_map(image), probe.dense_map(image, mode))
    assert not torch.allclose(probe.dense_map(image), probe.dense_map(image, "plain"), atol=1e-3)


def test_accuracy_of_hand_made_predictions():
    scores = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [1, 2, 3, 0]])
    labels = torch.tensor([0, 0, 1, 2])
    groups = {"novel": [2], "base": [0, 1, 3], "all": [0, 1, 2], "none": [3]}
    attributes = {"color": ["red", "red", "blue", ""], "size": ["big", "small", "big", ""]}
    assert region_accuracy(scores, labels, groups, attributes) == pytest.approx(
        {
            "top1": 75,
            "macc1": 100 * (1 + 0 + 1) / 3,
            "macc5": 100,
            "top1-novel": 100,
            "top1-base": 100 * 2 / 3,
            "top1-color": 100,
            "top1-size": 75,
        }
    )
    six = torch.arange(7.0).expand(1, 7)
    assert region_accuracy(six, torch.tensor([2]))["macc5"] == 100
    assert region_accuracy(six, torch.tensor([1]))["macc5"] == 0
    assert region_accuracy(six[:0], labels[:0]) == {}


def test_recall_by_hand():
    gallery = F.normalize(torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]]), dim=1)
    assert recall(gallery, gallery, 1, block=2) == 100
    queries = gallery[[0, 2, 1]]  # the own row of the second and third is second nearest
    assert recall(queries, gallery, 1, block=2) == pytest.approx(100 / 3)
    assert recall(queries, gallery, 2, block=2) == 100
    constant = torch.ones(3, 2)
    assert recall(constant, constant, 1) == 0  # equal features find nothing


def test_every_view_of_a_dataset(clip, probe, dataset, tmp_path):
    name, records = dataset
    views = [DenseView("value", 64), DenseView("value", 64, antialias=True), DenseView("plain", 128)]
    evaluator = DenseRegionEvaluator(name, probe, str(tmp_path / "out"), views=views, distributed=False)
    evaluator.reset()
    evaluator.process(records, [{}] * 2)
    results = evaluator.evaluate()
    assert json.loads((tmp_path / "out" / "dense_regions.json").read_text()) == results
    assert list(results) == [
        f"dense_regions[{view}]" for view in ("value,64", "value,64,antialias", "plain,128")
    ]
    first, smooth, plain = results.values()
    assert (first["thing.n"], first["stuff.n"]) == (2, 2)
    assert {k for k in first if k.startswith("rois.thing")} == {
        f"rois.thing.{metric}" for metric in ("top1", "macc1", "macc5", "top1-color")
    }
    assert "rois.stuff.top1-color" not in first
    assert 0 <= first["pixels.thing"] <= 100 and 0 <= first["pixels.all"] <= 100
    same = [k for k in first if not k.startswith("maskpool")]
    assert {k: first[k] for k in same} == {k: smooth[k] for k in same}
    crops = [k for k in first if k.startswith("crops")]
    assert {k: first[k] for k in crops} == {k: plain[k] for k in crops}
    # by hand: all classes compete, in order of category ids
    text = TextBank(clip)(["red star", "blue ring", "grass"])
    found = [evaluator.regions(record) for record in records]
    with torch.inference_mode():
        things = torch.cat([crop_features(probe, regions)[1:] for regions in found])
    hits = (things @ text.T).argmax(1) == 1
    assert first["crops.thing.macc1"] == 100 * hits.double().mean()


def test_class_embeddings_decide(probe, dataset, tmp_path):
    name, records = dataset
    regions = DenseRegionEvaluator(name, probe, distributed=False).regions(records[0])
    stuff, thing = crop_features(probe, regions)
    table = tmp_path / "table.npy"
    for rows, accuracy in (([-thing, thing, stuff], 100), ([thing, -thing, -stuff], 0)):
        np.save(table, torch.stack(rows).numpy())
        evaluator = DenseRegionEvaluator(name, probe, table=table, distributed=False)
        evaluator.reset()
        evaluator.process(records[:1], [{}])
        metrics = evaluator.evaluate()["dense_regions"]
        assert metrics["crops.thing.macc1"] == metrics["crops.stuff.top1"] == accuracy


def test_config_reaches_the_evaluator(probe, dataset, tmp_path):
    name, records = dataset
    MetadataCatalog.get(name).evaluator_type = "dense_regions"
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.DENSE_REGIONS.MODE, cfg.TEST.DENSE_REGIONS.IMAGE_SIZE = "plain", 64
    cfg.TEST.DENSE_REGIONS.ANTIALIAS, cfg.TEST.DENSE_REGIONS.TEMPLATES = True, "a picture of {}"
    built = build_evaluator(cfg, name, probes=Probes(dense=probe))
    views = [DenseView("plain", 64, True)]
    expected = DenseRegionEvaluator(name, probe, views=views, templates="a picture of {}")
    for evaluator in (built, expected):
        evaluator.reset()
        evaluator.process(records, [{}] * 2)
    assert built.evaluate() == expected.evaluate()
    assert (tmp_path / "inference" / name / "dense_regions.json").is_file()
    np.save(tmp_path / "table.npy", torch.randn(3, probe.embed_dim).numpy())
    cfg.TEST.DENSE_REGIONS.TABLE = str(tmp_path / "table.npy")
    other = build_evaluator(cfg, name, probes=Probes(dense=probe))
    other.process(records, [{}] * 2)
    assert other.evaluate().keys() == {"dense_regions"}
    with pytest.raises(ValueError, match=r"dense_regions', which needs a model with a dense_probe\(\)"):
        build_evaluator(cfg, name)


def test_errors_name_the_image_or_dataset(probe, dataset, register):
    name, records = dataset
    evaluator = DenseRegionEvaluator(name, probe, distributed=False)
    with pytest.raises(ValueError, match="image 5 is not in the panoptic annotations"):
        evaluator.process([records[0] | {"image_id": 5}], [{}])
    with pytest.raises(ValueError, match="an image of 30 x 96 pixels, but its ground truth is 60 x 96"):
        evaluator.process([records[0] | {"image": records[0]["image"][:, :30]}], [{}])
    boxes = register([], thing_classes=["red star"])
    with pytest.raises(ValueError, match=f"'{boxes}' has no panoptic annotations"):
        DenseRegionEvaluator(boxes, probe, distributed=False).regions(records[0])


def test_a_dataset_without_regions(probe, tmp_path, register):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    annotation = {"image_id": 1, "file_name": "a.png", "segments_info": []}
    content = {"annotations": [annotation], "categories": CATEGORIES}
    (tmp_path / "p.json").write_text(json.dumps(content))
    name = register([], panoptic_json=str(tmp_path / "p.json"), panoptic_root=str(tmp_path))
    evaluator = DenseRegionEvaluator(name, probe, distributed=False)
    record = {"image_id": 1, "file_name": str(tmp_path / "a.png")}
    evaluator.process([original_sample(record)], [{}])
    assert evaluator.evaluate() == {}


@pytest.fixture
def coco_val(data_dir, catalogs):
    """The sample's COCO panoptic validation set, registered for one test."""
    DatasetCatalog.clear()
    MetadataCatalog.clear()
    register_standard(data_dir)
    return "coco_2017_val_panoptic_with_sem_seg"


@pytest.mark.parametrize("model", ["shapes-vit", "shapes-rn"])
def test_real_images(coco_val, model):
    records = DatasetCatalog.get(coco_val)[:3]
    views = [DenseView("", 320, antialias) for antialias in (False, True)]
    evaluator = DenseRegionEvaluator(coco_val, CLIPProbe(load_clip(model)), views=views, distributed=False)
    evaluator.reset()
    evaluator.process([original_sample(record) for record in records], [{}] * len(records))
    off, on = evaluator.evaluate().values()
    counts = {"thing.n": 0, "stuff.n": 0}
    for record in records:
        ids = read_labels(record["pan_seg_file_name"])
        for segment in record["segments_info"]:
            _, _, w, h = segment["bbox"]
            if not segment["isthing"]:
                rows, columns = (ids == segment["id"]).nonzero()
                w, h = np.ptp(columns), np.ptp(rows)
            counts["thing.n" if segment["isthing"] else "stuff.n"] += 64 <= w * h <= 1024**2
    assert {key: off[key] for key in counts} == counts and min(counts.values()) > 5
    assert all(0 <= value <= 100 for key, value in off.items() if not key.endswith(".n"))
    differing = {key for key in off if off[key] != on[key]}
    assert all(key.startswith("maskpool") for key in differing)


def test_a_missing_box_is_that_of_the_mask():
    ids = np.zeros((40, 50), np.int64)
    ids[10:30, 5:45] = 7
    image = np.zeros((40, 50, 3), np.uint8)
    stated = find_regions(image, ids, [{"id": 7, "category_id": 1, "bbox": [5, 10, 40, 20]}], {1: (0, True)})
    missing = find_regions(image, ids, [{"id": 7, "category_id": 1}], {1: (0, True)})
    assert stated.boxes.tolist() == missing.boxes.tolist() == [[5, 10, 45, 30]]
