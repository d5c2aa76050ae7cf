"""Predictions: sources of any kind, conversion to other formats, folders of outputs."""

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.data.image import read_labels
from clipdense.run.outputs import OutputFolder
from clipdense.run.prediction import Prediction, complete_output
from clipdense.run.predictor import Predictor
from clipdense.run.videos import Video, VideoWriter
from tests.helpers.bright_box import BOX, CLASSES, dataset, scene, write_model

from detectron2.data.catalog import Metadata

BLUE, RED = (0, 0, 220), (220, 0, 0)
METADATA = Metadata(thing_classes=["a", "b", "c"], stuff_classes=["a", "b", "c"])


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with dataset(classes=CLASSES) as name:
        yield Predictor(write_model(tmp_path_factory.mktemp("model"), name))


def _maps() -> Prediction:
    """Class 2 in two areas, class 0 in one, the rest nothing."""
    scores = torch.zeros(3, 60, 80)
    scores[2, 5:15, 5:25], scores[2, 40:55, 50:70], scores[0, 30:35, 0:40] = 0.75, 0.5, 1.0
    return Prediction(scene(), {"sem_seg": scores}, METADATA, source="x/photo.png")


def _save(path: Path, color: tuple[int, int, int] = BLUE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(color)).save(path)
    return path


def test_sources(predictor: Predictor, tmp_path: Path) -> None:
    path = _save(tmp_path / "photos" / "more" / "one.png")
    pixels = scene()
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = predictor.predict(path)
    assert isinstance(expected, Prediction) and expected.source == str(path)
    assert expected.describe() == "1 blue box" and expected.kind == "instances"
    for source in (str(path), pixels, Image.fromarray(pixels), tensor, tensor.float() / 255):
        found = predictor.predict(source)
        assert isinstance(found, Prediction)
        assert np.allclose(found.objects.boxes, expected.objects.boxes, atol=1e-3)
    for many in (
        [pixels, path],
        (pixels,),
        torch.stack([tensor] * 2),
        tmp_path / "photos",
        f"{path.parent}/*.png",
    ):
        found = predictor.predict(many, batch_size=2)
        assert isinstance(found, list) and all(f.describe() == "1 blue box" for f in found)
    assert len(predictor.predict(torch.stack([tensor] * 2))) == 2  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3, H, W\) or \(B, 3, H, W\)"):
        predictor.predict(torch.zeros(4, 4))
    with pytest.raises(FileNotFoundError, match="a folder without images"):
        (tmp_path / "empty").mkdir()
        predictor.predict(tmp_path / "empty")


def test_videos(predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 12.0) as writer:
        for color in (BLUE, RED, BLUE):
            writer.add(cv2.resize(scene(color), (160, 120), interpolation=cv2.INTER_NEAREST))
    video = Video(path)
    assert video.rate == pytest.approx(12) and video.num_frames == 3
    found = predictor.predict(path)
    assert not isinstance(found, list | Prediction)  # one frame at a time
    frames = list(found)
    assert [f.frame for f in frames] == [0, 1, 2]
    assert [f.describe() for f in frames] == ["1 blue box", "1 red box", "1 blue box"]
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(OSError, match="not a video that OpenCV reads"):
        predictor.predict(tmp_path / "b.mp4")
    with pytest.raises(FileNotFoundError, match="there is no video"):
        predictor.predict("none.mp4")


def test_tiles(predictor: Predictor) -> None:
    """Boxes of tiles come back in pixels of the image, each object once."""
    image = np.zeros((120, 400, 3), np.uint8)
    image[40:80, 60:90], image[20:60, 330:360] = BLUE, RED
    found = predictor.predict(image, tile=160)
    assert isinstance(found, Prediction)
    order = found.objects.boxes[:, 0].argsort()
    expected = np.array([[60, 40, 90, 80], [330, 20, 360, 60]])
    assert found.objects.boxes[order] == pytest.approx(expected, abs=2)
    assert [CLASSES[c] for c in found.objects.classes[order]] == ["blue box", "red box"]
    assert found.objects.masks is not None and found.objects.masks[order[0], 45:75, 65:85].all()


