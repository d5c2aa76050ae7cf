"""Words: quoting, synonyms, thresholds, image examples; inputs: folders, globs, URLs."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdense.clip.vocabulary import Vocabulary
from clipdense.run.inputs import find_inputs
from clipdense.run.words import apply_thresholds, class_thresholds, parse_example, with_examples
from clipdense.systems.training_free.examples import mix_examples

from detectron2.structures import Instances


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sofa|couch, cat", (("sofa", "couch"), ("cat",))),
        ('"black, white", dog', (("black, white",), ("dog",))),
        ('dog, "a|b, c"|d,', (("dog",), ("a|b, c", "d"))),
        ("rotes Auto, 红色的车|红车", (("rotes Auto",), ("红色的车", "红车"))),
    ],
)
def test_quotes_and_synonyms(text: str, expected: tuple[tuple[str, ...], ...]) -> None:
    assert Vocabulary.parse(text).synonyms == expected


def test_an_open_quotation_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no counterpart"):
        Vocabulary.parse('cat, "black, white')


def test_examples_are_parsed() -> None:
    example = parse_example("red chair=my/photo.v1.jpg:10,20.5,30,40")
    assert (example.name, str(example.image)) == ("red chair", "my/photo.v1.jpg")
    assert example.box == (10, 20.5, 30, 40)
    assert parse_example("chair=photo.jpg").box is None
    for text, message in [
        ("photo.jpg", "expected NAME=IMAGE"),
        ("chair=a.jpg:1,2,3", "a box is four numbers"),
        ("chair=a.jpg:9,2,3,4", "x0 < x1"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_example(text)
    assert with_examples(None, [example, example]).names == ("red chair",)
    words = Vocabulary.parse("cat, seat|red chair")
    assert with_examples(words, [example]) == words
    assert with_examples(Vocabulary.parse("cat"), [example]).names == ("cat", "red chair")


def test_thresholds() -> None:
    words = ("cat", "dog")
    assert class_thresholds(words, None) is None
    values = class_thresholds(words, 0.2, ["Cat=0.6"])
    assert values is not None and values.tolist() == pytest.approx([0.6, 0.2])
    assert class_thresholds(words, None, {"dog": 0.5}).tolist() == [0, 0.5]  # type: ignore[union-attr]
    wrong = [("dog=2", "in 0..1"), ("dog", "expected NAME=SCORE"), ("dgo=0.5", "did you mean 'dog'")]
    for entry, message in wrong:
        with pytest.raises(ValueError, match=message):
            class_thresholds(words, None, [entry])

    scores = torch.tensor([[[0.5, 0.7, 0.1]], [[0.4, 0.2, 0.15]]])
    output = {"sem_seg": scores, "sem_seg_labels": scores.argmax(0)}
    output["instances"] = Instances((1, 3), scores=torch.tensor([0.3, 0.3]), pred_classes=torch.arange(2))
    found = apply_thresholds(output, values)
    assert found["sem_seg_labels"].tolist() == [[-1, 0, -1]]
    assert found["sem_seg"][:, 0].tolist() == [[0, pytest.approx(0.7), 0], [0, pytest.approx(0.2), 0]]
    assert found["instances"].pred_classes.tolist() == [1]
    assert torch.equal(output["sem_seg"], scores)


def test_examples_stand_among_the_words() -> None:
    """An example is as far from the other names as these are from their mean, in the region's direction."""
    text = torch.nn.functional.normalize(torch.tensor([[5.0, 1, 0, 0], [5, 0, 1, 0], [5, -1, -1, 0]]), dim=1)
    classes = torch.tensor([0, 1, 2])
    region, whole = torch.tensor([0.0, 0, 3, 4]), torch.tensor([0.0, 0, 3, 0])
    mixed, labels = mix_examples(text, classes, [(1, region, whole)], 1.0)
    assert labels.tolist() == [0, 1, 2] and torch.equal(mixed[[0, 2]], text[[0, 2]])
    assert mixed[1, 3] > 0.1 and abs(mixed[1, 2] - text[[0, 2]].mean(0)[2]) < 0.1
    assert mixed.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    half, _ = mix_examples(text, classes, [(1, region, whole)], 0.5)
    assert text[1, 3] < half[1, 3] < mixed[1, 3]
    none, _ = mix_examples(text, classes, [(1, region, whole)], 0.0)
    assert torch.allclose(none, text, atol=1e-6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    for name in ("a.png", "more/b.jpg", ".hidden/c.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(photos / name)
    (photos / "notes.txt").write_text("no image")
    (photos / "more" / "clip.MP4").write_bytes(b"")
    return photos


def test_folders(folder: Path) -> None:
    found = find_inputs([str(folder)])
    assert [p.name for p in found.images] == ["a.png", "b.jpg"]
    assert [p.name for p in found.videos] == ["clip.MP4"]
    assert found.skipped == 1 and len(found) == 3
    flat = find_inputs([str(folder), "camera:1", "webcam:0", "none"], recursive=False)
    assert [p.name for p in flat.images] == ["a.png"] and flat.cameras == [1, 0]
    assert flat.failed == {"none": "there is no such file"}
    assert [p.name for p in find_inputs([f"{folder}/**/*.jpg"]).images] == ["b.jpg"]


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_urls_need_permission(server: str, tmp_path: Path) -> None:
    url = f"{server}/a.png?size=large"
    assert "--allow-urls" in find_inputs([url]).failed[url]
    found = find_inputs([url, url], allow_urls=True, downloads=tmp_path / "d")
    assert [p.name for p in found.images] == ["a.png", "2_a.png"] and found.images[0].stat().st_size > 50
    missing = find_inputs([f"{server}/none.png"], allow_urls=True, downloads=tmp_path / "d")
    assert "cannot be downloaded" in missing.failed[f"{server}/none.png"]
