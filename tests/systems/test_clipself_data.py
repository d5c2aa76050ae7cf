"""CLIPSelf's data: regions, the mapper, and runs from the command line."""

import json
import random
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.clip import load_clip
from clipdense.data.letterbox import crop_box, letterbox
from clipdense.run.config import add_clipdense_config
from clipdense.systems.clipself import CLIPSelfMapper
from clipdense.systems.clipself.regions import draw_patches, draw_proposals, grid_pairs

from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser
from detectron2.structures import BoxMode

ROOT = Path(__file__).resolve().parents[2]
SIZE = (40, 60)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four random images of 40 x 60 pixels."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def record(photos: Path) -> dict:
    boxes = [[10, 10, 20, 10], [0, 0, 7, 9], [30.5, 20, 20, 15], [5, 5, 40, 30]]
    return {
        "file_name": str(photos / "0.png"),
        "image_id": 3,
        "annotations": [
            {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": i} for i, box in enumerate(boxes)
        ],
    }


def mapper(is_train: bool = True, **keys: object) -> CLIPSelfMapper:
    cfg = get_cfg()
    add_clipdense_config(cfg)
    cfg.INPUT.CLIPSELF.IMAGE_SIZE, cfg.INPUT.CLIPSELF.CROP_SIZE = 96, 32
    for key, value in keys.items():
        cfg.INPUT.CLIPSELF[key] = value
    return CLIPSelfMapper(cfg, is_train)


def pixels(sample: torch.Tensor) -> np.ndarray:
    return sample.permute(1, 2, 0).numpy()


def test_patches_tile_the_image() -> None:
    rng, seen = random.Random(0), set()
    for _ in range(400):
        regions = draw_patches((75, 101), rng)
        seen.add(tuple(np.unique(regions.boxes[:, 2:] - regions.boxes[:, :2]).round(3)))
        assert len(regions.boxes) <= 20 and regions.valid.all()
        area = (regions.boxes[:, 2:] - regions.boxes[:, :2]).prod(1)
        assert len(np.unique(regions.boxes.round(2), axis=0)) == len(regions.boxes)
        assert area.sum() == pytest.approx(75 * 101, rel=1e-4) or len(regions.boxes) == 20
        assert np.array_equal(regions.boxes, regions.crops)
    assert len(seen) == 24 == len(grid_pairs())
    assert len(draw_patches((75, 101), random.Random(1), max_boxes=1).boxes) == 1
    enlarged = draw_patches((75, 101), random.Random(2), crop_scale=1.5)
    assert (enlarged.crops[:, :2] <= enlarged.boxes[:, :2]).all() and (enlarged.crops != enlarged.boxes).any()
    assert enlarged.crops.min() >= 0 and (enlarged.crops <= [101, 75, 101, 75]).all()
    again = [draw_patches((75, 101), random.Random(5)).boxes for _ in range(2)]
    assert np.array_equal(*again)


def test_proposals_are_a_random_part_of_the_boxes() -> None:
    boxes = np.array([[i, i, 10.0, 10.0] for i in range(30)])
    first, second = (draw_proposals(boxes, (90, 90), random.Random(seed)) for seed in (0, 1))
    assert len(first.boxes) == 20 == len(np.unique(first.boxes, axis=0))
    assert not np.array_equal(first.boxes, second.boxes)
    sizes = [[0, 0, 7.9, 8], [0, 0, 8, 8], [0, 0, 1024, 1024], [0, 0, 1025, 1024]]
    regions = draw_proposals(sizes, (2000, 2000), random.Random(0))
    assert sorted(map(tuple, regions.boxes[regions.valid])) == [(0, 0, 8, 8), (0, 0, 1024, 1024)]
    nothing = draw_proposals([], (80, 61), random.Random(0))
    assert nothing.boxes.tolist() == [[0, 0, 15.25, 20]] and nothing.crops.tolist() == [[0, 0, 15, 20]]


def test_patches_need_no_annotations(record: dict) -> None:
    del record["annotations"]
    random.seed(0)
    sample = mapper(REGIONS="patches")(record)
    image = np.asarray(Image.open(record["file_name"]))
    assert np.array_equal(pixels(sample["image"]), letterbox(image, 96)[0])
    assert sample["crops"].dtype == torch.uint8 and len(sample["crops"]) == len(sample["boxes"])
    for box, crop in zip(sample["boxes"], sample["crops"], strict=True):
        assert np.array_equal(pixels(crop), crop_box(image, tuple((box * 60).tolist()), 32))
    random.seed(0)  # the loader's randomness decides
    assert torch.equal(mapper(REGIONS="patches")(record)["boxes"], sample["boxes"])
    sample = mapper(False)(record)
    assert sample.keys() == {"file_name", "image_id", "image"} and np.array_equal(
        pixels(sample["image"]), image
    )


def test_proposals_see_context(record: dict) -> None:
    sample = mapper(REGIONS="proposals")(record)
    image = np.asarray(Image.open(record["file_name"]))
    boxes = sorted((sample["boxes"] * 60).round(decimals=3).tolist())
    assert boxes == [[5, 5, 45, 35], [10, 10, 30, 20], [30.5, 20, 50.5, 35]]  # 7 x 9 is too small
    row = (sample["boxes"] * 60).round(decimals=3).tolist().index([10, 10, 30, 20])
    assert np.array_equal(pixels(sample["crops"][row]), crop_box(image, (5, 7.5, 35, 22.5), 32))
    del record["annotations"]
    with pytest.raises(KeyError, match=r"0\.png has no annotations, which .* proposals"):
        mapper(REGIONS="proposals")(record)
    with pytest.raises(ValueError, match="REGIONS 'boxes': expected patches, proposals, concepts"):
        mapper(REGIONS="boxes")


def test_concepts_are_the_first_annotations(record: dict) -> None:
    sample = mapper(REGIONS="concepts", MAX_BOXES=3)(record)
    assert sample["concepts"].tolist() == [0, 1, 2] and "crops" not in sample
    torch.testing.assert_close(sample["boxes"][1] * 60, torch.tensor([0.0, 0, 7, 9]))
    record["annotations"] = []
    empty = mapper(REGIONS="concepts")(record)
    assert empty["boxes"].shape == (0, 4) and empty["concepts"].shape == (0,)


def test_damaged_images(record: dict) -> None:
    Path(record["file_name"]).write_bytes(b"no png")
    with pytest.raises(OSError, match=r"0\.png"):
        mapper()(record)
    assert CLIPSelfMapper(skip_bad_images=True)(record) is None


CONFIG = """
_BASE_: {base}
MODEL: {{CLIP: {{NAME: shapes-vit, PRETRAINED: random}}}}
DATASETS:
  {data}
  TEST: []
DATALOADER: {{NUM_WORKERS: 0}}
INPUT: {{CLIPSELF: {{REGIONS: {regions}, IMAGE_SIZE: 32}}}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 4, CHECKPOINT_PERIOD: 2, BASE_LR: 0.01, WARMUP_ITERS: 0}}
SEED: 1
OUTPUT_DIR: {output}
"""


def train(config: Path, *settings: object, resume: bool = False) -> None:
    arguments = ["--config-file", str(config), *(["--resume"] if resume else []), *map(str, settings)]
    main = runpy.run_path(str(ROOT / "tools" / "train_net.py"))["main"]
    main(default_argument_parser().parse_args(arguments))


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    def write(data: str, regions: str = "patches") -> Path:
        path = tmp_path / "clipself.yaml"
        base = ROOT / "configs" / "shapes" / "Base-CLIPSelf.yaml"
        path.write_text(CONFIG.format(base=base, data=data, regions=regions, output=tmp_path / "out"))
        return path

    return write


def test_a_run_on_a_folder_resumes_exactly_and_exports_a_clip(
    tmp_path: Path, config: Callable[..., Path], catalogs: None, photos: Path
) -> None:
    path = config(f'IMAGES: ["photos:{photos}"]\n  TRAIN: [photos]')
    train(path)
    whole = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000001.pth")
    train(path, resume=True)
    resumed = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    assert all(torch.equal(whole[k], v) for k, v in resumed.items())
    clip = load_clip(str(tmp_path / "out" / "export.safetensors"))
    key = "transformer.resblocks.0.mlp.c_fc.weight"
    student, teacher = whole[f"student.visual.{key}"], whole[f"teacher.visual.{key}"]
    assert not torch.allclose(student, teacher, atol=1e-3)
    torch.testing.assert_close(clip.visual.get_parameter(key), 0.7 * student + 0.3 * teacher)


def test_a_run_on_concepts(tmp_path: Path, config: Callable[..., Path], catalogs: None, photos: Path) -> None:
    classes = ["cat", "dog", "sky"]
    content = {
        "images": [
            {"id": i, "file_name": p.name, "height": 40, "width": 60}
            for i, p in enumerate(sorted(photos.glob("*.png")))
        ],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i,
                "category_id": 5 * (i % 3),
                "bbox": [5, 5, 20, 20],
                "area": 400,
                "iscrowd": 0,
            }
            for i in range(3)
        ],
        "categories": [{"id": 5 * k, "name": name} for k, name in enumerate(classes)],
    }
    (tmp_path / "nouns.json").write_text(json.dumps(content))
    np.save(tmp_path / "nouns.npy", np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32))
    data = f'COCO_JSON: ["nouns:{tmp_path}/nouns.json:{photos}"]\n  TRAIN: [nouns]'
    train(
        config(data, "concepts"),
        *(
            "MODEL.META_ARCHITECTURE",
            "RegionCLIPBaseline",
            "MODEL.CLIPSELF.CONCEPTS",
            tmp_path / "nouns.npy",
            "SOLVER.MAX_ITER",
            2,
        ),
    )
    line = json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[-1])
    assert line["total_loss"] > 0


