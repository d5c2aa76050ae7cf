"""Words, uploads and predictions of the web page."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdense.run.web.limits import Limits, RequestError
from clipdense.run.web.models import EMBEDDED, ServedModel, served_models
from clipdense.run.web.predictions import (
    Prediction,
    Upload,
    parse_words,
    predict,
    read_uploads,
    save_json,
    save_png,
)

LIMITS = Limits(images=2, megapixels=1, vocabularies=2, words=4, characters=60)


@pytest.fixture(scope="module")
def embedded() -> ServedModel:
    return served_models()[0]


@pytest.fixture(scope="module")
def scene() -> Upload:
    pixels = np.full((96, 128, 3), 90, np.uint8)
    pixels[20:76, 30:86] = (220, 30, 30)
    return Upload("a.png", pixels)


@pytest.fixture(scope="module")
def predictions(embedded: ServedModel, scene: Upload) -> list[Prediction]:
    return list(predict(embedded, [scene], parse_words("red square|red block\nblue ring", "gravel", LIMITS)))


def test_each_line_is_a_vocabulary_with_the_background_last() -> None:
    (_, first, count), (line, second, _) = parse_words("cat | kitten,, dog\n\n Sky, car", "sky, wall", LIMITS)
    assert first is not None and first.synonyms == (("cat", "kitten"), ("dog",), ("sky",), ("wall",))
    assert count == 2
    assert line == "Sky, car"
    assert second is not None and second.names == ("Sky", "car", "wall")


def test_no_words_mean_the_classes_of_the_model() -> None:
    assert parse_words(" , \n", "sky", LIMITS) == [("", None, 0)]


def test_words_never_name_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("secret\n")
    ((_, vocabulary, _),) = parse_words(str(path), "", Limits())
    assert vocabulary is not None and vocabulary.names == (str(path),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\nc", "3 lines of words: the limit is 2"),
        ("a, b, c, d, e", "5 words with the background: the limit is 4"),
        ("x" * 61, "limit is 60 characters"),
        ("cat, Cat", "classes 0 and 1 are the same"),
    ],
)
def test_wrong_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_words(text, "", LIMITS)


def test_uploads_are_checked_and_errors_hide_the_folder(tmp_path: Path) -> None:
    Image.new("RGB", (1200, 900)).save(tmp_path / "large.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "small.png")
    (tmp_path / "text.jpg").write_text("no image")
    (upload,) = read_uploads([str(tmp_path / "small.png")], LIMITS)
    assert upload.name == "small.png" and upload.pixels.shape == (20, 30, 3)
    for names, message in (
        ([], "Drop an image"),
        (["small.png"] * 3, "3 images: the limit is 2"),
        (["large.png"], "large.png: 1200 x 900 pixels; the limit is 1 megapixels"),
        (["text.jpg"], "text.jpg: not an image"),
        (["gone.png"], "gone.png"),
    ):
        with pytest.raises(RequestError, match=message) as error:
            read_uploads([str(tmp_path / name) for name in names], LIMITS)
        assert str(tmp_path) not in str(error.value)


def test_a_prediction_has_picture_scores_and_masks(predictions: list[Prediction]) -> None:
    first, second = predictions
    assert [p.words for p in predictions] == ["red square|red block", "blue ring"]
    (red,) = first.classes  # the background is no class of the table
    assert red["name"] == "red square"
    assert red["share"] == pytest.approx(100 * red["pixels"] / (96 * 128))
    assert red["pixels"] > second.classes[0]["pixels"]
    assert 0 <= red["mean_score"] <= red["max_score"] <= 1
    assert red["segmentation"]["size"] == [96, 128]
    assert len(first.score_maps) == 1
    assert first.picture.shape[1] == first.score_maps[0].shape[1] == 384


def test_downloads_hold_all_predictions(predictions: list[Prediction], tmp_path: Path) -> None:
    save_png(predictions, 2, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width == 2 * 384 + 8
    save_json("nano", "gravel", predictions, tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["model"] == "nano"
    assert [(row["line"], row["classes"][0]["name"]) for row in content["results"]] == [
        (1, "red square"),
        (2, "blue ring"),
    ]


def test_a_model_without_classes_needs_words(embedded: ServedModel) -> None:
    with pytest.raises(RequestError, match="Type at least one word"):
        embedded.set_vocabulary(None)


def test_a_model_with_classes_of_its_own_returns_to_them(scene: Upload) -> None:
    file = f"configs/{EMBEDDED['shapes-rn (MaskCLIP)']}"
    (own,) = [model for model in served_models(config=file) if model.name == file]
    (typed,) = predict(own, [scene], parse_words("red square", "", LIMITS))
    (known,) = predict(own, [scene], parse_words("", "", LIMITS))
    assert [row["name"] for row in typed.classes] == ["red square"]
    assert len(known.classes) == 88
    assert len(known.score_maps) == 12


def test_models_of_the_command_line_come_first() -> None:
    names = [model.name for model in served_models(["RN50:openai", "hf-hub:a/b"], config="a.yaml")]
    assert names == ["a.yaml", "RN50:openai", "hf-hub:a/b", *EMBEDDED]
    with pytest.raises(ValueError, match="--config"):
        served_models(weights="a.pth")
    with pytest.raises(ValueError, match="same name"):
        served_models(["RN50:openai", "RN50:openai"])


def test_a_clip_without_a_vit_gets_maskclip() -> None:
    model = served_models(["shapes-rn"])[0]
    assert model.predictor().cfg.MODEL.ZERO_SHOT.METHOD == "maskclip"
    model = served_models(["shapes-vit"])[0]
    assert model.predictor().cfg.MODEL.ZERO_SHOT.METHOD == "sclip"


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="images must be at least 1"):
        Limits(images=0)
