"""`Predictor` with open vocabularies, and background classes."""

from pathlib import Path

import pytest
import torch

from clipdense.clip import load_clip
from clipdense.clip.text import TextBank
from clipdense.clip.vocabulary import Vocabulary
from clipdense.engine.options import ConfigError
from clipdense.run.predictor import Predictor, remove_background
from clipdense.run.setup import load_config
from tests.helpers.bright_box import CLASSES, OpenBrightBox, check_box, dataset, scene, write_model


def test_an_open_vocabulary_model_looks_for_the_test_sets_classes(config: Path, tmp_path: Path) -> None:
    test_set = load_config(str(config)).DATASETS.TEST[0]
    trained = {"thing_classes": ["red box"]}  # the base classes of the training set
    predictor = Predictor(write_model(tmp_path, test_set, "OpenBrightBox", **trained))
    assert predictor.model.vocabulary.names == tuple(CLASSES)
    assert predictor.metadata.thing_classes == CLASSES
    check_box(predictor(scene()))
    # a dataset that is not registered here
    unknown = write_model(tmp_path, "birds_of_elsewhere", "OpenBrightBox", **trained)
    assert Predictor(unknown).metadata.thing_classes == ["red box"]
    # given words go before both, and need neither
    nameless = write_model(tmp_path, "birds_of_elsewhere", "OpenBrightBox")
    assert Predictor(nameless, vocabulary="sky, blue|azure").metadata.thing_classes == ["sky", "blue"]
    with pytest.raises(ConfigError, match="no class names.*give a vocabulary to an open-vocabulary model"):
        Predictor(nameless)


def test_another_vocabulary_builds_nothing_anew(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    bank = TextBank(load_clip("shapes-rn", "random"), "a photo of a {}.", cache_dir=None)
    encoded: list[str] = []
    fill = bank.templates.__class__.fill
    monkeypatch.setattr(bank.templates.__class__, "fill", lambda s, n: encoded.append(n) or fill(s, n))
    monkeypatch.setattr(OpenBrightBox, "embedder", staticmethod(bank))
    words = tmp_path / "words.txt"
    words.write_text("blue box, azure box\ncat\n")

    predictor = Predictor(write_model(tmp_path, "none", "OpenBrightBox"), vocabulary="red box, cat")
    assert encoded == ["red box", "cat"] and len(predictor(scene())["instances"]) == 0
    modules = list(map(id, predictor.model.modules()))
    weights = [p.data_ptr() for p in (*predictor.model.parameters(), *bank.clip.parameters())]
    predictor.set_vocabulary(words)
    assert encoded[2:] == ["blue box", "azure box"]
    check_box(predictor(scene()), 0)
    assert predictor.metadata.thing_classes == predictor.metadata.stuff_classes == ["blue box", "cat"]
    predictor.set_vocabulary(["red box", "azure box"])
    assert len(encoded) == 4 and torch.equal(
        predictor.model.text_embeddings()["classes"], bank(["red box", "azure box"])
    )
    assert list(map(id, predictor.model.modules())) == modules
    assert [p.data_ptr() for p in (*predictor.model.parameters(), *bank.clip.parameters())] == weights
    # what cannot be embedded changes nothing
    with pytest.raises(ValueError, match="too long"):
        predictor.set_vocabulary(["green box", "very " * 80 + "long"])
    assert predictor.metadata.thing_classes == ["red box", "azure box"]
    assert predictor.model.vocabulary.names == ("red box", "azure box")


def test_background_words(tmp_path: Path, config: Path) -> None:
    """They are looked for, and left out of every output."""
    predictor = Predictor(
        write_model(tmp_path, "none", "OpenBrightBox"), vocabulary="cat, red", background="blue"
    )
    assert predictor.model.vocabulary.names == ("cat", "red", "blue")
    assert predictor.model.vocabulary.thing == (True, True, False)
    assert predictor.metadata.thing_classes == ["cat", "red"]
    assert len(predictor(scene())["instances"]) == 0
    predictor.set_vocabulary("cat, blue")
    check_box(predictor(scene()), 1)
    with pytest.raises(ValueError, match="are the same"):
        predictor.set_vocabulary("cat, blue", "Blue")
    # beside the classes of the test set
    test_set = load_config(str(config)).DATASETS.TEST[0]
    predictor = Predictor(write_model(tmp_path, test_set, "OpenBrightBox"), background=["others"])
    assert predictor.model.vocabulary.names == (*CLASSES, "others")
    assert predictor.metadata.thing_classes == CLASSES
    with pytest.raises(ConfigError, match="closed vocabulary"):
        Predictor(config, background="others")


def test_commas_in_the_names_of_the_test_set(tmp_path: Path) -> None:
    with dataset(classes=["red box, crimson box", "cat"]) as name:
        config = write_model(tmp_path, name, "OpenBrightBox")
        for split, first in ((True, ("red box", "crimson box")), (False, ("red box, crimson box",))):
            predictor = Predictor(config, opts=["DATASETS.SPLIT_NAMES", split])
            assert predictor.model.vocabulary.synonyms == (first, ("cat",))


def test_outputs_without_background() -> None:
    scores = torch.tensor([[[0.5, 0.1, 0.0]], [[0.4, 0.2, 0.0]], [[0.3, 0.3, 0.2]]])
    ids, segments = (
        torch.tensor([[1, 2, 3]]),
        [{"id": i, "category_id": c} for i, c in ((1, 0), (2, 2), (3, 1))],
    )
    output = {"sem_seg": scores, "sem_seg_labels": scores.argmax(0), "panoptic_seg": (ids, segments)}
    got = remove_background(output, 2)
    assert torch.equal(got["sem_seg"], torch.tensor([[[0.5, 0, 0]], [[0.4, 0, 0]]]))
    assert got["sem_seg_labels"].tolist() == [[0, -1, -1]]
    assert got["panoptic_seg"][0].tolist() == [[1, 0, 3]]
    assert got["panoptic_seg"][1] == [segments[0], segments[2]]


def test_things_and_stuff_of_a_vocabulary(tmp_path: Path) -> None:
    predictor = Predictor(
        write_model(tmp_path, "none", "OpenBrightBox"),
        vocabulary=Vocabulary((("cat",), ("sky",)), thing=(True, False)),
    )
    assert predictor.metadata.thing_dataset_id_to_contiguous_id == {0: 0}
    assert predictor.metadata.stuff_classes == ["cat", "sky"]


def test_a_closed_vocabulary_stays(config: Path, predictor: Predictor, tmp_path: Path) -> None:
    expected = "BrightBox has a closed vocabulary: .*OpenBrightBox"
    with pytest.raises(ConfigError, match=expected):
        predictor.set_vocabulary("cat")
    assert predictor.metadata.thing_classes == CLASSES
    with pytest.raises(ConfigError, match=expected):  # before the weights are read
        Predictor(config, tmp_path / "none.pth", vocabulary="cat")


@pytest.mark.parametrize(
    "words, error, message",
    [
        ("", ValueError, "at least one class"),
        ("cat, Cat", ValueError, "classes 0 and 1 are the same"),
        ("none.txt", FileNotFoundError, "no class-list file 'none.txt'"),
    ],
)
def test_words_that_are_no_vocabulary(
    tmp_path: Path, words: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Predictor(write_model(tmp_path, "none", "OpenBrightBox"), vocabulary=words)