def test_tiles_of_maps() -> None:
    """Where tiles overlap, scores are averaged."""
    from clipdense.run.tiles import predict_tiles

    calls = []

    def predict(tile: np.ndarray) -> dict[str, Any]:
        calls.append(tile.shape[:2])
        level = torch.from_numpy(tile[..., 0].astype(np.float32)) / 255
        return {"sem_seg": torch.stack([level, 1 - level])}

    image = np.random.default_rng(0).integers(0, 255, (70, 130, 3), dtype=np.uint8)
    merged = predict_tiles(predict, image, 64)
    assert merged["sem_seg"].shape == (2, 70, 130) and set(calls) == {(64, 64)} and len(calls) > 3
    assert torch.allclose(merged["sem_seg"][0], torch.from_numpy(image[..., 0]) / 255.0)
    red = torch.from_numpy(image[..., 0].astype(np.int64))
    labels = predict_tiles(
        lambda t: {"sem_seg_labels": torch.from_numpy(t[..., 0].astype(np.int64))}, image, 64
    )
    assert torch.equal(labels["sem_seg_labels"], red)
    with pytest.raises(ValueError, match="cannot be merged across tiles"):
        predict_tiles(lambda t: {"panoptic_seg": (None, [])}, image, 64)


def test_instances_of_a_label_map() -> None:
    maps = _maps()
    assert maps.kind == "semantic" and maps.describe() == "c 10%, a 4%"
    output = complete_output(maps.output, "instances", METADATA)
    found = Prediction(maps.image, output, METADATA, "instances")
    assert found.describe() == "2 c, 1 a"
    assert found.objects.boxes.tolist() == [[0, 30, 40, 35], [5, 5, 25, 15], [50, 40, 70, 55]]
    assert found.objects.scores.tolist() == [1.0, 0.75, 0.5]
    assert np.array_equal(found.labels, maps.labels)
    output_of_both = complete_output(maps.output, "panoptic", METADATA)
    panoptic = Prediction(maps.image, output_of_both, METADATA, "panoptic")
    assert sorted(s["category"] for s in panoptic.segments()) == ["a", "c", "c"]
    assert complete_output(output, "instances", METADATA) is output
    assert len(complete_output({"sem_seg": torch.zeros(3, 4, 4)}, "instances", METADATA)["instances"]) == 0


