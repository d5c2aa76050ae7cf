"""Cameras: frames are read one at a time, and what is done is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipdense.data.image import BadImageError
from clipdense.run.inputs import find_inputs
from clipdense.run.outputs import OutputFolder
from clipdense.run.predicting import PredictionSettings, predict_inputs
from clipdense.run.predictor import Predictor
from clipdense.run.videos import Video
from tests.helpers.cameras import Camera, use_camera


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> type[Camera]:
    return use_camera(monkeypatch)


@pytest.fixture
def predict(predictor: Predictor, tmp_path: Path) -> Callable[..., int]:
    def run(name: str, **settings: Any) -> int:
        inputs = find_inputs([name])
        outputs = OutputFolder(tmp_path / "out", predictor.metadata, ("pictures", "csv"))
        return predict_inputs(predictor, inputs, outputs, PredictionSettings("instances", **settings))

    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "camera_0.jsonl").read_text().splitlines()]


def frames(folder: Path) -> int:
    return sum(1 for _ in Video(folder / "camera_0.mp4"))


def test_frames_of_a_camera(
    camera: type[Camera], predict: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("camera:0", max_frames=3) == 0
    rows = lines(tmp_path / "out")
    assert [(row["frame"], row["time"]) for row in rows] == [(0, 0), (1, 0.04), (2, 0.08)]  # 25 a second
    assert {found["category"] for row in rows for found in row["objects"]} == {"blue box"}
    assert frames(tmp_path / "out") == 3
    assert "3 frames" in capsys.readouterr().out
    (capture,) = camera.opened
    assert capture.released and capture.frames == 3  # no frame is read in advance


def test_an_interrupted_camera_keeps_what_is_done(
    camera: type[Camera], predict: Callable[..., int], tmp_path: Path
) -> None:
    camera.interrupt_after = 4
    with pytest.raises(KeyboardInterrupt):
        predict("webcam:0")
    assert len(lines(tmp_path / "out")) == 4 and frames(tmp_path / "out") == 4
    assert (tmp_path / "out/summary.csv").read_text().count("blue box") == 4
    assert camera.opened[0].released


def test_a_camera_that_is_not_there(
    camera: type[Camera], predict: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("camera:7") == 1
    assert "failed: camera:7: the camera cannot be opened" in capsys.readouterr().err
    with pytest.raises(BadImageError, match="camera:7"):
        Video(7)
