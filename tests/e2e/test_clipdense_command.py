"""The console command on the scenes that ship: pictures, results, words, examples, CLIPs from files."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP

import clipdense
from clipdense.run.cli import main
from clipdense.run.prediction import Prediction
from clipdense.run.videos import Video, VideoWriter

ROOT = Path(__file__).resolve().parents[2]
SCENES = ROOT / "projects/ShapesWorld/scenes"
WORDS = "red heart, blue star, pink circle"


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_a_first_picture_takes_less_than_half_a_minute(tmp_path: Path) -> None:
    """As a user starts it, in another folder; in processor time, as other jobs may use the machine."""
    command = [sys.executable, "-W", "error::DeprecationWarning", "-m", "clipdense", "segment"]
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(
        [*command, SCENES / "1.jpg", "--words", "red star, blue ring"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert f"{SCENES / '1.jpg'}: " in done.stdout and "-> output/predictions/1.jpg" in done.stdout
    assert (tmp_path / "output/predictions/1.jpg").is_file()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 30, (seconds, time.perf_counter() - start)


def test_segment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("segment", SCENES, "--words", WORDS, "-o", out, "--save", "pictures, coco, labels, csv") == 0
    printed = capsys.readouterr().out
    assert f"{SCENES / '1.jpg'}: red heart " in printed and "3 images" in printed
    found = results(out)
    first = {row["category"]: row["area"] for row in found["segments"] if row["image_id"] == 0}
    assert first["red heart"] > 256 * 256 / 20  # the largest thing of the scene
    assert [image["picture"] for image in found["images"]] == ["1.jpg", "2.jpg", "3.jpg"]
    assert (out / "labels/2.png").is_file() and "red heart" in (out / "summary.csv").read_text()


def test_detect_with_thresholds_and_background(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, scene = tmp_path / "out", SCENES / "1.jpg"
    assert run("detect", scene, "--words", WORDS, "-o", out) == 0
    rows = results(out)["annotations"]
    assert rows and all(row["bbox"][2] < 200 for row in rows if row["category"] == "red heart")
    strict = ("--threshold", "0.2", "--class-threshold", "red heart=1")
    assert run("detect", scene, "--words", WORDS, "-o", out, *strict) == 0
    assert {r["category"] for r in results(out)["annotations"]} <= {"blue star", "pink circle"}
    assert "earlier run are in" in capsys.readouterr().out
    # without background words, some word wins everywhere
    assert run("segment", scene, "--words", WORDS, "-o", out, "--background", "") == 0
    assert sum(row["area"] for row in results(out)["segments"]) == 256 * 256


def test_panoptic(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("panoptic", SCENES / "1.jpg", "-w", WORDS, "-o", out, "--save", "panoptic,coco") == 0
    (entry,) = json.loads((out / "panoptic.json").read_text())["annotations"]
    assert len(entry["segments_info"]) == len(results(out)["segments"]) > 1


def test_an_example_in_place_of_words(tmp_path: Path) -> None:
    """A heart that is shown in one picture is found at its place; a new name has no meaning of its own."""
    out, example = tmp_path / "out", f"xyzzy={SCENES / '1.jpg'}:70,35,150,110"
    common = ("segment", SCENES / "1.jpg", "-o", out)
    assert run(*common, "--example", example) == 0
    (segment,) = results(out)["segments"]
    x, y, width, height = segment["bbox"]
    assert segment["category"] == "xyzzy" and x < 110 < x + width and y < 70 < y + height
    assert segment["area"] < 256 * 256 / 3
    assert run(*common, "--words", "heart, blue star", "--example", example.replace("xyzzy", "heart")) == 0
    names = {row["category"] for row in results(out)["segments"]}
    assert "heart" in names


def test_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from clipdense.data.image import read_image

    with VideoWriter(tmp_path / "scenes.mp4", 5.0) as writer:
        for number in (1, 2, 3):
            writer.add(read_image(SCENES / f"{number}.jpg"))
    out = tmp_path / "out"
    assert run("segment", tmp_path / "scenes.mp4", "-w", WORDS, "-o", out, "--max-frames", "2") == 0
    lines = [json.loads(line) for line in (out / "scenes.jsonl").read_text().splitlines()]
    assert [(line["frame"], line["time"]) for line in lines] == [(0, 0), (1, 0.2)]
    assert "red heart" in {row["category"] for row in lines[0]["objects"]}
    video = Video(out / "scenes.mp4")
    assert video.rate == pytest.approx(5) and sum(1 for _ in video) == 2
    assert "2 frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png", "-w", "cat"], "error: no images: none.png: there is no such file"),
        (["http://127.0.0.1:1/a.png", "-w", "cat"], "error: no images: .*--allow-urls"),
        ([SCENES / "1.jpg"], "error: no words: name what to look for"),
        (
            [SCENES / "1.jpg", "-w", "cat", "--save", "png"],
            "error: unknown format png; known: pictures, coco",
        ),
        ([SCENES / "1.jpg", "-w", "cat", "--class-threshold", "cta=0.5"], "did you mean 'cat'"),
        ([SCENES / "1.jpg", "-w", "cat", "--set", "MODEL.DEVICE"], "error: --set takes KEY=VALUE"),
        (
            [SCENES / "1.jpg", "-w", "cat", "--model", "shapes-rm"],
            "is .shapes-rm.; expected one of shapes-rn",
        ),
    ],
)
def test_errors(
    words: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("segment", *words, "-o", tmp_path / "out") == 1
    assert re.search(message, capsys.readouterr().err)


def test_weights_that_have_to_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network, the message says which file belongs where; with that file, the command works."""
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    tag = {"openai": {"hf_hub": "timm/tiny.openai/", "quick_gelu": True}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-8", config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-8", tag)
    monkeypatch.setenv("CLIPDENSE_CACHE", str(tmp_path / "cache"))

    def fail(*args: object, **options: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("clipdense.clip.sources.download_pretrained", fail)
    command = ("segment", SCENES / "1.jpg", "-w", "red star", "--model", "Tiny-8", "--pretrained", "openai")
    command = (*command, "-o", tmp_path / "out", "--set", "MODEL.ZERO_SHOT.TEMPLATES=single")
    assert run(*command) == 1
    message = capsys.readouterr().err
    place = tmp_path / "cache/clip/Tiny-8-openai.safetensors"
    assert "Get https://huggingface.co/timm/tiny.openai/resolve/main/open_clip_model.safetensors" in message
    assert f"save it as {place}" in message and "--pretrained" in message and message.count("\n") == 1

    torch.manual_seed(0)
    state = dict(CLIP(24, vision, text).state_dict())
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    place.parent.mkdir(parents=True)
    torch.save(state | {key: torch.tensor(v) for key, v in sizes.items()}, place.with_suffix(".pt"))
    assert run(*command) == 0
    assert results(tmp_path / "out")["images"][0]["picture"] == "1.jpg"
    by_path = (*command[:6], "--pretrained", place.with_suffix(".pt"), *command[8:])
    assert run(*by_path) == 0


def test_one_line_of_python(tmp_path: Path) -> None:
    found = clipdense.segment(SCENES / "1.jpg", WORDS)
    assert isinstance(found, Prediction) and found.describe().startswith("red heart")
    folder = found.save(tmp_path / "one")
    assert (folder / "1.jpg").is_file() and (folder / "results.json").is_file()
    many = clipdense.detect([SCENES / "1.jpg", SCENES / "2.jpg"], WORDS, threshold=0.1)
    assert isinstance(many, list) and [f.kind for f in many] == ["instances"] * 2
    one = clipdense.panoptic(SCENES / "1.jpg", WORDS)
    assert isinstance(one, Prediction) and one.kind == "panoptic"
    with pytest.raises(ValueError, match="no words"):
        clipdense.segment(SCENES / "1.jpg")


def test_from_pretrained(tmp_path: Path) -> None:
    predictor = clipdense.Predictor.from_pretrained("shapes-rn", vocabulary=WORDS)
    found = predictor.predict(SCENES / "1.jpg")
    assert isinstance(found, Prediction) and "red heart" in found.describe()
    predictor.set_vocabulary("heart|red heart, star")
    again = predictor.predict(SCENES / "1.jpg")
    assert isinstance(again, Prediction) and again.names == ["heart", "star"]
    named = clipdense.Predictor.from_pretrained("shapes/zero_shot_maskclip_rn.yaml", vocabulary=WORDS)
    assert named.predict(SCENES / "1.jpg").names == WORDS.split(", ")  # type: ignore[union-attr]
    with pytest.raises(FileNotFoundError, match="there is no model 'nothing of the kind': give the folder"):
        clipdense.Predictor.from_pretrained("nothing of the kind")
    with pytest.raises(FileNotFoundError, match="has no config.yaml"):
        clipdense.Predictor.from_pretrained(tmp_path)


def test_a_trained_model_by_its_folder(tmp_path: Path) -> None:
    from tests.helpers.bright_box import CLASSES, dataset, scene, write_model

    with dataset(classes=CLASSES) as name:
        folder = tmp_path / "run"
        folder.mkdir()
        write_model(folder, name).rename(folder / "config.yaml")
        (folder / "model.pth").rename(folder / "model_final.pth")
        predictor = clipdense.Predictor.from_pretrained(folder)
        found = predictor.predict(scene())
        assert isinstance(found, Prediction) and found.describe() == "1 blue box"
        shown = clipdense.detect(scene(), config=str(folder), threshold=0.99)
        assert isinstance(shown, Prediction) and shown.describe() == "nothing found"