def test_coco(predictor: Predictor, tmp_path: Path) -> None:
    found = predictor.predict(_save(tmp_path / "one.png"))
    assert isinstance(found, Prediction)
    content = found.to_coco()
    (row,) = content["annotations"]
    x0, y0, x1, y1 = BOX
    assert row["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1) and row["category"] == "blue box"
    assert content["images"][0] == {"id": 0, "file_name": found.source, "height": 60, "width": 80}
    assert [r["category_id"] for r in _maps().to_coco()["annotations"]] == [2, 0]


def test_supervision(predictor: Predictor) -> None:
    supervision = pytest.importorskip("supervision", reason="clipdense[supervision] is not installed")
    found = predictor.predict(scene())
    assert isinstance(found, Prediction)
    detections = found.to_supervision()
    assert isinstance(detections, supervision.Detections) and len(detections) == 1
    assert detections.data["class_name"].tolist() == ["blue box"] and detections.class_id.tolist() == [2]
    assert detections.xyxy[0] == pytest.approx(BOX, abs=1) and 0.7 < detections.confidence[0] < 0.9
    assert detections.mask.shape == (1, 60, 80)
    supervision.BoxAnnotator().annotate(scene().copy(), detections)
    assert len(_maps().to_supervision()) == 2
    nothing = predictor.predict(np.zeros((40, 40, 3), np.uint8))
    assert isinstance(nothing, Prediction) and len(nothing.to_supervision()) == 0


def test_fiftyone(predictor: Predictor) -> None:
    fiftyone = pytest.importorskip(
        "fiftyone",
        reason="fiftyone needs other versions than requirements/lock.txt: make test-fiftyone",
    )
    found = predictor.predict(scene())
    assert isinstance(found, Prediction)
    (row,) = found.to_fiftyone().detections
    assert row.label == "blue box"
    assert row.bounding_box == pytest.approx([0.25, 1 / 6, 0.375, 1 / 3], abs=0.02)
    sample = fiftyone.Sample(filepath="x.png", prediction=found.to_fiftyone())
    assert sample.prediction.detections[0].mask.all()
    stored = fiftyone.Sample.from_dict(sample.to_dict())  # as a database keeps it
    assert stored.prediction.detections[0].label == "blue box"
    assert stored.prediction.detections[0].mask.shape == row.mask.shape
    boxes = row.to_polyline().points[0]  # the outline of the mask, in shares of the image
    assert min(x for x, _ in boxes) == pytest.approx(0.25, abs=0.03)
    mask = _maps().to_fiftyone().mask
    assert mask.max() == 3 and mask[10, 10] == 3 and mask[59, 0] == 0


def test_pictures(predictor: Predictor) -> None:
    found = predictor.predict(scene())
    assert isinstance(found, Prediction)
    assert found._repr_png_().startswith(b"\x89PNG") and found.plot().shape[1] == 512
    nothing = Prediction(np.full((64, 128, 3), 90, np.uint8), {"sem_seg": torch.zeros(3, 64, 128)}, METADATA)
    assert nothing.describe() == "nothing found"
    assert len(nothing.plot()) > len(nothing.plot(legend=False))  # a line says so


def test_every_format(tmp_path: Path) -> None:
    from clipdense.run.outputs import FORMATS

    prediction = _maps()
    with OutputFolder(tmp_path, METADATA, FORMATS) as outputs:
        picture = outputs.add(prediction)
    assert picture == tmp_path / "photo.jpg" and picture.is_file()
    labels = read_labels(tmp_path / "labels/photo.png")
    assert np.array_equal(np.where(labels == 255, -1, labels), prediction.labels)
    assert Image.open(tmp_path / "labels/photo.png").mode == "P"
    rows = list(csv.reader((tmp_path / "classes.csv").open()))
    assert rows[0] == ["value", "name", "color"] and [row[1] for row in rows[1:]] == ["a", "b", "c"]
    assert (tmp_path / "legend.png").is_file()

    panoptic = json.loads((tmp_path / "panoptic.json").read_text())
    ids = read_labels(tmp_path / "panoptic/photo.png")
    (entry,) = panoptic["annotations"]
    for segment in entry["segments_info"]:
        assert (ids == segment["id"]).sum() == segment["area"]
        assert np.array_equal(ids == segment["id"], prediction.labels == segment["category_id"])

    lines = (tmp_path / "yolo/photo.txt").read_text().splitlines()
    first = [float(word) for word in lines[0].split()]
    assert first[0] == 2 and len(first) % 2 == 1 and len(first) >= 7 and max(first[1:]) <= 1
    assert (tmp_path / "classes.txt").read_text() == "a\nb\nc\n"
    table = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert {row["class"]: row["share"] for row in table} == {"a": "0.0417", "c": "0.1042"}

    with OutputFolder(tmp_path / "boxes", METADATA, ["yolo"]) as outputs:
        outputs.add(prediction)
    box = [float(word) for word in (tmp_path / "boxes/yolo/photo.txt").read_text().splitlines()[1].split()]
    assert box == pytest.approx([0, 20 / 80, 32.5 / 60, 40 / 80, 5 / 60], abs=1e-5)
    assert not (tmp_path / "boxes/photo.jpg").exists() and not (tmp_path / "boxes/results.json").exists()


def test_label_maps_of_many_classes_have_16_bits(tmp_path: Path) -> None:
    metadata = Metadata(stuff_classes=[str(i) for i in range(300)])
    labels = torch.full((20, 30), -1)
    labels[5:, 7:] = 299
    with OutputFolder(tmp_path, metadata, ["labels"]) as outputs:
        outputs.add(Prediction(np.zeros((20, 30, 3), np.uint8), {"sem_seg_labels": labels}, metadata))
    stored = read_labels(tmp_path / "labels/image.png")
    assert stored[0, 0] == 65535 and stored[10, 10] == 299


def test_a_second_run_does_not_mix_with_the_first(tmp_path: Path) -> None:
    (tmp_path / "own.jpg").write_text("a user's file")
    for number in range(3):
        with OutputFolder(tmp_path, METADATA, ["coco", "labels"]) as outputs:
            prediction = _maps()
            prediction.source = f"photo{number}.png"
            outputs.add(prediction)
    assert outputs.retired == tmp_path / "old_2"
    assert [p.name for p in (tmp_path / "labels").iterdir()] == ["photo2.png"]
    assert [p.name for p in (tmp_path / "old_1/labels").iterdir()] == ["photo0.png"]
    assert json.loads((tmp_path / "old_2/results.json").read_text())["images"][0]["file_name"] == "photo1.png"
    assert (tmp_path / "own.jpg").is_file()
    with pytest.raises(ValueError, match="unknown format coca; known: pictures, coco"):
        OutputFolder(tmp_path, METADATA, ["coca"])
