"""Images without annotations: folders, JSON lists, webdataset shards."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from clipdense.data.datasets.own import register_from_config
from clipdense.data.image import BadImageError, read_image
from clipdense.data.loader import build_train_loader, load_dataset_dicts

from detectron2.config import CfgNode


@pytest.fixture
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (6 + i, 9, 3), dtype=np.uint8) for i in range(6)]


@pytest.fixture
def folder(tmp_path: Path, pictures: list[np.ndarray]) -> Path:
    for i, picture in enumerate(pictures):
        path = tmp_path / "photos" / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    (tmp_path / "photos" / "note.txt").write_text("no image")
    return tmp_path / "photos"


def loaded(cfg: CfgNode, entry: str) -> list[dict]:
    cfg.DATASETS.IMAGES = [entry]
    register_from_config(cfg)
    return load_dataset_dicts(cfg, [entry.split(":")[0]], training=True)


def same(records: list[dict], pictures: list[np.ndarray]) -> bool:
    images = [read_image(record["file_name"]) for record in records]
    return sorted(i.tobytes() for i in images) == sorted(p.tobytes() for p in pictures)


def test_folder(cfg: CfgNode, catalogs: None, folder: Path, pictures: list[np.ndarray]) -> None:
    records = loaded(cfg, f"photos:{folder}")
    assert [r["image_id"] for r in records] == list(range(6)) and same(records, pictures)


def test_json_list(cfg: CfgNode, catalogs: None, folder: Path, pictures: list[np.ndarray]) -> None:
    content = {"images": [{"id": 10 + i, "file_name": f"{i % 2}/{i}.png"} for i in range(6)]}
    (folder / "list.json").write_text(json.dumps(content))
    records = loaded(cfg, f"listed:{folder}/list.json:{folder}")
    assert [r["image_id"] for r in records] == list(range(10, 16)) and same(records, pictures)


def test_shards(cfg: CfgNode, catalogs: None, tmp_path: Path, pictures: list[np.ndarray]) -> None:
    """Written by the webdataset library, captions beside the images; shuffled and resumed exactly."""
    with webdataset.ShardWriter(str(tmp_path / "part-%03d.tar"), maxcount=4, verbose=0) as sink:
        for i, picture in enumerate(pictures):
            sink.write({"__key__": f"{i:05d}", "png": picture, "txt": f"caption {i}"})
    entry = f"shards:{tmp_path}/part-{{000..001}}.tar"
    records = loaded(cfg, entry)
    assert len(records) == 6 and same(records, pictures)

    def mapper(record: dict) -> bytes:
        return read_image(record["file_name"]).tobytes()

    cfg.DATASETS.TRAIN, cfg.SOLVER.IMS_PER_BATCH = ["shards"], 2
    whole, resumed = (iter(build_train_loader(cfg, start, mapper=mapper)) for start in (0, 3))
    batches = [next(whole) for _ in range(5)]
    assert [next(resumed) for _ in range(2)] == batches[3:] and batches[0] != batches[1]


def test_a_damaged_image_in_a_shard_is_named(cfg: CfgNode, catalogs: None, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no jpeg")
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        shard.add(tmp_path / "bad.jpg", "inside/bad.jpg")
    (record,) = loaded(cfg, f"bad:{tmp_path}/s.tar")
    with pytest.raises(BadImageError, match=r"s\.tar.*inside/bad\.jpg"):
        read_image(record["file_name"])


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("photos", ValueError, "name:folder"),
        ("photos:/no/such/folder", FileNotFoundError, "photos: /no/such/folder"),
        ("photos:/no/such-{0..1}.tar", FileNotFoundError, r"such-0\.tar"),
        ("photos:images.json", ValueError, "needs the folder of its images"),
    ],
)
def test_wrong_entries(cfg: CfgNode, catalogs: None, entry: str, error: type, message: str) -> None:
    cfg.DATASETS.IMAGES = [entry]
    with pytest.raises(error, match=message):
        register_from_config(cfg)


def test_empty_folders_and_taken_names(cfg: CfgNode, catalogs: None, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images .*empty"):
        loaded(cfg, f"none:{tmp_path / 'empty'}")
    (tmp_path / "empty.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"no images in .*empty\.json"):
        loaded(cfg, f"none_listed:{tmp_path / 'empty.json'}:{folder}")
    register_from_config(cfg)  # a second time, with the same paths
    cfg.DATASETS.IMAGES = [f"none:{folder}"]
    with pytest.raises(ValueError, match="already in use"):
        register_from_config(cfg)
    (tmp_path / "t.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"t\.tar: not an uncompressed tar"):
        loaded(cfg, f"broken:{tmp_path / 't.tar'}")