# ---- jitter (not in the paper)


def test_jittered_copies_follow_the_regions(record: dict) -> None:
    plain, jittered = (mapper(REGIONS="proposals", JITTER=n) for n in (0, 2))
    random.seed(0)
    first = plain.draw(record, SIZE)
    random.seed(0)
    found = jittered.draw(record, SIZE)
    n, valid = len(first.boxes), int(first.valid.sum())
    np.testing.assert_array_equal(found.boxes[:n], first.boxes)
    np.testing.assert_array_equal(found.crops[:n], first.crops)
    assert found.boxes.shape == found.crops.shape == (n + 2 * valid, 4) and found.valid[n:].all()
    sources = first.boxes[first.valid].repeat(2, axis=0)
    copies = found.boxes[n:]
    assert (copies != sources).any(1).all()
    assert (copies[:, :2] >= 0).all() and (copies[:, 2:] <= [SIZE[1], SIZE[0]]).all()
    sides, old = copies[:, 2:] - copies[:, :2], sources[:, 2:] - sources[:, :2]
    assert (sides > 0).all() and (sides <= old * 4 / 3 + 1e-9).all()
    centres = (copies[:, 2:] + copies[:, :2] - sources[:, 2:] - sources[:, :2]) / 2
    clipped = (copies[:, :2] == 0).any(1) | (copies[:, 2:] == [SIZE[1], SIZE[0]]).any(1)
    assert (abs(centres) <= old / 4 + 1e-9)[~clipped].all()


def test_jittered_samples_have_a_crop_for_each_box(record: dict) -> None:
    random.seed(0)
    sample = mapper(REGIONS="patches", JITTER=1, MAX_SPLIT=2)(record)
    assert sample is not None and len(sample["boxes"]) == len(sample["crops"]) >= 2
    assert len(sample["boxes"]) % 2 == 0 and (sample["boxes"] >= 0).all() and (sample["boxes"] <= 1).all()
