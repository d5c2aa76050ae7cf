"""tools/mine_masks.py and tools/predict.py on a Ray cluster: results as on this machine alone."""

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mine_masks
import pytest
from PIL import Image
from pycocotools.coco import COCO

from clipdense.data.shapes.make import annotation_file
from clipdense.run import bulk, cli, mining
from clipdense.run.boundary import tool_errors
from tests.helpers.failing_workers import build_killed_worker, fail_to_build

from detectron2.data import DatasetCatalog

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_shapes", "cluster")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of two CPUs: one for a model, one for reading and writing."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # by default workers wait
    import ray

    ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def shapes(small_shapes: None, small_shapes_root: Path, tmp_path_factory: pytest.TempPathFactory):
    """Captions, images and masks of four scenes."""
    DatasetCatalog.get("shapes_closed_train")  # draws them
    truth = annotation_file(small_shapes_root, "instances", "closed_train")
    captions = annotation_file(small_shapes_root, "captions", "train")
    proposals = masks(truth, tmp_path_factory.mktemp("masks") / "proposals.json")
    return captions, small_shapes_root / "train", proposals


def mine(output: Path, captions: Path, images: Path, proposals: Path, *more: str) -> int:
    command = ["--config-file", str(ROOT / "configs/shapes/ovseg.yaml"), "--data", str(captions)]
    command += ["--image-root", str(images), "--proposals", str(proposals), "--captions", "5"]
    return mine_masks.main([*command, "--output", str(output), "--part-size", "1", *more])


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".run.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def masks(annotations: Path, output: Path) -> Path:
    """Write the annotated masks as a file of proposals."""
    truth = COCO(str(annotations))
    rows = [
        {"image_id": a["image_id"], "segmentation": truth.annToRLE(a)}
        for a in truth.loadAnns(truth.getAnnIds(iscrowd=False))
    ]
    for row in rows:
        counts = row["segmentation"]["counts"]
        row["segmentation"]["counts"] = counts.decode() if isinstance(counts, bytes) else counts
    output.write_text(json.dumps(rows))
    return output


def test_mining_survives_a_killed_actor_and_a_damaged_image(shapes, tmp_path, monkeypatch, capsys):
    captions, images, proposals = shapes
    images = shutil.copytree(images, tmp_path / "images")
    bad = sorted(images.iterdir())[1]
    bad.write_bytes(bad.read_bytes()[:100])
    assert mine(tmp_path / "local", captions, images, proposals) == 1

    log = tmp_path / "log"
    log.mkdir()
    killed = partial(build_killed_worker, mining.build_worker, log)
    monkeypatch.setattr(mining, "build_worker", killed)
    assert mine(tmp_path / "ray", captions, images, proposals, "--ray", "auto", "--actors", "1") == 1
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert str(bad) in (tmp_path / "ray/errors.jsonl").read_text()
    # four parts, one of them begun twice
    assert sorted(path.suffix for path in log.iterdir()) == [".0", ".0", ".0", ".0", ".1"]

    # A second call continues: nothing but the missing part is computed.
    (tmp_path / "ray/parts/00002.json").unlink()
    assert mine(tmp_path / "ray", captions, images, proposals, "--ray", "auto") == 1
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert len(list(log.iterdir())) == 6
    assert "failed: 1 of 4 images" in capsys.readouterr().err


def test_mining_the_sample_of_photographs(data_dir, tmp_path):
    coco = data_dir / "coco"
    arguments = coco / "annotations/captions_val2017.json", coco / "val2017"
    proposals = masks(coco / "annotations/instances_val2017.json", tmp_path / "proposals.json")
    for output, options in (("local", ()), ("ray", ("--ray", "auto"))):
        assert mine(tmp_path / output, *arguments, proposals, "--images", "8", *options) == 0
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert json.loads((tmp_path / "ray/stats.json").read_text())["pairs"] > 20


def test_prediction_survives_a_killed_actor_and_a_damaged_image(tmp_path, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    scenes = sorted((ROOT / "projects/ShapesWorld/scenes").glob("*.jpg"))
    for i, path in enumerate([*scenes[:3], scenes[0]]):
        with Image.open(path) as image:
            image.resize((128, 96)).save(images / f"{i}.png")
    bad = images / "1.png"
    bad.write_bytes(bad.read_bytes()[:200])

    def predict(output: str, *more: str) -> int:
        command = ["predict", str(images), "--words", "red heart, blue star", "--part-size", "1"]
        command += ["--save", "coco,parquet,labels,panoptic", "--output", str(tmp_path / output)]
        with pytest.raises(SystemExit) as end:
            cli.main([*command, *more])
        return int(end.value.code or 0)

    assert predict("local") == 1
    log = tmp_path / "log"
    log.mkdir()
    monkeypatch.setattr(bulk, "build_worker", partial(build_killed_worker, bulk.build_worker, log))
    assert predict("ray", "--ray", "auto", "--actors", "1") == 1
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert len(files(tmp_path / "ray")) == 4 + 3 + 3 + 7  # parts, label maps, panoptic maps, and single files
    assert sorted(path.suffix for path in log.iterdir()) == [".0", ".0", ".0", ".0", ".1"]
    assert str(bad) in (tmp_path / "ray/errors.jsonl").read_text()


def test_an_error_of_a_worker_ends_the_run_with_its_text(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mining, "build_worker", fail_to_build)
    with pytest.raises(SystemExit, match="1"), tool_errors():
        mine(tmp_path / "ray", *shapes, "--ray", "auto")
    error = capsys.readouterr().err
    assert "error: set MODEL.CLIP.PRETRAINED" in error and "Traceback" not in error
