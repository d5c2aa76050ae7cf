"""clipdense predict on the scenes that ship: files of all formats, interruptions, damaged images, sources."""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from pycocotools.coco import COCO

from clipdense.data.image import read_labels
from clipdense.engine.parts import FailureList
from clipdense.run.bulk import _PredictionWorker, find_items
from clipdense.run.cli import main
from clipdense.run.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]
SCENES = ROOT / "projects/ShapesWorld/scenes"
WORDS = "red heart, blue star, pink circle"
OPTIONS = ("--words", WORDS, "--save", "coco,parquet,labels,panoptic,csv,yolo", "--part-size", "1")


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["predict", *map(str, words)])
    return int(end.value.code or 0)


def files(folder: Path) -> dict[str, bytes]:
    paths = [
        path for path in folder.rglob("*") if path.is_file() and path.name not in (".run.lock", "run.json")
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small scenes, of two sizes; the last is the first turned."""
    folder, scenes = tmp_path_factory.mktemp("images"), sorted(SCENES.glob("*.jpg"))
    for i, path in enumerate([*scenes[:3], scenes[0]]):
        with Image.open(path) as image:
            image.rotate(180 if i == 3 else 0).resize((128, 96 + 32 * (i % 2))).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(images, *OPTIONS, "-o", folder) == 0
    return folder


def test_files(images: Path, whole: Path, tmp_path: Path) -> None:
    """They say the same as those of ``clipdense segment``."""
    with pytest.raises(SystemExit, match="0"):
        main(["segment", str(images), *OPTIONS[:4], "-o", str(tmp_path)])
    assert (tmp_path / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    for name in (
        "labels/0.png",
        "panoptic/3.png",
        "panoptic.json",
        "yolo/1.txt",
        "summary.csv",
        "classes.csv",
    ):
        assert filecmp.cmp(tmp_path / name, whole / name, shallow=False), name
    assert not (whole / "errors.jsonl").exists()

    content = json.loads((whole / "results.json").read_text())
    assert COCO(str(whole / "results.json")).getImgIds() == [0, 1, 2, 3] and len(content["segments"]) >= 4
    rows = pyarrow.parquet.read_table(whole / "masks.parquet").to_pylist()
    assert len(rows) == len(content["segments"])
    for row, segment in zip(rows, content["segments"], strict=True):
        mask = mask_util.decode({"size": [row["height"], row["width"]], "counts": row["counts"]})
        labels = read_labels(whole / f"labels/{Path(row['file_name']).stem}.png")
        assert np.array_equal(mask, labels == row["category_id"]) and mask.sum() == row["area"]
        assert (row["category"], row["bbox"], row["score"]) == (segment["category"], segment["bbox"], None)


def test_a_killed_run_continues_and_a_damaged_image_is_listed(
    images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for path in images.iterdir():
        shutil.copy(path, tmp_path / "in")
    (tmp_path / "in/1.png").write_bytes((images / "1.png").read_bytes()[:200])
    command = [tmp_path / "in", *OPTIONS, "-o", tmp_path / "out"]
    if (child := os.fork()) == 0:  # dies as by kill -9 in the middle of the fourth part
        try:
            call, calls = _PredictionWorker.__call__, iter(range(9))

            def call_or_die(*args):
                if next(calls) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)

            _PredictionWorker.__call__ = call_or_die
            run(*command)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    done = sorted((tmp_path / "out/parts").iterdir())
    assert [path.name for path in done] == ["00000.json", "00001.json", "00002.json"]
    assert not (tmp_path / "out/results.json").exists()
    before = [path.stat().st_mtime_ns for path in done]
    assert run(*command) == 1
    assert [path.stat().st_mtime_ns for path in done] == before
    (error,) = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert error["file_name"] == str(tmp_path / "in/1.png") and "damaged or truncated" in error["reason"]
    assert json.loads((tmp_path / "out/results.json").read_text())["failed"] == [error]
    assert "failed: 1 of 4 images" in capsys.readouterr().err

    shutil.copy(images / "1.png", tmp_path / "in")
    assert run(*command, "--retry-failed", "--jobs", "2") == 0
    expected = {
        name: data.replace(str(images).encode(), str(tmp_path / "in").encode())
        for name, data in files(whole).items()
        if not name.endswith(".parquet")
    }
    found = {name: data for name, data in files(tmp_path / "out").items() if not name.endswith(".parquet")}
    assert found == expected


def test_lists_and_shards(images: Path, whole: Path, tmp_path: Path) -> None:
    entries = [{"id": 10 * i + 7, "file_name": f"{i}.png"} for i in range(4)]
    (tmp_path / "list.json").write_text(json.dumps({"images": entries}))
    items = find_items([str(tmp_path / "list.json")], str(images))
    assert [item["image_id"] for item in items] == [7, 17, 27, 37]
    assert [item["file_name"] for item in items] == [str(images / f"{i}.png") for i in range(4)]
    (tmp_path / "list.txt").write_text("0.png\n3.png\n")
    (tmp_path / "list.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": "3.png", "image_id": "x"}\n')
    for name in ("list.txt", "list.jsonl"):
        items = find_items([str(tmp_path / name)], str(images))
        assert [item["file_name"] for item in items] == [str(images / "0.png"), str(images / "3.png")]
    assert [item["image_id"] for item in items] == ["0", "x"]
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as file:
            for i in (2 * shard, 2 * shard + 1):
                file.add(images / f"{i}.png", f"{i}.png")
    shards = str(tmp_path / "{0..1}.tar")
    assert [item["stem"] for item in find_items([shards, str(images)])] == [
        *"0123",
        *(f"{i}_2" for i in range(4)),
    ]
    assert run(shards, *OPTIONS, "-o", tmp_path / "out") == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out/labels").iterdir()} == {
        p.name: p.read_bytes() for p in (whole / "labels").iterdir()
    }
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        find_items([str(tmp_path / "none")])


def test_one_bad_image_never_ends_a_run_and_a_broken_model_or_disk_does(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Predictor._predict

    def predict(self, samples):
        if any(int(sample["image"][0, 0, 0]) == 255 for sample in samples):
            raise RuntimeError("kernel size greater than input")
        return call(self, samples)

    monkeypatch.setattr(Predictor, "_predict", predict)
    (tmp_path / "in").mkdir()
    Image.new("RGB", (128, 96), "white").save(tmp_path / "in/white.png")
    shutil.copy(images / "0.png", tmp_path / "in")
    assert run(tmp_path / "in", "--words", WORDS, "--batch-size", "2", "-o", tmp_path / "out") == 1
    (error,) = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert error["reason"] == "RuntimeError: kernel size greater than input"
    assert len(json.loads((tmp_path / "out/results.json").read_text())["images"]) == 1

    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("clipdense.run.bulk.ImageFiles.write", fail)
    assert run(images, *OPTIONS, "-o", tmp_path / "disk") == 1
    assert "cannot write" in capsys.readouterr().err and not list((tmp_path / "disk").glob("parts/*"))

    failures = FailureList()
    with pytest.raises(RuntimeError, match="broken"):
        for _ in range(8):
            with failures.of({"file_name": "a"}):
                raise RuntimeError("broken")
    assert len(failures.entries) == 7


def test_what_is_wrong_is_said(
    images: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def error(*words: object) -> str:
        assert run(*words) == 1
        return capsys.readouterr().err

    before = (whole / "results.json").read_bytes()
    assert "words was red heart, blue star, pink circle, is red heart" in error(
        images, *OPTIONS, "-o", whole, "--words", "red heart"
    )
    assert (whole / "results.json").read_bytes() == before
    assert "no words" in error(images, "-o", tmp_path)
    assert "unknown format pictures" in error(images, *OPTIONS[:2], "--save", "pictures", "-o", tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["segment", str(images / "0.png"), *OPTIONS[:2], "-o", str(tmp_path / "other")])
    assert "holds the results of another command" in error(images, *OPTIONS, "-o", tmp_path / "other")
    monkeypatch.setattr(Predictor, "__init__", lambda *_, **__: pytest.fail("the model is being built"))
    assert "ray start --head" in error(images, *OPTIONS, "-o", tmp_path, "--ray", "127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs the package pyarrow" in error(images, *OPTIONS, "-o", tmp_path)
    assert not list(tmp_path.glob("run.json"))


def test_the_tool_is_the_command() -> None:
    command = [sys.executable, str(ROOT / "tools/predict.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and "--retry-failed" in done.stdout, done.stderr
