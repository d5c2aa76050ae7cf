"""tools/demo.py: pictures, results.json, images that cannot be read, names that collide."""

import importlib.util
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import clipdense
from clipdense.clip import load_clip
from clipdense.clip.tables import save_table
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.build import build_model
from clipdense.run import prediction
from clipdense.run.predictor import Predictor
from clipdense.run.setup import load_config
from clipdense.run.videos import VideoWriter
from tests.helpers.bright_box import BOX, CLASSES, dataset, scene, write_model
from tests.helpers.cameras import use_camera

from detectron2.data import MetadataCatalog

TOOL = Path(__file__).resolve().parents[2] / "tools" / "demo.py"
BLUE, RED, DIM = (0, 0, 220), (220, 0, 0), (0, 0, 140)


@pytest.fixture(scope="module")
def demo() -> Any:
    spec = importlib.util.spec_from_file_location("demo_tool", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def name() -> Iterator[str]:
    with dataset(classes=CLASSES) as name:
        yield name


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two images and what is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    save(folder / "one.png", BLUE)
    save(folder / "two.jpg", RED)
    (folder / "notes.txt").write_text("no image")
    (folder / "._one.png").write_text("a Mac's leftover")
    (folder / "more").mkdir()
    return folder


Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(demo: Any, name: str, tmp_path: Path) -> Run:
    """``run(image, ..., options=(), architecture=...)`` -> exit status and what results.json holds."""

    def run(*images: Path | str, options: tuple[str, ...] = (), architecture: str = "BrightBox") -> Any:
        config = write_model(tmp_path, name, architecture)
        words = ["--config-file", config, "--output", tmp_path / "out", *options, "--input", *images]
        code = demo.main([str(word) for word in words])
        return code, json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def save(path: Path, color: tuple[int, int, int], **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(scene(color)).save(path, **options)
    return path


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.jpg"))}


def test_a_picture_and_rows_of_each_image(run: Run, photos: Path, tmp_path: Path, capsys: Any) -> None:
    code, results = run(photos)
    assert code == 0
    drawn = pictures(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("[!.]*")} == {"one.jpg", "two.jpg", "results.json"}
    # below the image stands what is in it
    assert all(p.shape[1] == 512 and 384 < p.shape[0] < 420 for p in drawn.values())
    assert all(p[388:].min() < 60 and p[388:].mean() > 200 for p in drawn.values())
    # an outline in the class's colour is all the green there is at the box's upper edge
    assert all(picture[55:75, 200:300, 1].max() > 60 for picture in drawn.values())
    out = capsys.readouterr()
    assert f"{photos / 'one.png'}: 1 blue box -> {tmp_path / 'out' / 'one.jpg'}\n" in out.out
    assert "2 images, 2 detections, 1 other files skipped" in out.out
    assert f"seconds: {tmp_path / 'out'}\n" in out.out

    assert [image["file_name"] for image in results["images"]] == [
        str(photos / n) for n in ("one.png", "two.jpg")
    ]
    assert (
        results["images"][0] | {"id": 0, "height": 60, "width": 80, "picture": "one.jpg"}
        == results["images"][0]
    )
    assert [c["name"] for c in results["categories"]] == CLASSES and results["failed"] == []
    assert [row["category"] for row in results["annotations"]] == ["blue box", "red box"]
    for row in results["annotations"]:
        x0, y0, x1, y1 = BOX
        assert row["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1) and 0.7 < row["score"] < 0.9
        assert CLASSES[row["category_id"]] == row["category"]


def test_results_are_read_by_pycocotools(run: Run, photos: Path, tmp_path: Path) -> None:
    run(photos)
    coco = COCO(tmp_path / "out" / "results.json")
    assert coco.getImgIds() == [0, 1] and coco.getCatIds(catNms=["blue box"]) == [2]
    (row,) = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    mask = coco.annToMask(row)
    expected = scene(RED).any(-1)
    assert mask.shape == (60, 80) and (mask != expected).sum() < 120


def test_turned_images_are_upright(run: Run, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    stored = Image.fromarray(scene()).transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "turned.png", exif=exif)
    _, results = run(tmp_path / "turned.png")
    assert (results["images"][0]["height"], results["images"][0]["width"]) == (60, 80)
    assert results["annotations"][0]["bbox"] == pytest.approx([20, 10, 30, 20], abs=1)
    assert pictures(tmp_path / "out")["turned.jpg"].shape[1] == 512


def test_bad_images_are_listed_and_the_others_done(
    run: Run, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    (photos / "damaged.jpg").write_bytes((photos / "two.jpg").read_bytes()[:300])
    (tmp_path / "empty").mkdir()
    inputs = [photos, photos / "notes.txt", "none/*.jpg", tmp_path / "empty", tmp_path / "nothing.png"]
    code, results = run(*inputs)
    assert code == 1 and [i["picture"] for i in results["images"]] == ["one.jpg", "two.jpg"]
    reasons = {row["file_name"]: row["reason"] for row in results["failed"]}
    assert len(reasons) == 5
    assert "the file is damaged" in reasons[str(photos / "damaged.jpg")]
    assert "not an image" in reasons[str(photos / "notes.txt")]
    assert reasons[str(tmp_path / "empty")] == "a folder without images"
    assert reasons["none/*.jpg"] == reasons[str(tmp_path / "nothing.png")] == "there is no such file"
    lines = capsys.readouterr().err.splitlines()
    failed = [line for line in lines if line.startswith("failed: ")]
    assert len(failed) == 5 and all(sum(name in line for line in failed) == 1 for name in reasons)


def test_globs_and_repetitions(run: Run, photos: Path, tmp_path: Path) -> None:
    save(photos / "more" / "three.webp", BLUE)
    save(tmp_path / "a[1].png", RED)
    _, results = run(photos / "**" / "*.*p*g", photos / "one.png", tmp_path / "a[1].png", photos / "m*")
    assert [Path(i["file_name"]).name for i in results["images"]] == ["one.png", "two.jpg", "a[1].png"]
    assert [row["file_name"] for row in results["failed"]] == [str(photos / "m*")]  # a folder is no match


def test_every_image_has_its_own_picture(run: Run, tmp_path: Path) -> None:
    inputs = [save(tmp_path / "x" / "a.png", BLUE), save(tmp_path / "x" / "a.bmp", RED)]
    inputs += [save(tmp_path / "y" / "A.png", BLUE), save(tmp_path / "y" / "a_2.png", RED)]
    # an input in the output folder, with the name that its own picture would have
    inputs += [save(tmp_path / "out" / "b.jpg", BLUE)]
    before = inputs[-1].read_bytes()
    _, results = run(*inputs)
    names = [image["picture"] for image in results["images"]]
    assert names == ["a.jpg", "a_2.jpg", "A_3.jpg", "a_2_2.jpg", "b_2.jpg"]
    assert all((tmp_path / "out" / name).is_file() for name in names)
    assert inputs[-1].read_bytes() == before


def test_threshold(run: Run, tmp_path: Path) -> None:
    path = save(tmp_path / "dim.png", DIM)
    assert len(run(path)[1]["annotations"]) == 1
    drawn = pictures(tmp_path / "out")["dim.jpg"].astype(int)
    assert run(path, options=("--score-threshold", "0.6"))[1]["annotations"] == []
    assert np.abs(pictures(tmp_path / "out")["dim.jpg"][:384] - drawn[:384]).max() > 60


def test_any_words(run: Run, photos: Path, tmp_path: Path) -> None:
    """Names, ids and colours are the vocabulary's."""
    options = ("--vocabulary", "cat, red car|red auto, dog")
    _, results = run(photos, options=options, architecture="OpenBrightBox")
    assert [c["name"] for c in results["categories"]] == ["cat", "red car", "dog"]
    (row,) = results["annotations"]
    assert (row["category"], row["category_id"], row["image_id"]) == ("red car", 1, 1)
    drawn = pictures(tmp_path / "out")["two.jpg"].astype(int)
    words = tmp_path / "words.json"
    words.write_text(
        json.dumps({"categories": [{"id": 7, "name": "red car"}, {"id": 9, "name": "blue one"}]})
    )
    _, results = run(photos, options=("--vocabulary", str(words)), architecture="OpenBrightBox")
    assert [row["category"] for row in results["annotations"]] == ["blue one", "red car"]
    # a class has the colour of its place in the list
    assert np.abs(pictures(tmp_path / "out")["two.jpg"] - drawn)[60:70, 200:300].mean() > 5
    above = ("--score-threshold", "0.99", "--vocabulary", "blue, red")
    assert run(photos, options=above, architecture="OpenBrightBox")[1]["annotations"] == []


@pytest.fixture(scope="module")
def fvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an F-VLM that has learnt nothing."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fvlm") / "model.pth"
    model = build_model(load_config("configs/shapes/fvlm_rn.yaml", ["MODEL.DEVICE", "cpu"]))
    torch.save({"model": model.state_dict()}, path)
    return path


def test_a_table_in_place_of_the_text_tower(demo: Any, fvlm: Path, photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.safetensors"
    bank = TextBank(load_clip("shapes-rn"), cache_dir=None)
    trained = MetadataCatalog.get("shapes_ov_mini_train").thing_classes
    save_table(table, bank, Vocabulary.from_names([*trained, "cat", "background"]))

    def run(words: str, *opts: str) -> list[dict[str, Any]]:
        options = ["--config-file", "configs/shapes/fvlm_rn.yaml", "--output", str(tmp_path / "out")]
        options += ["--input", str(photos / "one.png"), "--vocabulary", words, "--score-threshold", "0.01"]
        demo.main([*options, "--opts", "MODEL.WEIGHTS", str(fvlm), "MODEL.DEVICE", "cpu", *opts])
        return json.loads((tmp_path / "out" / "results.json").read_text())["annotations"]

    rows = run("cat, blue square", "MODEL.FVLM.TEXT_SOURCE", "table", "MODEL.FVLM.TEXT_TABLE", str(table))
    assert rows and {row["category"] for row in rows} <= {"cat", "blue square"}
    tower = run("cat, blue square")
    assert [row["category"] for row in rows] == [row["category"] for row in tower]
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in tower], abs=1e-5)
    message = r"table.safetensors' has no row for 'red cat' \(near: .*tools/make_text_table.py writes"
    with pytest.raises(ValueError, match=message):
        run("red cat, cat", "MODEL.FVLM.TEXT_SOURCE", "table", "MODEL.FVLM.TEXT_TABLE", str(table))


def test_panoptic_maps_are_drawn(run: Run, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", BLUE)
    run(path)
    instances = pictures(tmp_path / "out")["a.jpg"].astype(int)
    _, results = run(path, architecture="BrightPanoptic")
    assert len(results["annotations"]) == 1
    panoptic = pictures(tmp_path / "out")["a.jpg"].astype(int)
    # the ground is coloured, too
    assert instances[300:380, 400:].max() < 40 and panoptic[300:380, 400:].mean() > 40
    ground, box = results["segments"]
    assert (ground["category"], ground["isthing"], box["category"], box["isthing"]) == (
        "red box",
        False,
        "blue box",
        True,
    )
    assert ground["area"] + box["area"] == 60 * 80 and box["bbox"] == pytest.approx([20, 10, 30, 20], abs=1)
    _, results = run(path, architecture="BrightPanoptic", options=("--show", "instances"))
    assert results["segments"] == []
    again = pictures(tmp_path / "out")["a.jpg"].astype(int)
    assert np.abs(again - instances).max() < 30
    _, results = run(path, architecture="BrightPanoptic", options=("--show", "semantic"))
    assert [s["category"] for s in results["segments"]] == ["red box", "blue box"]
    with pytest.raises(ValueError, match="has no panoptic output; available: instances"):
        run(path, options=("--show", "panoptic"))


@pytest.mark.parametrize("kind", ["semantic", "panoptic"])
def test_what_is_background_is_left_clear(run: Run, tmp_path: Path, capsys: Any, kind: str) -> None:
    path = save(tmp_path / "a.png", BLUE)
    words = ("--vocabulary", "cat, blue thing", "--background", "wall|floor, others", "--show", kind)
    _, results = run(path, options=words, architecture="OpenBrightMap")
    assert [c["name"] for c in results["categories"]] == ["cat", "blue thing"]
    (segment,) = results["segments"]
    assert segment["category"] == "blue thing" and segment["area"] == pytest.approx(600, rel=0.1)
    drawn = pictures(tmp_path / "out")["a.jpg"].astype(int)
    assert drawn[300:380, 400:].max() < 40 < drawn[100:150, 200:300].mean()
    assert "A single class wins" not in capsys.readouterr().out
    _, results = run(path, options=("--vocabulary", "blue", *words[4:]), architecture="OpenBrightMap")
    assert sum(segment["area"] for segment in results["segments"]) == 60 * 80
    assert '--background "others"' in capsys.readouterr().out


def test_the_classes_that_are_looked_for(demo: Any, name: str, tmp_path: Path, capsys: Any) -> None:
    config = str(write_model(tmp_path, name))
    assert demo.main(["--config-file", config, "--list-classes"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == CLASSES
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--config-file", config])
    assert "--input is missing" in capsys.readouterr().err


def test_masks_of_any_words(demo: Any, photos: Path, tmp_path: Path) -> None:
    """An OVSeg that has learnt nothing names every pixel; with background words, some or none."""
    torch.manual_seed(0)
    weights = tmp_path / "model.pth"
    config = "configs/shapes/ovseg.yaml"
    torch.save({"model": build_model(load_config(config, ["MODEL.DEVICE", "cpu"])).state_dict()}, weights)

    def run(*words: str) -> list[dict[str, Any]]:
        options = ["--config-file", config, "--output", str(tmp_path / "out"), *words]
        options += ["--input", str(photos / "one.png"), "--opts", "MODEL.WEIGHTS", str(weights)]
        assert demo.main([*options, "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "96"]) == 0
        return json.loads((tmp_path / "out" / "results.json").read_text())["segments"]

    segments = run("--vocabulary", "cat, red car", "--show", "semantic")
    assert sum(s["area"] for s in segments) == 60 * 80
    assert {s["category"] for s in segments} <= {"cat", "red car"}
    background = run("--vocabulary", "cat", "--background", "red car", "--show", "semantic")
    assert sum(s["area"] for s in background) == sum(s["area"] for s in segments if s["category"] == "cat")
    assert all(s["isthing"] for s in run("--vocabulary", "cat, red car", "--show", "panoptic"))


def test_large_images_make_pictures_of_a_size_to_look_at(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 20)).save(tmp_path / "wide.png")
    _, results = run(tmp_path / "wide.png")
    assert results["images"][0]["width"] == 3000 and results["annotations"] == []
    assert pictures(tmp_path / "out")["wide.jpg"].shape[:2] > (14, 2048)  # a line says that nothing was found


def test_what_is_done_is_kept_on_interruption(
    demo: Any, run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = prediction.draw_output, []

    def interrupted(*args: Any, **options: Any) -> Any:
        drawn.append(args)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(*args, **options)

    monkeypatch.setattr(prediction, "draw_output", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(photos)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [i["picture"] for i in results["images"]] == ["one.jpg"] and len(results["annotations"]) == 1


class ScoringPredictor(Predictor):
    """Scores of a class: those of its colour."""

    score_classes = tuple(CLASSES)

    def score_map(self, image: Any) -> Any:
        scores = torch.nn.functional.avg_pool2d(torch.from_numpy(image).permute(2, 0, 1).float(), 10)
        return scores.numpy(), self.score_classes


def test_score_maps(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipdense, "Predictor", ScoringPredictor)
    image = save(tmp_path / "a.png", BLUE)
    run(image, options=("--score-map", "blue box", "green/box"))
    drawn = pictures(tmp_path / "out")
    assert list(drawn) == ["a.jpg", "a_blue_box.jpg", "a_green_box.jpg"]
    blue, green = (drawn[f"a_{name}_box.jpg"].astype(int) for name in ("blue", "green"))
    blue, green = blue[-384:], green[-384:]  # below the titles
    inside, outside = (slice(90, 160), slice(160, 290)), (slice(250, 380), slice(10, 120))
    assert blue[inside][..., 0].mean() > 30 + green[inside][..., 0].mean()  # high scores are red
    assert np.abs(blue[outside] - green[outside]).mean() < 3
    with pytest.raises(ValueError, match="'blu box' is not a class of this model; similar: blue box"):
        run(image, options=("--score-map", "blu box"))


def test_score_maps_of_a_model_without(run: Run, photos: Path) -> None:
    with pytest.raises(ValueError, match="BrightBox has no score map"):
        run(photos, options=("--score-map", "blue box"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--input", "none.png"], "error: no images: none.png: there is no such file"),
        (["--input", "IMAGE", "--opts", "MODEL.WEIGHTS", ""], "error: no trained weights are named"),
        (["--input", "IMAGE", "--opts", "MODEL.WEIGHT", "x"], "error: .*Did you mean MODEL.WEIGHTS"),
        (["--input", "IMAGE", "--vocabulary", "cat"], "error: BrightBox has a closed vocabulary"),
        (["--input", "IMAGE", "--vocabulary", "cat.txt"], "error: no class-list file 'cat.txt'"),
        (["--input", "IMAGE", "--output", "/proc/out"], "error: .*/proc/out"),
    ],
)
def test_errors_are_said_in_a_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], message: str
) -> None:
    image = str(save(tmp_path / "a.png", BLUE))
    words = [image if word == "IMAGE" else word for word in words]
    output = [] if "--output" in words else ["--output", str(tmp_path / "out")]
    command = [str(TOOL), "--config-file", str(write_model(tmp_path, name)), *output, *words]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert re.search(f"^{message}", capsys.readouterr().err, re.MULTILINE)


def test_help_and_usage(demo: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        demo.main(["--help"])
    text = capsys.readouterr().out
    assert "--opts MODEL.WEIGHTS" in text and "results.json" in text and "default: output/predictions" in text
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--config-file", "a", "--input", "b", "--score-threshold", "50"])
    assert "must be in 0..1, got 50" in capsys.readouterr().err


def test_the_names_of_detectron2s_options(
    demo: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    camera, out = use_camera(monkeypatch), tmp_path / "out"
    with VideoWriter(tmp_path / "a.mp4", 5.0) as writer:
        writer.add(scene(BLUE))
    camera.interrupt_after = 2
    words = [
        "--config-file",
        write_model(tmp_path, name),
        "--output",
        out,
        "--video-input",
        tmp_path / "a.mp4",
    ]
    with pytest.raises(KeyboardInterrupt):  # which ends a camera
        demo.main([str(word) for word in [*words, "--webcam", "--confidence-threshold", "0.3"]])
    found = {file: (out / f"{file}.jsonl").read_text().splitlines() for file in ("a", "camera_0")}
    assert [len(lines) for lines in found.values()] == [1, 2]
    assert all("blue box" in line for lines in found.values() for line in lines)
